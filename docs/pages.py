"""Pages of the site that are made from the code when mkdocs builds it (a hook of mkdocs.yml).

The configuration reference comes from configs/default.py, the Python API from docstrings, and the
notebook's page from its cells. Nothing of the package is imported but configs.
"""

import ast
import importlib
import json
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "configs/default.py"
NOTEBOOK = "docs/train_and_predict.ipynb"
# Files outside of docs/ that are pages of the site.
OUTSIDE = {"benchmarks/peers.md": "peers.md", "data/mvtec_ad/README.md": "tfds.md"}
# The public API: a module, and its names in the order of the page.
API = {
    "anoseg_jax.api": ("fit",),
    "anoseg_jax.deploy.predictor": ("Predictor",),
    "anoseg_jax.deploy.prediction": ("Prediction", "Region", "Thresholds", "Unreadable"),
    "anoseg_jax.evaluation.metrics": (
        "segmentation_metrics",
        "SegmentationAccumulator",
        "image_metrics",
    ),
    "anoseg_jax.method.thresholds": ("threshold_from_good",),
    "anoseg_jax.report.compare": ("compare", "as_markdown"),
}
HEADER = ("", "| option | default | meaning |", "|---|---|---|")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


# The configuration reference.


def _comments(path: Path) -> dict[int, str]:
    """Returns the comment of each line that has one, without the "#"."""
    with path.open("rb") as file:
        tokens = tokenize.tokenize(file.readline)
        return {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}


def _option_lines(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields the path of each option and group of options, with its first and last line."""
    tree = ast.parse(path.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    dicts = {}
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        target, value = ast.unparse(statement.targets[0]), statement.value
        if isinstance(value, ast.Dict):
            dicts[target] = value
            yield "", statement.lineno, statement.lineno
        if not target.startswith("config."):
            continue
        name = target.removeprefix("config.")
        inner = value.args[0] if isinstance(value, ast.Call) and value.args else None
        inner = dicts.get(inner.id) if isinstance(inner, ast.Name) else inner
        yield name, statement.lineno, statement.lineno if inner else statement.end_lineno
        if isinstance(inner, ast.Dict):
            for key, item in zip(inner.keys, inner.values, strict=True):
                yield f"{name}.{key.value}", key.lineno, item.end_lineno


def _default_text(value: Any) -> str:
    """Returns how the command line takes a value."""
    text = '""' if value == "" else "{}" if hasattr(value, "items") else str(value)
    return f"`{text}`"


def configuration_page(path: Path = ROOT / DEFAULT) -> str:
    """Returns the page with every option of a config file, its default and its comment."""
    sys.path.insert(0, str(ROOT))
    config = importlib.import_module("configs.default").get_config()
    values = {key: getattr(config, key) for key in config}
    comments, source = _comments(path), path.read_text().splitlines()
    lines = [
        "# Configuration reference",
        "",
        "Every option, with the default of `configs/default.py`. This page is made from that file.",
        "Other configs change some of the defaults: `--config=cpu` trains a smaller network.",
        "",
        "Set an option on the command line by its path: `--config.model.width=16`. Quote a value",
        'that the shell would change: `"--config.seeds=(0,1,2)"`. An option that does not exist is',
        "refused, and so is a value of another type.",
    ]
    for name, start, end in _option_lines(path):
        above = start
        while source[above - 2].strip().startswith("#"):
            above -= 1
        block = [comments[line] for line in range(above, start)]
        value: Any = values if name else {}
        for key in filter(None, name.split(".")):
            value = value[key]
        is_group = hasattr(value, "items")
        is_title = block and re.fullmatch(r"[\w ,-]+(\(.+\))?\.", block[0])
        if is_title and not is_group and not source[above - 2].strip():
            lines += ["", f"## {_split_title(block.pop(0))[0]}", *HEADER]
        meaning = " ".join([*block, *(comments[i] for i in range(start, end + 1) if i in comments)])
        if not name:
            lines += ["", _sentence(meaning)]
        elif not is_group or not len(value):
            lines.append(f"| `{name}` | {_default_text(value)} | {_sentence(meaning)} |")
        elif "." in name:
            lines += ["", f"### {name}", "", _sentence(meaning), *HEADER]
        else:
            title, intro = _split_title(meaning)
            lines += ["", f"## {title}", "", intro, *HEADER]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _sentence(text: str) -> str:
    """Returns the text with a capital letter at its start and a full stop at its end."""
    if not text:
        return ""
    text = text.replace("<", "&lt;").replace("**", r"\*\*").replace("|", r"\|")
    return text[0].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def _split_title(text: str) -> tuple[str, str]:
    """Returns the title of a group, "Losses" of "Losses (losses.py). A ...", and the rest."""
    title, rest = re.fullmatch(r"([^(.:]+)(?:\([^)]*\))?[.:]?(.*)", text).groups()
    return title.strip(), _sentence(rest.strip())


# The Python API.


def api_page() -> str:
    """Returns the page with the signatures and docstrings of the public API."""
    lines = [
        "# Python API",
        "",
        "This page is made from the docstrings. `fit` and `Predictor` can be imported from the",
        "package: `from anoseg_jax import Predictor, fit`.",
    ]
    for module, names in API.items():
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        nodes = {getattr(node, "name", None): node for node in tree.body}
        for name in names:
            lines += ["", f"## {name}", "", f"In `{module}`.", *_described(nodes[name], name)]
    return "\n".join(lines) + "\n"


def _described(node: ast.AST, name: str) -> list[str]:
    """Returns the signature and docstring of a function, or of a class and its public methods."""
    if isinstance(node, ast.FunctionDef):
        return [*_signature(node, name), *_docstring(node)]
    lines = _docstring(node)
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or not ast.get_docstring(method):
            continue
        if method.name.startswith("_") and method.name not in ("__init__", "__call__"):
            continue
        shown = {"__init__": name, "__call__": name.lower()}.get(method.name, method.name)
        is_value = any("property" in ast.unparse(each) for each in method.decorator_list)
        lines += ["", f"### `{name}.{method.name}`"]
        lines += [] if is_value else _signature(method, shown)
        lines += _docstring(method)
    return lines


def _signature(node: ast.FunctionDef, name: str) -> list[str]:
    arguments = node.args
    arguments.args = [one for one in arguments.args if one.arg not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = f"{name}({ast.unparse(arguments)}){returns}"
    if len(text) > 90:
        parts = re.split(r", (?=\*?,? ?\*?\w+(?::|=|,|$))", ast.unparse(arguments))
        text = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"
    return ["", "```python", text, "```"]


def _docstring(node: ast.AST) -> list[str]:
    """Returns a docstring in Markdown: its sections, such as "Args:", become lists."""
    lines: list[str] = []
    indent = None  # of the items of a section; 0 is known at its first line
    for line in (ast.get_docstring(node) or "").splitlines():
        section = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        depth = len(line) - len(line.lstrip())
        if section:
            lines += [f"**{section.group(1)}**", ""]
            indent = 0
        elif indent is None or not depth:
            indent = None
            lines.append(line)
        else:
            indent = indent or depth
            item = re.match(r"([\w.]+(?:, [\w.]+)*): (.*)", line.strip())
            if depth > indent:
                lines[-1] += f" {line.strip()}"
            elif item:
                lines += [""] if lines[-1] and not lines[-1].startswith("- ") else []
                lines.append(f"- `{item.group(1)}`: {item.group(2)}")
            else:
                lines.append(line.strip())
    text = "\n".join(lines)
    # Lists of shapes are no links.
    return ["", *re.sub(r"(?<!`)\[([^\]]*)\](?![`(])", r"\\[\1\\]", text).splitlines()]


# The notebook.


def notebook_page(path: Path = ROOT / NOTEBOOK) -> str:
    """Returns the cells of a notebook as a page."""
    name = path.name
    pages = [f"*This page is the notebook [{name}]({name}), which you can download and run.*"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        pages.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = pages[1:]
    return "\n\n".join([title, pages[0], *rest]) + "\n"


# Hooks of mkdocs.


def relocated(markdown: str, source: str, page: str) -> str:
    """Returns the text with its relative links changed from the repository to the site.

    `source` is the file in the repository that the links start from, `page` the page of the site.
    Links that lead to no page of the site stay as they are: mkdocs warns about them.
    """

    def change(match: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match.group(1)))
        site = OUTSIDE.get(target, target.removeprefix("docs/") if target[:5] == "docs/" else None)
        if site is None:
            return match.group(0)
        return os.path.relpath(site, os.path.dirname(page) or ".") + (match.group(2) or "")

    return LINK.sub(change, markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages that are made here."""
    from mkdocs.structure.files import File

    pages = {
        "configuration.md": configuration_page(),
        "api.md": api_page(),
        "notebook.md": notebook_page(),
    }
    for source, page in OUTSIDE.items():
        pages[page] = relocated((ROOT / source).read_text(), source, page)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Changes the links of a page of docs/ that lead out of it to those of the site."""
    source = page.file.src_uri
    if source in OUTSIDE.values():
        return markdown
    return relocated(markdown, f"docs/{source}", source)

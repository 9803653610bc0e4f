"""README and docs: commands, options, links and messages exist, the notebook's cells run."""

import ast
import configparser
import json
import re
import shlex
import sys
from pathlib import Path

import programs
import pytest
import tiny_config

from anoseg_jax.images.layouts import LAYOUTS
from configs import default

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs"))
import pages  # noqa: E402

# The log of experiments has the options of its time.
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/peers.md")
    if path.name != "experiments.md"
]


def text_of(file):
    return (ROOT / file).read_text()


def code_of(text):
    """Returns the lines of code blocks and the code within lines, continued lines joined."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks += re.findall(r"^ {4}.*$", rest, re.M) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", rest)
    return [line.strip() for block in blocks for line in block.splitlines()]


def commands_of(file):
    """Returns the commands of a page as lists of words, the program first, without brackets."""
    commands = []
    for line in code_of(text_of(file)):
        line = re.sub(r"\s#\s.*|\s{3,}[^-\"'\s].*", "", line)  # remarks to the right of it
        for part in re.split(r"&&|;", line):
            part = re.sub(r"^.*?(srun|mpirun|--wrap \") ", "", part.strip() + " ").strip()
            part = part.replace(".venv/bin/", "").removesuffix('"' * (part.count('"') % 2))
            if re.match(r"(python \S+\.py|launch\.py|anoseg|make|pip install)( |$)", part):
                words = shlex.split(re.sub(r"(?<= )\[|\](?= |$)", "", part))
                commands.append(words[1:] if words[0] == "python" else words)
    return commands


COMMANDS = {file: commands for file in FILES if (commands := commands_of(file))}
PARSE = """
import json, os, sys
from absl import flags
from anoseg_jax import UsageError, cli, config_files, options

config_files.make_importable()
for arguments in json.loads(sys.argv[1]):
    if os.fork():  # flags are defined once in a process
        os.wait()
        continue
    argv = ["launch.py", *(word for word in arguments if "..." not in word)]
    try:
        cli.define_flags(argv)
        mode, _ = cli.parse(argv)
        config = flags.FLAGS.config
        if config is not None and not config.maps_dir:
            options.check(config)
    except UsageError as error:
        is_missing = str(error) in cli.HINTS.values() and argv[1:] != arguments
        if not is_missing:
            print(f"{arguments}: {error}", flush=True)
    os._exit(0)
"""


def filled_in(words):
    """Returns the words of a command with a config, if it has "..." in its place."""
    has_options = any(word.startswith("--config.") for word in words)
    if "..." in words and has_options and not any(word.startswith("--config=") for word in words):
        words = ["--config=default", *words]
    return [with_value(word) for word in words]


def with_value(word):
    """Returns a word of a command with a value where the page has a name for one."""
    word = re.sub(r"(--num_processes|--process_id)=[A-Z]$", r"\1=1", word)
    word = re.sub(r"(--config\.shard)=(.*\$.*|i/n)", r"\1=0/2", word)
    return re.sub(r"(--format)=.*\|.*", r"\1=onnx", word)


@pytest.mark.parametrize("file", COMMANDS)
def test_commands_have_flags_and_options_that_exist(file):
    launched = [
        filled_in(words)
        for program, *words in COMMANDS[file]
        if program in ("launch.py", "anoseg") and words not in ([], ["--help"])
    ]
    done = programs.run(PARSE, json.dumps(launched))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_commands_are_seen():
    """So that the test above tests something."""
    words = [words for commands in COMMANDS.values() for words in commands]
    for program, least in {"launch.py": 25, "anoseg": 20, "make": 10, "pip": 10}.items():
        assert sum(each[0] == program for each in words) >= least, program
    assert ["launch.py", "--mode=compare", "--workdir=W", "A", "B"] in COMMANDS["docs/compare.md"]


@pytest.mark.parametrize("file", COMMANDS)
def test_make_has_the_targets_and_pip_the_extras(file):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for words in COMMANDS[file]:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif words[0] == "pip":
            for word in words:
                extra = re.search(r"^\.\[(\w+)\]", word)
                assert not extra or extra[1] in setup["options.extras_require"], words
                assert not word.endswith(".txt") or (ROOT / word).exists(), words


@pytest.mark.parametrize("file", COMMANDS)
def test_the_benchmarks_have_the_flags(file):
    for program, *words in COMMANDS[file]:
        if not program.endswith(".py") or program == "launch.py":
            continue
        is_export = program.endswith("/predict.py") and "benchmarks" not in program
        path = "anoseg_jax/deploy/exported_predict.py" if is_export else program
        source = text_of(path)
        for word in words:
            name = re.match(r"--([\w-]+)", word)
            if name and not word.startswith("--config."):
                assert re.search(rf'"(--)?{name[1]}"', source), (path, word)


@pytest.mark.parametrize("file", FILES)
def test_options_and_modes_that_are_named_exist(file):
    text = text_of(file)
    modes = ast.parse(text_of("anoseg_jax/cli.py")).body
    modes = next(n for n in modes if isinstance(n, ast.Assign) and n.targets[0].id == "MODES")
    assert set(re.findall(r"--mode=(\w+)", text)) <= {key.value for key in modes.value.keys}
    config = default.get_config()
    for path in re.findall(r"--config\.([a-z_][\w.]*)", text):
        value = config
        for name in path.rstrip(".").split("."):
            assert name in value, path
            value = getattr(value, name)
            if name == "category_options":
                break


def anchors_of(text):
    """Returns the anchors of the titles of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)", text, re.M)
    words = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {re.sub(r"\s+", "-", title.strip()) for title in words}


@pytest.mark.parametrize("file", [*FILES, "docs/lab/experiments.md", "data/mvtec_ad/README.md"])
def test_links_lead_somewhere(file):
    made = {
        ROOT / "docs/configuration.md": pages.configuration_page,
        ROOT / "docs/api.md": pages.api_page,
        ROOT / "docs/notebook.md": pages.notebook_page,
    }
    text = re.sub(r"^```.*?^```", "", text_of(file), flags=re.M | re.S)
    for target, _, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(#([^)\s]*))?\)", text):
        path = (ROOT / file).parent / target if target else ROOT / file
        path = path.resolve()
        assert path in made or path.exists(), target
        if anchor:
            assert anchor in anchors_of(made[path]() if path in made else path.read_text()), target


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r": ([\w/]+\.md)$", text_of("mkdocs.yml"), re.M))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    made = {"configuration.md", "api.md", "notebook.md", *pages.OUTSIDE.values()}
    assert navigation == written | made


def test_every_option_is_in_the_configuration_reference_with_its_default():
    def paths(config, path=""):
        for key, value in config.items():
            if hasattr(value, "items") and len(value):
                yield from paths(value, f"{path}{key}.")
            else:
                yield f"{path}{key}"

    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", pages.configuration_page(), re.M)
    config = default.get_config()
    assert sorted(name for name, *_ in rows) == sorted(paths(config))
    assert ("num_steps", str(config.num_steps)) in [row[:2] for row in rows]
    meaning = {name: text for name, _, text in rows}
    assert meaning["held_out"].startswith("Fraction of train/good")
    assert meaning["defects.cut_and_paste.regions"] == "At most."


def test_the_api_page_has_signatures_and_docstrings():
    page = pages.api_page()
    for expected in (
        "## fit",
        "Trains a model on photographs of good parts, or resumes, and returns its predictor.",
        "predictor(photographs: Any) -> Prediction | list[Prediction]",
        "### `Predictor.recalibrate`",
        "- `batch_size`: the number of images that are computed at once.",
    ):
        assert expected in page, expected
    assert "self" not in page.split()


def test_every_layout_is_described():
    text = text_of("docs/your_images.md").replace("`", "")
    for key, layout in LAYOUTS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {key} |"))
        assert row == f"| {key} | {layout.title} | {layout.tree} |"


def strings_of_the_source():
    """Returns all strings of the package and of the Makefile, "\\0" where a value is inserted."""
    texts = [text_of("Makefile")]
    for path in (*ROOT.glob("anoseg_jax/**/*.py"), *ROOT.glob("data/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                texts.append("".join(part if isinstance(part, str) else "\0" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_of_the_troubleshooting_page_exist():
    source = strings_of_the_source()
    rows = re.findall(r"^\| `(.+?)`( \(.*?\))? \|", text_of("docs/troubleshooting.md"), re.M)
    assert len(rows) > 40
    for message, _ in rows:
        for piece in message.removeprefix("warning: ").split("..."):
            assert piece.strip() in source, message


def table_of(file, *titles):
    """Returns the rows of the first table of a page whose first row has these titles."""
    lines = [line for line in text_of(file).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if set(titles) <= set(row))
    stop = next((i for i in range(start + 2, len(rows)) if len(rows[i]) != len(rows[start])), None)
    return rows[start], rows[start + 2 : stop]


def test_the_tables_of_measured_figures_agree():
    """README.md has model and baseline side by side, docs/results.md one below the other."""
    titles = "image AUROC", "pixel AUROC", "pixel AP"
    header, rows = table_of("docs/results.md", "category", *titles)
    columns = [header.index(title) for title in titles]
    measured = {(row[0], row[1]): [row[column] for column in columns] for row in rows}
    header, rows = table_of("README.md", *titles)
    columns = [[i for i, cell in enumerate(header) if cell.endswith(title)] for title in titles]
    of_anomalib, lines = table_of("docs/anomalib.md", "method", "pretrained on")
    (ours,) = [line for line in lines if line[0].startswith("anoseg_jax")]
    assert {row[0] for row in rows} >= {"screw", "pill"}
    for row in rows:
        model, baseline = ([row[pair[k]] for pair in columns] for k in (0, 1))
        assert model == measured[row[0], "default"], row[0]
        assert baseline == measured[row[0], "best trivial baseline for each figure"], row[0]
        assert ours[of_anomalib.index(row[0])].startswith(f"{model[0]} / {model[1]}"), row[0]


def test_links_of_a_page_are_those_of_the_site():
    text = "[a](../benchmarks/peers.md) [b](metrics.md#formulae) [c](https://x.y/z.md) [d](#here)"
    expected = "[a](../peers.md) [b](../metrics.md#formulae) [c](https://x.y/z.md) [d](#here)"
    assert pages.relocated(text, "docs/x.md", "lab/x.md") == expected
    assert (
        pages.relocated("[a](../configs/cpu.py)", "docs/x.md", "x.md") == "[a](../configs/cpu.py)"
    )


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    notebook = json.loads((ROOT / pages.NOTEBOOK).read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    settings, *rest = ["".join(cell["source"]) for cell in cells]
    exec(settings, names)
    names |= {"CONFIG": tiny_config.get_config(), "OPTIONS": {"num_steps": 4}}
    for cell in rest:
        exec(cell, names)
    assert (tmp_path / names["WORKDIR"] / "thresholds.json").exists()
    assert {prediction.verdict for prediction in names["predictions"]} <= {"good", "defective"}
    assert names["predictor"].model.step == 4

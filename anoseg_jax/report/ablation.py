"""The table of an ablation: what each variant of a config is worth, and what it adds to the last.

A variant is a run in a folder of its own: `W/<variant>/results.json`, or one such file for each
seed, `W/<variant>/seed_<s>/results.json`. Nothing else is read. All metrics are better when higher.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax.evaluation.results import read_results
from anoseg_jax.report import runs
from anoseg_jax.running import files

# The columns.
METRICS = {
    "pixel_auroc": "pixel AUROC",
    "iou": "IoU",
    "image_auroc": "image AUROC",
    "pixel_ap": "pixel AP",
    "au_pro": "AU-PRO",
}


def tabulate(
    workdir: str | Path,
    variants: Sequence[str],
    categories: Sequence[str],
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Puts the variants beside each other; what is not finished has no value, and the reason.

    Args:
      workdir: holds a folder for each variant.
      variants: their names, in the order of the rows.
      categories: those that the table is about.
      seeds: those that a value is the mean of; () for variants that were run without seeds.

    Returns:
      A dict that JSON can hold:
      variants, seeds: as given; steps: {category: [int]}, of training, more than one where variants
        or seeds differ.
      categories: {category: {variant: {metric: CELL}}}.
      mean: {variant: {metric: CELL}}: of each seed's mean over the categories that have the metric
        in any variant, named by metric in mean_of; a variant that lacks one of these has none.
      CELL: value (mean over seeds), std (over seeds, n - 1), seeds (the values), difference (to the
        variant before); reason: why the value is None.
    """
    folders = [f"seed_{seed}" for seed in seeds] or ["."]
    results = {
        variant: [_read(Path(workdir) / variant / folder) for folder in folders]
        for variant in variants
    }
    table = {
        category: {
            variant: _cells([of_seed.get(category) for of_seed in results[variant]], seeds)
            for variant in variants
        }
        for category in categories
    }
    mean_of = {
        metric: [
            category
            for category, rows in table.items()
            if any(cells[metric]["value"] is not None for cells in rows.values())
        ]
        for metric in METRICS
    }
    mean = {
        variant: {
            metric: _mean({name: table[name][variant][metric] for name in of})
            for metric, of in mean_of.items()
        }
        for variant in variants
    }
    for rows in (*table.values(), mean):
        for before, variant in pairwise(variants):
            for metric, cell in rows[variant].items():
                old = rows[before][metric]["value"]
                if cell["value"] is not None and old is not None:
                    cell["difference"] = cell["value"] - old
    every = [of_seed for variant in variants for of_seed in results[variant]]
    return {
        "variants": list(variants),
        "seeds": list(seeds),
        "steps": {
            category: sorted({found[category]["steps"] for found in every if category in found})
            for category in categories
        },
        "categories": table,
        "mean": mean,
        "mean_of": mean_of,
    }


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of each category in a workdir; none of a workdir without results.json."""
    if not (folder / "results.json").exists():
        return {}
    return read_results(folder)["categories"]


def _cells(of_seeds: Sequence[dict[str, Any] | None], seeds: Sequence[int]) -> dict[str, dict]:
    """Returns {metric: CELL} of a category's results, one a seed (None: not finished)."""
    unfinished = {"not_available": dict.fromkeys(METRICS, "not finished")}
    found = dict(zip(seeds or [0], [results or unfinished for results in of_seeds], strict=True))
    return {
        metric: _cell([r.get(metric) for r in found.values()], runs.why_missing(metric, found))
        for metric in METRICS
    }


def _cell(of_seeds: Sequence[float | None], reason: str | None) -> dict[str, Any]:
    return {
        "value": None if reason else float(np.mean(of_seeds)),
        "std": runs.std_of(of_seeds),
        "seeds": list(of_seeds),
        "difference": None,
        "reason": reason,
    }


def _mean(cells: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the CELL of the mean over categories, from {category: CELL}."""
    lacking = [category for category, cell in cells.items() if cell["value"] is None]
    if not cells:
        return _cell([], "no category has it")
    if lacking:
        return _cell([], f"no value in {', '.join(lacking)}")
    return _cell(np.mean([cell["seeds"] for cell in cells.values()], axis=0).tolist(), None)


def label(variants: Sequence[str], variant: str) -> str:
    """Returns the name of a row: "hard_augmentation" becomes "+ hard augmentation"."""
    return ("" if variant == variants[0] else "+ ") + variant.replace("_", " ")


def as_markdown(table: dict[str, Any]) -> str:
    """Returns one table, a row a category and variant, and beneath it how it was made.

    `table` is that of `tabulate`, with how it was made beside: `image_size`, `command`, and
    `failures`, a line for each training or evaluation that failed.
    """
    variants, categories = table["variants"], table["categories"]
    blocks = [*categories.items()]
    if len(categories) > 1:
        blocks.append(("**mean**", table["mean"]))
    lines = ["# Ablation", "", _line(["category", "variant", *METRICS.values()])]
    lines.append("|---" * (2 + len(METRICS)) + "|")
    for name, rows in blocks:
        for variant, cells in rows.items():
            lines.append(_line([name, label(variants, variant), *map(_text, cells.values())]))
    height, width = table["image_size"]
    steps = "; ".join(f"{name} {_list(found)}" for name, found in table["steps"].items() if found)
    lines += [
        "",
        (
            f"Mean ± standard deviation over {len(table['seeds'])} seeds ({_list(table['seeds'])})"
            if len(table["seeds"]) > 1
            else "One seed: without a spread"
        )
        + ", in brackets the difference to the row before. A difference that is not larger than "
        "the spreads says nothing about the part.",
        "",
        f"- Steps of training: {steps or 'none'}. Images: {height}x{width}.",
        f"- Command: `{table['command']}`",
    ]
    for metric, of in table["mean_of"].items():
        if len(categories) > 1 and 0 < len(of) < len(categories):
            lines.append(f"- **mean** of {METRICS[metric]}: over {', '.join(of)} alone.")
    notes = _notes(blocks, variants)
    if notes:
        lines += ["", "Not available:", "", *notes]
    if table["failures"]:
        lines += ["", "Failed (a value above is then of an earlier command):", ""]
        lines += [f"- {failure}" for failure in table["failures"]]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _text(cell: dict[str, Any]) -> str:
    if cell["value"] is None:
        return "-"
    spread = "" if cell["std"] is None else f" ± {cell['std']:.4f}"
    difference = "" if cell["difference"] is None else f" ({cell['difference']:+.4f})"
    return f"{cell['value']:.4f}{spread}{difference}"


def _notes(blocks: Sequence[tuple[str, dict[str, dict]]], variants: Sequence[str]) -> list[str]:
    """Returns a line for each reason, with the metrics and variants that it holds for."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for block, rows in blocks:
        for variant, cells in rows.items():
            for metric, cell in cells.items():
                if cell["reason"]:
                    of_variant = found.setdefault((block, cell["reason"]), {})
                    of_variant.setdefault(variant, []).append(METRICS[metric])
    lines = []
    for (block, reason), of_variant in found.items():
        groups: dict[str, list[str]] = {}
        for variant, names in of_variant.items():
            groups.setdefault(", ".join(names), []).append(label(variants, variant))
        for names, labels in groups.items():
            who = "" if len(labels) == len(variants) else f" ({'; '.join(labels)})"
            lines.append(f"- {block}{who}: {names}: {reason}")
    return lines


def write(table: dict[str, Any], workdir: str | Path) -> None:
    """Writes ablation.json and ablation.md, each whole or not at all."""
    text = json.dumps(table, indent=2, allow_nan=False) + "\n"
    files.write_text(Path(workdir) / "ablation.json", text)
    files.write_text(Path(workdir) / "ablation.md", as_markdown(table))

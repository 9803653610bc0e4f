"""The table of an ablation: what each variant of a config is worth, and what it adds to the last.

A variant is a run in a folder of its own: `W/<variant>/results.json`, or one such file for each
seed, `W/<variant>/seed_<s>/results.json`. All metrics are better when higher.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import (
    read_finished,
    seed_folder,
    std_of,
    why_missing,
    write_json,
)
from anoseg_jax.report.templates import render
from anoseg_jax.running.files import write_text

_UNFINISHED = {"not_available": dict.fromkeys(METRICS, "not finished")}


def tabulate(
    workdir: str | Path,
    variants: Sequence[str],
    categories: Sequence[str],
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns the results of the variants; an unfinished one has no value, and the reason.

    Args:
      workdir: holds a folder for each variant.
      variants: their names, in the order of the rows.
      categories: the categories of the table.
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
    every_seed = seeds or [None]
    results = {
        variant: read_finished({s: seed_folder(Path(workdir) / variant, s) for s in every_seed})
        for variant in variants
    }

    def by_seed(variant: str, category: str) -> dict[int, dict[str, Any]]:
        of_seeds = {seed: content["categories"] for seed, content in results[variant].items()}
        return {seed: of_seeds.get(seed, {}).get(category, _UNFINISHED) for seed in every_seed}

    table = {
        category: {variant: _cells(by_seed(variant, category)) for variant in variants}
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
    every = {c: [r for v in variants for r in by_seed(v, c).values()] for c in categories}
    return {
        "variants": list(variants),
        "seeds": list(seeds),
        "steps": {c: sorted({r["steps"] for r in of if "steps" in r}) for c, of in every.items()},
        "categories": table,
        "mean": mean,
        "mean_of": mean_of,
    }


def _cells(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns {metric: CELL} of a category's results."""
    return {
        metric: _cell([r.get(metric) for r in by_seed.values()], why_missing(metric, by_seed))
        for metric in METRICS
    }


def _cell(of_seeds: Sequence[float | None], reason: str | None) -> dict[str, Any]:
    return {
        "value": None if reason else float(np.mean(of_seeds)),
        "std": std_of(of_seeds),
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


def as_markdown(table: Mapping[str, Any]) -> str:
    """Returns one table, a row a category and variant, and beneath it how it was made.

    `table` is that of `tabulate` with three more keys: `image_size`, `command`, and `failures`, a
    line for each training or evaluation that failed.
    """
    # "hard_augmentation" becomes "+ hard augmentation".
    names = enumerate(table["variants"])
    labels = {name: ("+ " if index else "") + name.replace("_", " ") for index, name in names}
    blocks = dict(table["categories"])
    if len(blocks) > 1:
        blocks["**mean**"] = table["mean"]
    notes = [note for name, rows in blocks.items() for note in _notes(name, rows, labels)]
    context = {"columns": METRICS, "labels": labels, "blocks": blocks, "notes": notes}
    return render("ablation.md.jinja", **table, **context).rstrip() + "\n"


def _notes(block: str, rows: Mapping[str, dict], labels: Mapping[str, str]) -> list[str]:
    """Returns a line for each reason of a block, with its metrics and variants."""
    labels_of: dict[tuple[str, str], list[str]] = {}
    for variant, cells in rows.items():
        for reason in dict.fromkeys(cell["reason"] for cell in cells.values() if cell["reason"]):
            names = [metric for metric, cell in cells.items() if cell["reason"] == reason]
            labels_of.setdefault((", ".join(names), reason), []).append(labels[variant])
    lines = []
    for (names, reason), of_reason in labels_of.items():
        who = "" if len(of_reason) == len(labels) else f" ({'; '.join(of_reason)})"
        lines.append(f"{block}{who}: {names}: {reason}")
    return lines


def write(table: Mapping[str, Any], workdir: str | Path) -> None:
    """Writes ablation.json and ablation.md of a table of `as_markdown`."""
    write_json(Path(workdir) / "ablation.json", table)
    write_text(Path(workdir) / "ablation.md", as_markdown(table))

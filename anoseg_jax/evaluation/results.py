"""Result files: writes, reads, averages and formats results.json, results.md and images.csv."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from anoseg_jax.evaluation.evaluate import IMAGE_COLUMNS, METRICS, Evaluation
from anoseg_jax.running import versions
from anoseg_jax.running.files import write_bytes, write_text


def mean_of(categories: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each of METRICS over the categories with a value; None without any."""
    values = {
        name: [c[name] for c in categories.values() if c.get(name) is not None] for name in METRICS
    }
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}


def as_markdown(results: dict[str, Any]) -> str:
    """Returns the content of results.json as a Markdown table: the categories, then their mean."""
    rows = [("category", *METRICS, "train seconds")]
    for name, category in results["categories"].items():
        values = [_with_spread(category, metric) for metric in METRICS]
        seconds = category.get("train_seconds")  # None for the maps of other methods
        rows.append((name, *values, "-" if seconds is None else f"{seconds:.0f}"))
    rows.append(("**mean**", *(_with_spread(results["mean"], metric) for metric in METRICS), ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    reasons = [
        f"- {name}: {metric}: {reason}"
        for name, category in results["categories"].items()
        for metric, reason in category["not_available"].items()
        if metric in METRICS
    ]
    note = ["", "Not available:", *reasons] if reasons else []
    categories = results["categories"]
    return "\n".join(
        [*lines, *image_score_lines(categories), *note, *_baselines_table(categories), ""]
    )


def image_score_lines(categories: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of both image scores' AUROC; none without a detector."""
    rows = [
        (name, *(_with_spread(scores[kind], "image_auroc") for kind in ("map", "detector")))
        + (f"{scores['detector']['train_seconds']:.0f}", f"{scores['detector']['train_share']:.0%}")
        for name, scores in ((name, c.get("image_scores", {})) for name, c in categories.items())
        if "detector" in scores
    ]
    if not rows:
        return []
    header = ("image_auroc of", "map", "detector", "its train seconds", "of all training")
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return ["", lines[0], "|---" * len(header) + "|", *lines[1:]]


def _baselines_table(categories: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of trivial baselines; none if no category has any.

    A baseline's value that is above the model's is bold.
    """
    rows = []
    for name, category in categories.items():
        for baseline, values in (category.get("baselines") or {}).items():
            cells = []
            for metric in METRICS:
                cell, model_value = _with_spread(values, metric), category.get(metric)
                available = None not in (model_value, values[metric])
                is_better = available and values[metric] > model_value
                cells.append(f"**{cell}**" if is_better else cell)
            rows.append(f"| {name} | {baseline} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    header = "| " + " | ".join(("category", "trivial baseline", *METRICS)) + " |"
    note = (
        "Trivial baselines through the same evaluator; in bold where one is above the table above:"
    )
    return ["", note, "", header, "|---" * (2 + len(METRICS)) + "|", *rows]


def _with_spread(values: dict[str, Any], metric: str) -> str:
    spread = values.get(f"{metric}_std")  # over seeds
    return _number(values.get(metric)) + ("" if spread is None else f" ± {spread:.4f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summary(category: str, results: dict[str, Any]) -> str:
    """Returns the metrics of a category as one line, for the terminal."""
    values = "  ".join(f"{metric} {_number(results[metric])}" for metric in METRICS)
    return f"{category}: {values}"


def read_results(folder: Path) -> dict[str, Any]:
    """Reads results.json of a workdir or of a category folder."""
    return json.loads((folder / "results.json").read_text())


def write_everything(workdir: Path, everything: dict[str, Any]) -> None:
    """Writes `everything` to results.json of a workdir, and its tables to results.md."""
    write_text(workdir / "results.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "results.md", as_markdown(everything))


def write_category(folder: Path, results: dict[str, Any], *, config: str, command: str) -> None:
    """Writes results.json of a category: the results, and the metadata to reproduce them.

    `config` is the JSON of the options of this run; its hash is written as `config_sha256`.
    `command` is the command line of this run.
    """
    content = {
        "results": results,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "command": command,
        "versions": versions.versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text(folder / "results.json", text)


def assemble(workdir: Path, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes results.json and results.md of `workdir` from the results of its category folders.

    Other categories that are already in results.json are kept. Returns the content of each
    category's results.json; categories without one are skipped. If all are skipped, no file is
    written.
    """
    contents = {
        name: read_results(workdir / name)
        for name in categories
        if (workdir / name / "results.json").exists()
    }
    if not contents:
        return {}
    exists = (workdir / "results.json").exists()
    previous = read_results(workdir)["categories"] if exists else {}
    others = {name: results for name, results in previous.items() if name not in contents}
    every = others | {name: content["results"] for name, content in contents.items()}
    metadata = [
        {key: value for key, value in content.items() if key != "results"}
        for content in contents.values()
    ]
    write_everything(
        workdir, {"categories": every, "mean": mean_of(every)} | _join_values(metadata)
    )
    return contents


def _join_values(values: Sequence[Any]) -> Any:
    """Returns the common value, or the distinct values joined by "; "; in dicts key by key."""
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], dict):
        return {key: _join_values([value[key] for value in values]) for key in values[0]}
    return "; ".join(dict.fromkeys(values))


def write_results(
    workdir: Path, category: str, results: dict[str, Any], *, config: str, command: str
) -> None:
    """Writes the results of a category to its folder and to the result files of `workdir`.

    See `write_category`, `assemble`.
    """
    write_category(workdir / category, results, config=config, command=command)
    assemble(workdir, [category])


def write_evaluation(folder: Path, evaluation: Evaluation, arrays: dict[str, np.ndarray]) -> None:
    """Writes the files that pictures and reports are drawn from; each file is written atomically.

    images.csv: one line for each image, with the keys of `Evaluation.images`; None is empty.
    curves.json: `Evaluation.curves`.
    evaluation.npz, in the order of images.csv: `image` uint8 [n, h, w, 3], `mask` bool [n, h, w],
    `map` uint8 [n, h, w] (times 255).
    """
    table = io.StringIO()
    scores = ("score", "score_map", "score_detector")
    writer = csv.DictWriter(table, (*IMAGE_COLUMNS, *scores, "iou"))
    writer.writeheader()
    writer.writerows(evaluation.images)
    write_text(folder / "images.csv", table.getvalue())
    write_text(folder / "curves.json", json.dumps(evaluation.curves))
    packed = io.BytesIO()
    np.savez_compressed(packed, image=arrays["image"], mask=arrays["mask"], map=evaluation.maps)
    write_bytes(folder / "evaluation.npz", packed.getvalue())

"""HTML pages of a finished run, from its files alone: no model, no data, no network to view them.

`W/report.html` has all categories, `W/<category>/report.html` one with its curves and every test
image. Equal files make equal pages, byte for byte.
"""

import csv
import functools
import io
import json
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils.epath import Path

from anoseg_jax import UsageError
from anoseg_jax.evaluation.evaluate import METRICS, to_display_scale
from anoseg_jax.report.panels import (
    PREDICTION,
    TRUTH,
    VERDICTS,
    Card,
    Threshold,
    colour_scale,
    draw_gallery,
    make_cards,
)
from anoseg_jax.report.plots import draw_curves, draw_training, shorten, types_of
from anoseg_jax.running.files import write_text

# Title and explanation of each metric.
NAMES = {
    "image_auroc": ("Image AUROC", "how often a defective image scores above a good one"),
    "pixel_auroc": ("Pixel AUROC", "how often a defect pixel scores above a defect-free one"),
    "pixel_ap": ("Pixel AP", "precision of pixels, averaged over recall; small defects are hard"),
    "iou": ("IoU", "overlap of found and true pixels, at the best threshold of the test set"),
    "pixel_f1_max": ("Pixel F1-max", "the same overlap as F1: 2 IoU / (1 + IoU)"),
    "au_pro": ("AU-PRO", "share found of each defect region, over false-positive rates up to 0.3"),
    "image_ap": ("Image AP", "precision of images, averaged over recall"),
    "image_f1_max": ("Image F1-max", "of images, at the best threshold of the test set"),
    "au_pro_0.05": ("AU-PRO 0.05", "as AU-PRO, over false-positive rates up to 0.05"),
}
MAX_CARDS = 600  # of a gallery: the worst images


class ReportError(UsageError):
    """The files do not allow a report; the message is one line that names the file."""


def read_results(workdir: Path) -> dict[str, Any]:
    """Reads `workdir`/results.json; ReportError if it is not one."""
    path = workdir / "results.json"
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(
            f"{path}: there is no such file; --mode=train or evaluate writes it"
        ) from None
    except ValueError as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("categories"), dict):
        raise ReportError(f"{path} has no categories: it is not the result file of a run")
    return results


def read_optional(path: Path, parse: Callable[[Path], Any]) -> tuple[Any, str]:
    """Returns the parsed file and "", or None and a sentence that says what is wrong with it."""
    try:
        return parse(path), ""
    except FileNotFoundError:
        return None, f"{path.name} is not there."
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return None, f"{path.name} cannot be read ({type(error).__name__}: {error})."


def parse_json(path: Path) -> Any:
    """Returns the content of a JSON file."""
    return json.loads(path.read_text())


def parse_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of train_log.jsonl without an incomplete last line."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def parse_images(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of images.csv with their types; see results.write_evaluation."""
    return [
        {
            "name": row["name"],
            "defect_type": row["defect_type"],
            "label": int(row["label"]),
            "score": float(row["score"]),
            "has_mask": row["has_mask"] == "True",
            "iou": float(row["iou"]) if row["iou"] else None,
        }
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def parse_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns `image`, `mask` and `map` of evaluation.npz."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return {name: arrays[name] for name in ("image", "mask", "map")}


def choose_thresholds(results: Mapping[str, Any]) -> dict[str, Threshold]:
    """Returns the "image" and the "pixel" threshold of a page.

    `thresholds` of the results has priority, {"pixel": {"threshold": .., "how": .., ..},
    "image": {..}}. Without it, these are the best thresholds of the test set.
    """
    missing = results.get("not_available", {})
    best = {
        "image": ("image_f1_max_threshold", "image_f1_max", "the best F1"),
        "pixel": ("iou_threshold", "iou", "the best IoU and the best F1"),
    }
    chosen = {}
    for kind, (key, metric, aim) in best.items():
        held_out = (results.get("thresholds") or {}).get(kind) or {}
        value = held_out.get("threshold", held_out.get("value"))
        if value is not None:
            details = {
                name: number
                for name, number in held_out.items()
                if name not in ("threshold", "value", "how") and _is_scalar(number)
            }
            how = held_out.get("how", "made without the test images.")
            chosen[kind] = Threshold(value, str(how), details)
        elif results.get(key) is not None:
            how = (
                f"the value with {aim} on these test images themselves, so what is counted with it "
                "flatters the model."
            )
            chosen[kind] = Threshold(results[key], how)
        else:
            chosen[kind] = Threshold(None, f"not available: {missing.get(metric, 'not recorded')}.")
    return chosen


class Notes(list):
    """The reasons below a table, each once."""

    def number(self, reason: str) -> int:
        """Returns the number of a reason, from 1."""
        if reason not in self:
            self.append(reason)
        return self.index(reason) + 1


def metric_cells(results: Mapping[str, Any], names: Sequence[str], notes: Notes) -> list[dict]:
    """Returns a table's cells: value, and number of the note that says why it is None."""
    reasons = results.get("not_available", {})
    cells = []
    for name in names:
        value = results.get(name)
        reason = reasons.get(name, "not in results.json")
        note = notes.number(reason) if value is None else None
        cells.append({"value": value, "note": note, "reason": reason})
    return cells


def mean_cells(results: Mapping[str, Any], notes: Notes) -> list[dict]:
    """Returns the cells of the mean, with a note where some categories have no value."""
    categories = results["categories"]
    cells = []
    for name in METRICS:
        value = results.get("mean", {}).get(name)
        num_values = sum(category.get(name) is not None for category in categories.values())
        reason = (
            f"the mean is of the {num_values} of {len(categories)} categories that have a number"
        )
        if not num_values:
            reason = "no category has a number"
        incomplete = value is None or num_values < len(categories)
        note = notes.number(reason) if incomplete else None
        cells.append({"value": value, "note": note, "reason": reason})
    return cells


def type_rows(results: Mapping[str, Any], cards: Sequence[Card], notes: Notes) -> list[dict]:
    """Returns the table of defect types: name, number of images, missed images, metrics."""
    missed = Counter(card.defect_type for card in cards if card.verdict == "missed")
    judged = {card.defect_type for card in cards if card.verdict != "none"}
    return [
        {
            "name": name,
            "images": of_type.get("images"),
            "missed": missed[name] if name in judged else None,
            "cells": metric_cells(of_type, METRICS, notes),
        }
        for name, of_type in sorted((results.get("defect_types") or {}).items())
    ]


def baseline_rows(results: Mapping[str, Any]) -> list[dict]:
    """Returns the table of the model and the trivial baselines, none if there are no baselines.

    A cell of the model is `below` where the best baseline has a higher value.
    """
    baselines = results.get("baselines") or {}
    rows = [{"name": "this model", "cells": [results.get(metric) for metric in METRICS]}]
    rows += [
        {"name": name.replace("_", " "), "cells": [values.get(metric) for metric in METRICS]}
        for name, values in baselines.items()
    ]
    best = [
        max(
            (values[metric] for values in baselines.values() if values.get(metric) is not None),
            default=0,
        )
        for metric in METRICS
    ]
    for row in rows:
        row["cells"] = [
            {"value": value, "below": row is rows[0] and value is not None and value < highest}
            for value, highest in zip(row["cells"], best, strict=True)
        ]
    return rows if baselines else []


def category_page(
    workdir: Path, results: Mapping[str, Any], category: str, command: str | None
) -> str:
    """Returns the page of one category."""
    folder = workdir / category
    category_results = results["categories"][category]
    rows, no_rows = read_optional(folder / "images.csv", parse_images)
    arrays, no_arrays = read_optional(folder / "evaluation.npz", parse_arrays)
    curves, _ = read_optional(folder / "curves.json", parse_json)
    log, no_log = read_optional(folder / "train_log.jsonl", parse_log)
    config, no_config = read_optional(folder / "config.json", parse_json)
    if rows is not None and arrays is not None and len(rows) != len(arrays["map"]):
        no_arrays = (
            f"evaluation.npz has {len(arrays['map'])} images and images.csv {len(rows)}: "
            "evaluate again."
        )
        arrays = None

    thresholds = choose_thresholds(category_results)
    maps, masks = (None, None) if arrays is None else (arrays["map"], arrays["mask"])
    scale = category_results.get("map_scale")
    cards = make_cards(
        rows or [], maps, masks, thresholds, category_results.get("iou_threshold"), scale
    )
    shown = cards[:MAX_CARDS] if arrays is not None else []
    pixel_threshold = thresholds["pixel"].value
    drawn_at = 0.5 if pixel_threshold is None else float(to_display_scale(pixel_threshold, scale))
    gallery = draw_gallery(shown, arrays, drawn_at) if shown else []
    notes = Notes()
    types = types_of(cards)
    counts = Counter(card.verdict for card in cards)
    # Without a threshold there are no verdicts: zeros would look like results.
    verdicts = dict.fromkeys(VERDICTS, 0) if thresholds["image"].value is not None else {}
    verdicts = {name: counts[name] for name in {**verdicts, **counts}}
    if not counts["none"]:
        verdicts.pop("none", None)
    totals = Counter(card.label for card in cards)
    return render(
        kind="category",
        title=category,
        results=category_results,
        steps=category_results.get("steps"),
        good=totals[0],
        defective=totals[1],
        headline=METRICS,
        others=[name for name in NAMES if name not in METRICS and name in category_results],
        thresholds=thresholds,
        baseline_rows=baseline_rows(category_results),
        drawn_at=drawn_at,
        verdicts=verdicts,
        of_all={"missed": totals[1], "found": totals[1], "false_alarm": totals[0]}
        | {"passed": totals[0], "none": len(cards)},
        type_rows=type_rows(category_results, cards, notes),
        notes=notes,
        curves=draw_curves(category_results, curves or {}, cards, thresholds),
        training=draw_training(log) if log else [],
        no_training=no_log or "train_log.jsonl is empty.",
        cards=list(zip(shown, gallery, strict=True)),
        images=len(cards),
        no_gallery=no_rows or no_arrays or "There are no test images.",
        types=types,
        type_counts=Counter(card.defect_type for card in cards),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
        no_config=no_config,
        command=command,
        run=results,
    )


def count_verdicts(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Returns the missed defective images and the false alarms, each as text: "1 of 8"."""
    rows, _ = read_optional(folder / "images.csv", parse_images)
    threshold = choose_thresholds(results)["image"].value
    if rows is None or threshold is None:
        return ["not available"] * 2
    counts = Counter((row["label"], row["score"] >= threshold) for row in rows)
    missed, alarms = counts[1, False], counts[0, True]
    return [f"{missed} of {missed + counts[1, True]}", f"{alarms} of {alarms + counts[0, False]}"]


def run_page(workdir: Path, results: Mapping[str, Any], command: str | None) -> str:
    """Returns the page of all categories."""
    notes = Notes()
    rows = [
        {
            "name": name,
            "link": urllib.parse.quote(name, safe="") + "/report.html",
            "cells": metric_cells(category, METRICS, notes),
            "verdicts": count_verdicts(workdir / name, category),
            "seconds": category.get("train_seconds"),
        }
        for name, category in results["categories"].items()
    ]
    return render(
        kind="run",
        title="All categories",
        headline=METRICS,
        rows=rows,
        mean=mean_cells(results, notes),
        notes=notes,
        command=command,
        run=results,
    )


@functools.cache
def load_template(name: str) -> jinja2.Template:
    """Returns a template of this package, compiled once for all pages; it escapes all text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": _metric, "duration": _duration, "short": shorten}
    environment.filters |= {"plain": _plain}
    return environment.get_template(name)


def render(template: str = "report.html.jinja", **values: Any) -> str:
    """Fills a template (see `load_template`)."""
    return load_template(template).render(
        names=NAMES,
        verdict_names=VERDICTS,
        scale=colour_scale(),
        truth_colour=f"rgb{TRUTH}",
        prediction_colour=f"rgb{PREDICTION}",
        **values,
    )


def write_category(workdir: Path, category: str) -> None:
    """Writes `workdir`/<category>/report.html from the files of that category.

    Raises:
      ReportError: there is no results.json, or the category is not in it.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    if category not in results["categories"]:
        known = ", ".join(results["categories"]) or "none"
        raise ReportError(
            f"{workdir / 'results.json'} has no category {category!r}; there are: {known}"
        )
    page = category_page(workdir, results, category, results.get("command"))
    (workdir / category).mkdir(exist_ok=True)
    write_text(workdir / category / "report.html", page)


def write_run(workdir: Path, command: str | None = None) -> None:
    """Writes `workdir`/report.html and the page of each category.

    Args:
      workdir: of a run with a results.json.
      command: what the run was started with; None takes what results.json says.

    Raises:
      ReportError: there is no results.json.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    command = command or results.get("command")
    for category in results["categories"]:
        page = category_page(workdir, results, category, command)
        (workdir / category).mkdir(exist_ok=True)
        write_text(workdir / category / "report.html", page)
    write_text(workdir / "report.html", run_page(workdir, results, command))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _metric(value: float) -> str:
    return f"{value:.4f}"


def _plain(value: Any) -> str:
    if value is None:
        return "not available"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"

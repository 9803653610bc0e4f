"""Reads and writes the result files below; means over categories and seeds, tables.

    W/results.json, results.md           all categories and their mean
    W/<category>/results.json            one category, with what is needed to reproduce it
    W/<category>/images.csv              one line for each test image
    W/<category>/curves.json             points of the curves
    W/<category>/histograms.npz          histograms of the 8-bit maps, for confidence intervals
    W/<category>/evaluation.npz          test images, masks, 8-bit maps, regions found: for pages
                                         (first seed of a run without variants, by default)
    W/seed_<s>/                          with several seeds: one such workdir for each seed, and W
                                         has results.json and results.md with their mean

Reading does not import JAX.
"""

import csv
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax import UsageError
from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.metrics import level_histograms
from anoseg_jax.running import versions
from anoseg_jax.running.files import write_bytes, write_text

IMAGE_COLUMNS = ("name", "defect_type", "label", "has_mask")
SCORE_COLUMNS = ("score", "score_map", "score_detector", "iou")
ARRAYS = {
    "evaluation.npz": ("image", "mask", "map", "region"),
    "histograms.npz": ("histograms", "mask_crc32", "size"),
}
Arrays = Mapping[str, np.ndarray]


class ResultsError(UsageError):
    """Result files are missing or cannot be used; the message is one line."""


@dataclass
class Evaluation:
    """The results of one category.

    Attributes:
      results: the category's content of results.json: the metrics and the metadata of the model. A
        metric that cannot be computed is None and has a reason under `not_available`.
      images: one dict for each image: name, defect_type, label, has_mask, score (the selected image
        score), score_map, score_detector (None without a detector) and iou (see
        `evaluate.measure_regions`).
      maps: uint8 [n, h, w], the maps on the display scale (see `evaluate.to_display_scale`) times
        255: for pictures, not for metrics.
      regions: bool [n, h, w], the pixels found (see `evaluate.select_shown_thresholds`).
      curves: of metrics.segmentation_metrics and metrics.image_curves, for plotting.
    """

    results: dict[str, Any]
    images: list[dict[str, Any]]
    maps: np.ndarray
    regions: np.ndarray
    curves: dict[str, dict[str, list[float]]]


# Means over categories and seeds.


def mean_of(categories: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each of METRICS over the categories with a value; None without any."""
    values = {
        name: [c[name] for c in categories.values() if c.get(name) is not None] for name in METRICS
    }
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}


def mean_over_seeds(results_by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one dict in the shape of results.json from those of several seeds.

    A metric is its mean over seeds, and `<metric>_std` its standard deviation (n - 1). Both are
    None, with the reason, if any seed has no value: the mean of the others would flatter. Other
    entries keep their value if all seeds agree; else they are lists with one entry per seed.
    `params_sha256` is always such a list. A category's `seeds` names the seeds that have it. The
    `mean` is over categories; its std is that of the means that each seed has over categories.
    """
    by_seed = dict(sorted(results_by_seed.items()))
    of_seeds = {seed: results["categories"] for seed, results in by_seed.items()}
    categories = {}
    for name in keys_of(of_seeds.values()):
        of_category = {seed: of_seed[name] for seed, of_seed in of_seeds.items() if name in of_seed}
        hashes = [results.get("params_sha256") for results in of_category.values()]
        categories[name] = _over_seeds(of_category)
        categories[name] |= {"params_sha256": hashes, "seeds": list(of_category)}
    mean: dict[str, float | None] = {}
    same_seeds = all(len(category["seeds"]) == len(by_seed) for category in categories.values())
    for metric, value in mean_of(categories).items():
        complete = same_seeds and all(c[metric] is not None for c in categories.values())
        means = [results["mean"][metric] for results in by_seed.values()]
        mean |= {metric: value, f"{metric}_std": std_of(means) if complete else None}
    others = {
        seed: {key: value for key, value in results.items() if key not in ("categories", "mean")}
        for seed, results in by_seed.items()
    }
    everything = {"categories": categories, "mean": mean, "seeds": list(by_seed)}
    return everything | _over_seeds(others)


def _over_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one dict from one per seed; metrics get a std if a dict has `not_available`.

    Whole numbers on which all seeds agree are counts, and stay as they are.
    """
    result: dict[str, Any] = {}
    missing: dict[str, str] = {}
    has_metrics = any("not_available" in values for values in by_seed.values())
    for key in keys_of(by_seed.values()):
        values = [of_seed.get(key) for of_seed in by_seed.values()]
        known = [value for value in values if value is not None]
        agree = all(value == values[0] for value in values)
        if key == "not_available":
            continue
        if known and all(isinstance(value, dict) for value in known):
            result[key] = _over_seeds({seed: d[key] for seed, d in by_seed.items() if d.get(key)})
        elif not all(type(value) in (int, float) for value in known) or (
            agree and all(type(value) is int for value in values)
        ):
            result[key] = values[0] if agree else values
        else:
            reason = why_missing(key, by_seed)
            result[key] = float(np.mean(known)) if reason is None else None
            if has_metrics:
                result[f"{key}_std"] = std_of(values)
                if reason is not None:
                    missing[key] = reason
                if reason is not None or len(values) == 1:
                    missing[f"{key}_std"] = reason or "one seed"
    return result | ({"not_available": missing} if has_metrics else {})


def why_missing(metric: str, by_seed: Mapping[Any, Mapping[str, Any]]) -> str | None:
    """Returns why a metric is None in results of some seeds; None if all seeds have it."""
    reasons = {
        seed: values.get("not_available", {}).get(metric, "no value")
        for seed, values in by_seed.items()
        if values.get(metric) is None
    }
    if len(reasons) == len(by_seed) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons.items()) or None


def std_of(values: Sequence[float | None]) -> float | None:
    """Returns the standard deviation (n - 1); None for a single value or with a missing one."""
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1))


def keys_of(dicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the keys of all dicts without duplicates, in order of first occurrence."""
    return list(dict.fromkeys(key for values in dicts for key in values))


# Tables.


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def format_value(value: float | None, std: float | None = None) -> str:
    """Returns a cell of a table: the value with its standard deviation, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if std is None else f" ± {std:.4f}")


def _cell(values: Mapping[str, Any], metric: str) -> str:
    return format_value(values[metric], values.get(f"{metric}_std"))


def as_markdown(results: Mapping[str, Any]) -> str:
    """Returns the content of results.json as Markdown: categories, their mean, and baselines."""
    categories, rows = results["categories"], []
    for name, category in categories.items():
        seconds = category.get("train_seconds")  # None for the maps of other methods
        cells = (_cell(category, metric) for metric in METRICS)
        rows.append((name, *cells, "-" if seconds is None else f"{seconds:.0f}"))
    rows.append(("**mean**", *(_cell(results["mean"], metric) for metric in METRICS), ""))
    lines = markdown_table(("category", *METRICS, "train seconds"), rows)
    reasons = []
    for name, category in categories.items():
        missing: dict[str, list[str]] = {}
        for metric in METRICS:
            if metric in category["not_available"]:
                missing.setdefault(category["not_available"][metric], []).append(metric)
        reasons += [f"- {name}: {', '.join(several)}: {why}" for why, several in missing.items()]
    lines += _image_scores_table(categories)
    lines += ["", "Not available:", *reasons] if reasons else []
    for name, category in categories.items():
        if category.get("held_out_images"):  # what is known without test images
            values = [
                f"{k} {format_value(v['threshold'])}" for k, v in category["thresholds"].items()
            ]
            lines += ["", f"Thresholds of {name}, from good photographs: {', '.join(values)}"]
    return "\n".join([*lines, *_baselines_table(categories), ""])


def _image_scores_table(categories: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the lines of the table of both image scores' AUROC; none without a detector."""
    rows = []
    for name, category in categories.items():
        if "detector" in category.get("image_scores", {}):
            of_map, detector = (category["image_scores"][kind] for kind in ("map", "detector"))
            cells = (_cell(scores, "image_auroc") for scores in (of_map, detector))
            share = f"{detector['train_share']:.0%}"
            rows.append((name, *cells, f"{detector['train_seconds']:.0f}", share))
    header = ("image_auroc of", "map", "detector", "its train seconds", "of all training")
    return ["", *markdown_table(header, rows)] if rows else []


def _baselines_table(categories: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the lines of the table of trivial baselines; none if no category has any.

    A baseline's value that is above the model's is bold.
    """
    rows = []
    for name, category in categories.items():
        for baseline, values in category.get("baselines", {}).items():
            cells = []
            for metric in METRICS:
                pair = values[metric], category[metric]
                bold = "**" if None not in pair and pair[0] > pair[1] else ""
                cells.append(bold + _cell(values, metric) + bold)
            rows.append((name, baseline, *cells))
    if not rows:
        return []
    note = "Trivial baselines through the same evaluator; in bold where one is above the table "
    header = ("category", "trivial baseline", *METRICS)
    return ["", note + "above:", "", *markdown_table(header, rows)]


def summary(category: str, results: Mapping[str, Any]) -> str:
    """Returns the metrics of a category as one line, for the terminal."""
    values = "  ".join(f"{metric} {format_value(results[metric])}" for metric in METRICS)
    return f"{category}: {values}"


# Reading.


def read_results(folder: str | Path) -> dict[str, Any]:
    """Reads results.json of a workdir or a category; ResultsError if it is missing or damaged."""
    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and ("results" in content or "categories" in content):
            return content
        problem = f"{path} holds no results"
    except FileNotFoundError:
        problem = f"{folder} has no results.json"
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read ({type(error).__name__}: {error})"
    raise ResultsError(f"{problem}; run --mode=train or --mode=evaluate")


def read_finished(folders: Mapping[Any, Path]) -> dict[Any, dict[str, Any]]:
    """Returns the content of results.json of each of `folders` that has one."""
    return {k: read_results(f) for k, f in folders.items() if (f / "results.json").exists()}


def read_seeds(workdir: str | Path) -> dict[str, dict[str, Any]]:
    """Reads results.json of each `seed_<s>` in a workdir, or else of the workdir as seed ""."""
    workdir = Path(workdir)
    seeds = [path.name[5:] for path in workdir.glob("seed_*") if path.is_dir()]
    # By number, then by name.
    seeds.sort(key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s))
    return {seed: read_results(seed_folder(workdir, seed)) for seed in seeds or [""]}


def seed_folder(workdir: str | Path, seed: str | int | None) -> Path:
    """Returns the workdir of a seed; "" and None stand for a run without seeds."""
    return Path(workdir) if seed in ("", None) else Path(workdir) / f"seed_{seed}"


def read_optional(path: Path, parse: Callable[[Path], Any]) -> tuple[Any, str]:
    """Returns the parsed file and "", or None and a sentence that says what is wrong with it."""
    try:
        return parse(path), ""
    except FileNotFoundError:
        return None, f"{path.name} is not there."
    except Exception as error:  # csv, json, numpy and zlib have no common type for damaged files
        return None, f"{path.name} cannot be read ({type(error).__name__}: {error})."


def parse_json(path: Path) -> Any:
    """Returns the content of a JSON file."""
    return json.loads(path.read_text())


def parse_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of images.csv with their types; see `write_evaluation`."""
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


def read_images(
    folder: Path, archive: str = "evaluation.npz"
) -> tuple[list[dict[str, Any]] | None, Arrays | None, str]:
    """Reads images.csv and the arrays of evaluation.npz or histograms.npz of a category.

    Returns the rows, the arrays, and "" or a sentence that says why one of them is None. There are
    no arrays if the number of rows is another.
    """
    names = ARRAYS[archive]

    def parse(path: Path) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            return {name: file[name] for name in names}

    rows, no_rows = read_optional(folder / "images.csv", parse_rows)
    arrays, problem = read_optional(folder / archive, parse)
    if rows is not None and arrays is not None and len(rows) != len(arrays[names[0]]):
        problem = f"{archive} has {len(arrays[names[0]])} images and images.csv {len(rows)}."
        arrays = None
    if problem:
        problem += " --mode=evaluate writes it."
        if archive == "evaluation.npz":
            problem += " Of variants and further seeds it is only written with "
            problem += "--config.evaluate.store_all_maps=True."
    return rows, arrays, no_rows or problem


# Writing.


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically; values that are not finite are an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_everything(workdir: Path, everything: dict[str, Any]) -> None:
    """Writes `everything` to results.json of a workdir, and its tables to results.md."""
    write_json(workdir / "results.json", everything)
    write_text(workdir / "results.md", as_markdown(everything))


def write_category(folder: Path, results: dict[str, Any], *, config: str, command: str) -> None:
    """Writes results.json of a category, with what is needed to reproduce it; prints its warnings.

    `config` is the JSON of the options of this run; its hash is written as `config_sha256`.
    `command` is the command line of this run.
    """
    import jax  # not needed for reading

    content = {
        "results": results,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "command": command,
        "versions": versions.versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", content)
    for warning in results.get("warnings", ()):
        print(f"warning: {folder.name}: {warning}", file=sys.stderr)


def assemble(workdir: Path, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes results.json and results.md of `workdir` from the results of its category folders.

    Other categories that are already in results.json are kept. Returns the content of each
    category's results.json. Categories without one are skipped; without any, nothing is written.
    """
    contents = read_finished({name: workdir / name for name in categories})
    if not contents:
        return {}
    previous = read_finished({"": workdir}).get("", {"categories": {}})["categories"]
    others = {name: results for name, results in previous.items() if name not in contents}
    every = others | {name: content["results"] for name, content in contents.items()}
    metadata = [{k: v for k, v in c.items() if k != "results"} for c in contents.values()]
    everything = {"categories": every, "mean": mean_of(every)} | _join_values(metadata)
    write_everything(workdir, everything)
    return contents


def _join_values(values: Sequence[Any]) -> Any:
    """Returns the common value, or the distinct values joined by "; "; in dicts key by key."""
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], dict):
        return {key: _join_values([value[key] for value in values]) for key in values[0]}
    return "; ".join(dict.fromkeys(values))


def write_evaluation(
    folder: Path, evaluation: Evaluation, arrays: Arrays, *, store_maps: bool = True
) -> None:
    """Writes the files that pages and comparisons are made from; each file is written atomically.

    images.csv: one line for each image, with the keys of `Evaluation.images`; None is empty.
    curves.json: `Evaluation.curves`.
    The other arrays are in the order of images.csv:
    histograms.npz: `histograms` float64 [n, 3, 256] (metrics.level_histograms; 0 without a mask),
    `mask_crc32` uint32 [n] and the `size` of maps and masks.
    evaluation.npz: `image` uint8 [n, h, w, 3], `mask` bool [n, h, w], `map` uint8 [n, h, w] (times
    255), `region` bool [n, h, w]. Without `store_maps` it is not written, and an old one removed.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, (*IMAGE_COLUMNS, *SCORE_COLUMNS))
    writer.writeheader()
    writer.writerows(evaluation.images)
    write_text(folder / "images.csv", table.getvalue())
    write_text(folder / "curves.json", json.dumps(evaluation.curves))
    has_mask = np.array([row["has_mask"] for row in evaluation.images], bool)
    masks = arrays["mask"] & has_mask[:, None, None]
    histograms = [level_histograms(*pair) for pair in zip(evaluation.maps, masks, strict=True)]
    _write_arrays(
        folder / "histograms.npz",
        histograms=np.reshape(histograms, (-1, 3, 256)) * has_mask[:, None, None],
        mask_crc32=np.array([zlib.crc32(np.packbits(mask)) for mask in masks], np.uint32),
        size=np.array(masks.shape[1:]),
    )
    if store_maps:
        shown = {"image": arrays["image"], "mask": arrays["mask"], "map": evaluation.maps}
        _write_arrays(folder / "evaluation.npz", **shown, region=evaluation.regions)
    else:
        (folder / "evaluation.npz").unlink(missing_ok=True)


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(path, packed.getvalue())

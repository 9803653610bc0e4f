"""HTML pages of a finished run, from its files alone: no model, no data, no network to view them.

`W/report.html` has all categories, `W/<category>/report.html` one with its curves and every test
image. Equal files make equal pages, byte for byte.
"""

import json
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils.epath import Path

from anoseg_jax.evaluation.metrics import METRICS
from anoseg_jax.evaluation.results import (
    ResultsError,
    parse_json,
    parse_rows,
    read_images,
    read_optional,
    read_results,
)
from anoseg_jax.images.drawing import FOUND, colour_scale
from anoseg_jax.report import only_good, templates
from anoseg_jax.report.panels import TRUTH, draw_gallery
from anoseg_jax.report.plots import draw_curves, draw_training, types_of
from anoseg_jax.report.verdicts import VERDICTS, make_cards, shown_threshold
from anoseg_jax.running.files import write_text

MAX_CARDS = 600  # of a gallery: the worst images
MAX_GALLERY_BYTES = 12_000_000


def parse_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of train_log.jsonl without an incomplete last line."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


class Notes(list):
    """The reasons below a table, each once."""

    def number(self, reason: str) -> int:
        """Returns the number of a reason, from 1."""
        if reason not in self:
            self.append(reason)
        return self.index(reason) + 1


def category_page(
    workdir: Path, results: Mapping[str, Any], category: str, *, max_cards: int, max_bytes: int
) -> str:
    """Returns the page of one category."""
    folder = workdir / category
    of_category = results["categories"][category]
    rows, arrays, no_images = read_images(folder)
    curves, _ = read_optional(folder / "curves.json", parse_json)
    log, no_log = read_optional(folder / "train_log.jsonl", parse_log)
    config, no_config = read_optional(folder / "config.json", parse_json)

    image = shown_threshold(of_category, "image")
    cards = make_cards(rows or [], image)
    shown = cards[:max_cards] if arrays is not None else []
    gallery = draw_gallery(shown, arrays, max_bytes) if shown else []
    types = types_of(cards)
    counts = Counter(card.verdict for card in cards)
    # Without a threshold there are no verdicts: zeros would look like results.
    names = [name for name in VERDICTS if counts[name] or (image is not None and name != "none")]
    totals = Counter("defective" if card.label else "good" for card in cards)
    return render(
        kind="category",
        title=category,
        results=of_category,
        totals=totals,
        headline=METRICS,
        verdicts={name: counts[name] for name in names},
        missed=Counter(card.defect_type for card in cards if card.verdict == "missed"),
        notes=Notes(),
        image_threshold=image,
        curves=draw_curves(of_category, curves or {}, cards),
        training=draw_training(log) if log else [],
        no_training=no_log or "train_log.jsonl is empty.",
        cards=list(zip(shown, gallery, strict=True)),
        images=len(cards),
        no_gallery=no_images or "There are no test images.",
        only_good=only_good.is_only_good(of_category),
        threshold_lines=only_good.threshold_lines(of_category),
        predict_command=only_good.predict_command(results.get("command"), category),
        types=types,
        type_counts=Counter(card.defect_type for card in cards),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
        no_config=no_config,
        command=results.get("command"),
        run=results,
    )


def count_verdicts(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Returns the missed defective images and the false alarms, each as text: "1 of 8"."""
    rows, _ = read_optional(folder / "images.csv", parse_rows)
    threshold = shown_threshold(results, "image")
    if rows is None or threshold is None or only_good.is_only_good(results):
        return ["not available"] * 2
    counts = Counter((row["label"], row["score"] >= threshold) for row in rows)
    missed, alarms = counts[1, False], counts[0, True]
    return [f"{missed} of {missed + counts[1, True]}", f"{alarms} of {alarms + counts[0, False]}"]


def run_page(workdir: Path, results: Mapping[str, Any]) -> str:
    """Returns the page of all categories."""
    rows = [
        {
            "name": name,
            "link": urllib.parse.quote(name, safe="") + "/report.html",
            "results": category,
            "only_good": only_good.is_only_good(category),
            "verdicts": count_verdicts(workdir / name, category),
        }
        for name, category in results["categories"].items()
    ]
    return render(
        kind="run",
        title="All categories",
        headline=METRICS,
        rows=rows,
        notes=Notes(),
        command=results.get("command"),
        run=results,
    )


def render(template: str = "report.html.jinja", **values: Any) -> str:
    """Fills the template of a page with `values` and what all pages have."""
    return templates.render(
        template,
        verdict_names=VERDICTS,
        scale=colour_scale(),
        truth_colour=f"rgb{TRUTH}",
        prediction_colour=f"rgb{FOUND}",
        **values,
    )


def write_run(
    workdir: str | Path, *, max_cards: int = MAX_CARDS, max_bytes: int = MAX_GALLERY_BYTES
) -> None:
    """Writes `workdir`/report.html and the page of each category.

    Args:
      workdir: of a run with a results.json.
      max_cards: number of images of a category page, the worst ones.
      max_bytes: size of all pictures of a category page.

    Raises:
      ResultsError: results.json is missing or damaged; or, after all other pages are written, a
        line for each category whose page cannot be written.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    options = {"max_cards": max_cards, "max_bytes": max_bytes}
    errors = []
    for category in results["categories"]:
        try:
            (workdir / category).mkdir(exist_ok=True)
            page = category_page(workdir, results, category, **options)
            write_text(workdir / category / "report.html", page)
        except OSError as error:
            errors.append(f"{category}: its report.html cannot be written: {error}")
    write_text(workdir / "report.html", run_page(workdir, results))
    if errors:
        raise ResultsError("\n".join(errors))

"""HTML pages of a finished run, from its files alone: no model, no data, no network to view them.

`W/report.html` has all categories, `W/<category>/report.html` one with its curves and every test
image. Equal files make equal pages, byte for byte.
"""

import json
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils.epath import Path

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import (
    ResultsError,
    parse_json,
    read_images,
    read_optional,
    read_results,
)
from anoseg_jax.images.drawing import FOUND, colour_scale
from anoseg_jax.report import only_good, templates
from anoseg_jax.report.panels import TRUTH, draw_gallery, draw_strip
from anoseg_jax.report.plots import draw_curves, draw_training, types_of
from anoseg_jax.report.verdicts import (
    HIGHLIGHTS,
    VERDICTS,
    highlights,
    make_cards,
    shown_threshold,
    success_first,
    tally,
    threshold_lines,
)
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
    groups = highlights(cards) if arrays is not None else {}
    shown = success_first(cards)[:max_cards] if arrays is not None else []
    gallery = draw_gallery(shown, arrays, max_bytes) if shown else []
    counts = Counter(card.verdict for card in cards)
    # Without a threshold there are no verdicts: zeros would look like results.
    names = [name for name in VERDICTS if counts[name] or (image is not None and name != "none")]
    return render(
        kind="category",
        title=category,
        results=of_category,
        totals=Counter("defective" if card.label else "good" for card in cards),
        verdicts={name: counts[name] for name in names},
        tally=tally(counts),
        strips={name: draw_strip(group, arrays) for name, group in groups.items()},
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
        threshold_lines=threshold_lines(of_category),
        predict_command=only_good.predict_command(results.get("command"), category),
        types=types_of(cards),
        type_counts=Counter(card.defect_type for card in cards),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
        no_config=no_config,
        command=results.get("command"),
        run=results,
    )


def category_row(workdir: Path, name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page of all categories shows of one: verdicts, pictures and baselines."""
    rows, arrays, missing = read_images(workdir / name)
    cards = make_cards(rows or [], shown_threshold(results, "image"))
    counts = Counter(card.verdict for card in cards)
    groups = highlights(cards)
    wrong = [*groups.pop("missed", [])[:2], *groups.pop("false_alarm", [])[:1]]
    shown = [card for group in groups.values() for card in group][: HIGHLIGHTS - len(wrong)] + wrong
    if only_good.is_only_good(results):
        shown = cards[:HIGHLIGHTS]
    baselines = results.get("baselines", {}).values()
    return {
        "name": name,
        "link": urllib.parse.quote(name, safe="") + "/report.html",
        "results": results,
        "only_good": only_good.is_only_good(results),
        "tally": tally(counts),
        "counts": counts,
        "strip": draw_strip(shown, arrays),
        "no_strip": missing,
        "best_baseline": {
            metric: max((b[metric] for b in baselines if b[metric] is not None), default=None)
            for metric in (METRICS if baselines else ())
        },
    }


def run_page(workdir: Path, results: Mapping[str, Any], waiting: Mapping[str, str]) -> str:
    """Returns the page of all categories; `waiting` is that of `write_run`."""
    rows = [category_row(workdir, *category) for category in results["categories"].items()]
    total = sum((row["counts"] for row in rows if not row["only_good"]), Counter())
    return render(
        kind="run",
        title="All categories",
        rows=rows,
        waiting=waiting,
        tally=tally(total),
        notes=Notes(),
        command=results.get("command"),
        run=results,
    )


def render(template: str = "report.html.jinja", **values: Any) -> str:
    """Fills the template of a page with `values` and what all pages have."""
    return templates.render(
        template,
        headline=METRICS,
        verdict_names=VERDICTS,
        scale=colour_scale(),
        truth_colour=f"rgb{TRUTH}",
        prediction_colour=f"rgb{FOUND}",
        **values,
    )


def write_run(
    workdir: str | Path,
    *,
    categories: Sequence[str] | None = None,
    waiting: Mapping[str, str] | None = None,
    max_cards: int = MAX_CARDS,
    max_bytes: int = MAX_GALLERY_BYTES,
) -> None:
    """Writes `workdir`/report.html and the pages of categories.

    Args:
      workdir: of a run with a results.json.
      categories: those of results.json whose pages are written; None: all.
      waiting: categories that are not done yet or have failed, each with words that say so.
      max_cards: number of images of a category page.
      max_bytes: size of all pictures of a category page's gallery.

    Raises:
      ResultsError: results.json is missing or damaged; or, after all other pages are written, a
        line for each category whose page cannot be written.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    options = {"max_cards": max_cards, "max_bytes": max_bytes}
    errors = []
    for category in results["categories"]:
        if categories is not None and category not in categories:
            continue
        try:
            (workdir / category).mkdir(exist_ok=True)
            page = category_page(workdir, results, category, **options)
            write_text(workdir / category / "report.html", page)
        except OSError as error:
            errors.append(f"{category}: its report.html cannot be written: {error}")
    write_text(workdir / "report.html", run_page(workdir, results, waiting or {}))
    if errors:
        raise ResultsError("\n".join(errors))

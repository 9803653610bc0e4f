"""The HTML page of a comparison: images, differences, and the layout in a browser."""

import re
import shutil

import numpy as np
import pytest
from report_files import Page
from result_files import write_results

from anoseg_jax.evaluation import evaluate
from anoseg_jax.evaluation.results import write_evaluation
from anoseg_jax.report import compare, compare_page, plots

NUT = "nüt <b>#1"
# Of eight images, the second half defective: the scores of two programs, on different scales.
OURS = np.array([0.1, 0.2, 0.3, 0.4, 0.35, 0.6, 0.7, 0.8])
THEIRS = np.array([-50.0, 90.0, -40.0, -30.0, 80.0, -45.0, 70.0, 60.0])


def write_run(workdir, scores, *, category=NUT, miss=None, size=16):
    """Evaluates maps that find a square's upper half, one of them nothing."""
    masks = np.zeros((8, size, size), bool)
    masks[4:, 4:12, 4:12] = True
    maps = np.random.default_rng(0).random((8, size, size), np.float32) / 4
    maps[4:, 4:8, 4:12] += 1
    if miss is not None:
        maps[miss] = 0
    labels = np.array([0] * 4 + [1] * 4)
    types = np.where(labels, "<i>dent", "good")
    arrays = {
        "image": np.full((8, size, size, 3), 90, np.uint8),
        "mask": masks,
        "has_mask": np.ones(8, bool),
        "label": labels,
        "defect_type": types,
        "name": np.array([f"test/{kind}/{i}.png" for i, kind in enumerate(types)]),
    }
    evaluation = evaluate.evaluate_maps(
        maps, [arrays], scores=scores, maps_dir="M", image_size=(size, size), top_fraction=0.1
    )
    (workdir / category).mkdir(parents=True)
    write_evaluation(workdir / category, evaluation, arrays)
    write_results(workdir, category, evaluation.results, config="{}", command="c")
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "ours", OURS), write_run(root / "th<i>rs", THEIRS, miss=6)]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    compare_page.write(compare.compare(runs, bootstrap=20), folder)
    assert [path.name for path in folder.iterdir()] == ["comparison.html"]
    return folder / "comparison.html"


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "draw_plot", lambda plot: "<svg></svg>")


def test_ranks_are_from_0_to_1_and_ties_share_them():
    np.testing.assert_allclose(compare_page.ranks_of([5.0, -1.0, 5.0, 9.0]), [0.5, 0, 0.5, 1])
    assert compare_page.ranks_of([3.0]) == [0]


def test_gains_are_by_rank_and_by_iou(runs):
    baseline, other = (compare_page.read_category(run, NUT) for run in runs)
    images = {pair.cards[0].name[-5:-4]: pair for pair in compare_page.match(baseline, other)}
    # Image 1 is good, and rose from the second lowest rank of eight to the highest.
    assert images["1"].ranks == (pytest.approx(1 / 7), 1.0)
    assert compare_page.gain_by_score(images["1"]) == pytest.approx(-6 / 7)
    # Image 4 is defective, and rose from the fourth rank to the second highest.
    assert compare_page.gain_by_score(images["4"]) == pytest.approx(3 / 7)
    assert compare_page.gain_by_map(images["6"]) == pytest.approx(-0.5, abs=0.01)
    assert compare_page.gain_by_map(images["5"]) == pytest.approx(0, abs=0.01)
    # At the best thresholds, 0.35 and 60: ours is wrong about the 0.4 of image 3.
    assert images["3"].right == (False, True) and images["0"].right == (True, True)
    counts = compare_page.count_right(list(images.values()))
    assert counts == {"both": 5, "baseline": 2, "other": 1, "none": 0}


def test_the_images_farthest_apart_come_first(page):
    cards = Page(page).all("li", **{"class": "card"})
    names = {
        kind: [a["data-name"] for a in cards if a["data-kind"] == kind] for kind in ("score", "map")
    }
    assert names["score"][0] == "test/good/1.png" and len(names["score"]) == compare_page.SHOWN
    assert names["map"][0] == "test/<i>dent/6.png"
    text = Page(page).text
    assert "1. test/good/1.png better in ours" in text
    assert "both right 5, only ours 2, only th<i>rs 1, both wrong 0" in text
    pictures = Page(page).all("img", loading="lazy")
    assert len(pictures) == 6 * len(cards)
    assert {a["alt"] for a in pictures} >= {"image", "ours: anomaly map", "th<i>rs: found"}


def test_differences_and_their_intervals_are_those_of_the_comparison(page, runs):
    comparison = compare.compare(runs, bootstrap=20)
    for metric, entry in comparison["categories"][NUT]["differences"]["th<i>rs"].items():
        low, high = entry["interval"]
        mark = {"worse": "▼ ", "better": "▲ ", None: ""}[entry["clear"]]
        assert f"{mark}{entry['value']:+.4f} [{low:+.4f}, {high:+.4f}]" in Page(page).text, metric
    assert "Too narrow, because of few test images: nüt <b>#1 (4 good" in Page(page).text


def test_the_page_loads_nothing_and_names_are_text(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        for key in ("src", "href", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:")), tag
    assert not parsed.all("script") and "default-src 'none'" in str(parsed.all("meta"))
    for markup in ("<b>#1", "th<i>rs", "<i>dent"):
        assert markup not in parsed.source and markup in parsed.text
    assert not re.search(r"\b(None|nan|Undefined)\b", parsed.text)


@pytest.mark.usefixtures("no_plots")
def test_what_cannot_be_compared_is_said(runs, tmp_path):
    ours, theirs = (shutil.copytree(run, tmp_path / run.name) for run in runs)
    (ours / NUT / "evaluation.npz").unlink()
    rows = (theirs / NUT / "images.csv").read_text().splitlines()
    (theirs / NUT / "images.csv").write_text("\n".join(rows[:-1]))
    compare_page.write(compare.compare([ours, theirs], bootstrap=5), tmp_path)
    parsed = Page(tmp_path / "comparison.html")
    assert "ours: evaluation.npz is not there." in parsed.text
    assert "th<i>rs: evaluation.npz has 8 images and images.csv 7. --mode=evaluate" in parsed.text
    assert "1 images only in ours, 0 only in th<i>rs: of the 7 that both have" in parsed.text
    assert "histograms.npz has 8 images" in parsed.text  # why there is no interval
    assert parsed.all("li", **{"class": "card"}) and not parsed.all("img")
    compare_page.write(compare.compare([runs[0]] * 3, bootstrap=5), tmp_path)
    assert "The two agree on every image" in Page(tmp_path / "comparison.html").text


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(page, open_page, width):
    shown = open_page(page, width)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width

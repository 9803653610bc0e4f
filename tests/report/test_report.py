"""The HTML pages of a run: their content and its order."""

import json
import re

import numpy as np
import pytest
from report_files import (
    CRACK,
    IMAGES,
    NUT,
    ORDER,
    WEAVE,
    Page,
    change_results,
    metrics,
    thresholds,
    write_csv,
)

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import ResultsError
from anoseg_jax.report import pages, verdicts


def test_the_run_lists_every_category_and_links_to_its_page(written_pages, workdir):
    page = written_pages["."]
    assert NUT in page.text and WEAVE in page.text and "Mean" in page.text
    links = [a["href"] for a in page.all("a") if a["href"].endswith("report.html")]
    assert links == ["n%C3%BCt%20%3Cb%3E%231%20%2520/report.html", "weave/report.html"] * 2


def test_the_run_shows_verdicts_and_pictures_before_metrics(written_pages):
    page = written_pages["."]
    assert "this run finds 3 of 5 defective parts and flags 1 of 3 good parts" in page.text
    counts = page.text.index("Missed defects: 2 of 5 False alarms: 1 of 3")
    assert counts < page.text.index("Found: dent") < page.text.index("Pixel AUROC")
    assert [a["class"] for a in page.all("li") if "class" in a] == ["fine"] * 3 + ["bad"] * 3
    assert [a["alt"] for a in page.all("img")][:12] == [
        alt for truth in ["truth"] * 5 + ["truth: no defect"] for alt in (truth, "anomaly map")
    ]
    assert "No pictures: evaluation.npz is not there." in page.text


def test_a_category_begins_with_what_was_found_then_what_was_not(written_pages):
    text = written_pages[NUT].text
    titles = ("finds 3 of 5 defective parts", "Defects that were found: 3 of 5")
    titles += ("Missed defects: 2 of 5", "False alarms: 1 of 3", "Metrics Image AUROC")
    assert sorted(titles, key=text.index) == list(titles)
    shown = [a["title"] for a in written_pages[NUT].all("a") if "#image-" in a["href"]]
    # One of each defect type before the second of any.
    assert shown == [IMAGES[i][0] for i in (4, 7, 5, 3, 6, 0)]
    cards = {a["id"] for a in written_pages[NUT].all("li", **{"class": "card"})}
    assert cards == {f"image-{index}" for index in range(len(IMAGES))}


@pytest.mark.usefixtures("no_plots")
def test_a_map_that_has_nothing_of_the_defect_is_no_success(copy):
    rows = [(*row[:4], 0.0 if row[2] else row[4]) for row in IMAGES]
    write_csv(copy / NUT / "images.csv", rows, has_mask=True)
    pages.write_run(copy)
    text = Page(copy / NUT / "report.html").text
    assert text.index("Missed defects: 2 of 5") < text.index("Defects that were found: 3 of 5")


@pytest.mark.usefixtures("no_plots")
def test_what_is_not_done_is_marked_and_only_the_pages_asked_for_are_written(copy):
    before = (copy / NUT / "report.html").read_bytes()
    (copy / NUT / "report.html").write_bytes(b"as it was")
    waiting = {WEAVE: "failed: <disk> full", "zipper": "not done yet"}
    pages.write_run(copy, categories=[WEAVE, "zipper"], waiting=waiting)
    assert (copy / NUT / "report.html").read_bytes() == b"as it was" != before
    page = Page(copy / "report.html")
    assert "zipper not done yet" in page.text and "2 categories" in page.text
    assert "failed: <disk> full; what is shown is of the last evaluation that ended" in page.text
    assert not (copy / "zipper").exists()


def test_metrics_and_losses_have_full_names_and_explanations(written_pages):
    for page in written_pages.values():
        ids = {a["id"] for _, a in page.elements if a.get("id", "").startswith("name-")}
        links = {a["href"][1:]: a["title"] for a in page.all("a") if "#name-" in a["href"]}
        assert links.keys() <= ids and all(": " in title for title in links.values())
    assert "area under the ROC curve of images: how often" in written_pages["."].text
    (legend,) = written_pages[NUT].all("div", **{"class": "legend"})
    assert legend["title"].startswith("segmentation loss: difference between the anomaly map")


def test_what_is_null_has_its_reason_and_is_no_number(written_pages):
    run, weave, nut = written_pages["."], written_pages[WEAVE], written_pages[NUT]
    assert run.text.count("not available") >= 6
    for reason in ("no masks", "no defective images"):
        assert reason in run.text and reason in weave.text
    assert "the mean is of the 1 of 2 categories that have a number" in run.text
    assert "no masks of <this> type" in nut.text
    for page in written_pages.values():
        notes = {a["id"] for a in page.all("li") if a.get("id", "").startswith("note-")}
        assert {a["href"][1:] for a in page.all("a") if "note-" in a["href"]} <= notes
        assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


def test_the_headline_and_defect_types_are_there(written_pages):
    page = written_pages[NUT]
    assert page.text.count("0.7500") >= 9
    for name in ("dent", CRACK, "Found", "Passed", "How it was made", "cafe", "beef"):
        assert name in page.text
    assert "8 test images: 3 good, 5 defective" in page.text
    assert "1 min 15 s of training" in page.text
    assert len(page.all("svg")) == 8


def test_pages_load_nothing(written_pages):
    for page in written_pages.values():
        references = [
            attributes[key]
            for tag, attributes in page.elements
            for key in ("src", "href", "xlink:href", "srcset", "poster", "action", "data")
            if key in attributes
        ]
        references += re.findall(r"url\(['\"]?([^)]*)", page.source)
        references += re.findall(r"@import[^;]*", page.source)
        allowed = ("data:", "#", "../report.html")
        local = [r for r in references if not r.startswith(allowed)]
        assert all(r.endswith("/report.html") and ":" not in r for r in local)
        assert "default-src 'none'" in str(page.all("meta"))


def test_the_gallery_has_every_image_successes_first_then_the_worst(written_pages):
    cards = written_pages[NUT].all("li", **{"class": "card"})
    assert [card["data-name"] for card in cards] == [IMAGES[i][0] for i in ORDER]
    verdicts = "found found found false_alarm missed missed passed passed".split()
    assert [card["data-verdict"] for card in cards] == verdicts
    assert "The best of the found defects come first. Then come wrong" in written_pages[NUT].text
    pictures = [a for a in written_pages[NUT].all("img") if a.get("loading") == "lazy"]
    assert len(pictures) == 4 * len(IMAGES)
    assert all(a["src"].startswith("data:image/jpeg;base64,") for a in pictures)
    assert {(a["width"], a["height"]) for a in pictures} == {("288", "192")}


def test_names_are_text_and_no_markup(written_pages):
    for page in written_pages.values():
        for markup in ("<b>riß", "<b>#1", "<i>0", "<x>", "<cpu>", "<this>", '"<script>"'):
            assert markup not in page.source
    assert CRACK in written_pages[NUT].text and "crack/<i>0.png" in written_pages[NUT].text
    assert '"data_dir": "<script>"' in written_pages[NUT].text
    assert "python launch.py --config=<x> && true" in written_pages[NUT].text


def test_equal_files_make_equal_pages(workdir, copy):
    names = ("report.html", f"{NUT}/report.html", f"{WEAVE}/report.html")
    for name in names:
        (copy / name).unlink()
    pages.write_run(copy)
    for name in names:
        assert (copy / name).read_bytes() == (workdir / name).read_bytes()
    assert not list(copy.rglob("*.tmp*"))


def test_sections_say_which_file_is_missing_or_damaged(written_pages, copy):
    how = "No pictures: evaluation.npz is not there. --mode=evaluate writes it. Of variants and"
    assert how in written_pages[WEAVE].text
    assert "with --config.evaluate.store_all_maps=True" in written_pages[WEAVE].text
    assert "No training curves: train_log.jsonl is not there." in written_pages[WEAVE].text
    assert "No options: config.json is not there." in written_pages[WEAVE].text
    (copy / NUT / "evaluation.npz").write_bytes(b"PK damaged")
    (copy / NUT / "train_log.jsonl").write_text("")
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    assert "evaluation.npz cannot be read" in page.text
    assert "train_log.jsonl is empty" in page.text
    for name in ("images.csv", "evaluation.npz", "curves.json", "train_log.jsonl", "config.json"):
        (copy / NUT / name).unlink()
    pages.write_run(copy)
    assert "images.csv is not there" in Page(copy / NUT / "report.html").text


@pytest.mark.usefixtures("no_plots")
def test_files_of_another_version_give_a_page_that_says_what_to_do(copy):
    path = copy / "results.json"
    results = json.loads(path.read_text())
    for category in results["categories"].values():
        del category["shown_thresholds"], category["thresholds"]
    path.write_text(json.dumps(results))
    with np.load(copy / NUT / "evaluation.npz") as arrays:
        old = {name: arrays[name] for name in ("image", "mask", "map")}
    np.savez(copy / NUT / "evaluation.npz", **old)
    pages.write_run(copy)
    text = Page(copy / NUT / "report.html").text
    assert "evaluation.npz cannot be read" in text and "--mode=evaluate writes it" in text
    assert "Without a verdict: 8 of 8" in text


@pytest.mark.usefixtures("no_plots")
def test_images_and_pictures_of_different_evaluations_are_not_mixed(copy):
    write_csv(copy / NUT / "images.csv", IMAGES[:3], has_mask=True)
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    assert "evaluation.npz has 8 images and images.csv 3" in page.text
    assert not page.all("li", **{"class": "card"})


def test_no_test_images_at_all_is_a_page(copy):
    write_csv(copy / NUT / "images.csv", (), has_mask=True)
    empty = {name: np.zeros((0, 4, 4), np.uint8) for name in ("image", "mask", "map", "region")}
    np.savez(copy / NUT / "evaluation.npz", **empty)
    pages.write_run(copy)
    assert "There are no test images." in Page(copy / NUT / "report.html").text


@pytest.mark.usefixtures("no_plots")
def test_without_a_threshold_nothing_counts_as_missed_or_found(written_pages, copy):
    assert "Missed defects" not in written_pages[WEAVE].text
    assert "Without a verdict: 1 of 1" in written_pages[WEAVE].text
    change_results(copy, NUT, **thresholds(image=None, region=0.6))
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    cards = page.all("li", **{"class": "card"})
    # By 1 - IoU; of equal ones good images from the highest score, defective from the lowest.
    assert [card["data-name"] for card in cards] == [IMAGES[i][0] for i in (0, 2, 3, 5, 7, 6, 4, 1)]
    assert "There is no image threshold, and so no verdict." in page.text


def test_scores_that_are_not_finite_get_no_verdict(copy):
    rows = [(name, kind, label, "nan", iou) for name, kind, label, _, iou in IMAGES]
    write_csv(copy / NUT / "images.csv", rows, has_mask=True)
    pages.write_run(copy)
    cards = Page(copy / NUT / "report.html").all("li", **{"class": "card"})
    assert {card["data-verdict"] for card in cards} == {"none"}


@pytest.mark.usefixtures("no_plots")
def test_recorded_thresholds_decide_and_are_said_once(copy):
    entries = thresholds(image=0.15, region=0.9)
    recorded = {"how": "unused", "rate": 0.05, "images": 20}
    entries["thresholds"]["image"] = recorded | {"threshold": 0.15}
    measured = {"recall": 0.5, "good_images_flagged": 0.25}
    entries["thresholds"]["pixel"] = recorded | measured | {"threshold": 0.2}
    change_results(copy, NUT, **entries, warnings=["the image threshold is <odd>"])
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    for line in (
        "defective from 0.15 on: this flags at most 1 of 20 good parts, by 20 good",
        "In new photographs, a pixel is marked from 0.2 on: this marks at most 1 of 20 pixels of",
        "on test images, 50% of the defects' pixels, and at least one pixel on 25% of the good",
        "In the pictures of these results, a pixel is marked from 0.9 on: best IoU.",
    ):
        assert page.text.count(line) == 1
    assert page.text.count("from 0.15 on") == 1 and "best F1" not in page.text
    assert "Warning: the image threshold is <odd>." in page.text
    cards = {a["data-name"]: a["data-verdict"] for a in page.all("li", **{"class": "card"})}
    assert cards["dent/0.png"] == "found" and cards["good/2 & ü.png"] == "false_alarm"
    # As images.csv has it, which is measured at the threshold of the region.
    assert "dent · score 0.200 · IoU 0.100" in page.text


@pytest.mark.parametrize(
    ("rate", "images", "words"),
    [
        (0.03, 100, "this flags at most 3 of 100 good parts, by 100 good photographs"),
        (0.05, 12, "above all 12 good photographs, too few to allow 1 of 20"),
    ],
)
def test_a_threshold_is_explained_by_what_it_flags(rate, images, words):
    chosen = {"threshold": 4.0, "how": "unused", "rate": rate, "images": images}
    results = {"thresholds": {"image": chosen}, "shown_thresholds": {"image": chosen}}
    (line,) = verdicts.threshold_lines(results)
    assert line == f"A photograph counts as defective from 4 on: {words}"
    results["shown_thresholds"] = {"image": {"threshold": 3.0, "how": "set by the user"}}
    assert verdicts.threshold_lines(results)[0].endswith("from 3 on: set by the user")


def test_one_pixel_threshold_for_all_is_said_once():
    chosen = {"threshold": 0.5, "how": "set by the user"}
    results = {"thresholds": {"pixel": chosen}, "shown_thresholds": {"region": chosen}}
    assert verdicts.threshold_lines(results) == ["A pixel is marked from 0.5 on: set by the user"]
    assert not verdicts.threshold_lines({})


@pytest.mark.usefixtures("no_plots")
def test_a_page_that_cannot_be_written_costs_no_other(copy):
    page = copy / NUT / "report.html"
    page.unlink()
    page.mkdir()
    (copy / WEAVE / "report.html").unlink()
    with pytest.raises(ResultsError, match=f"^{re.escape(NUT)}: its report.html cannot be wr"):
        pages.write_run(copy)
    assert (copy / WEAVE / "report.html").exists()


@pytest.mark.usefixtures("no_plots")
def test_the_model_is_marked_where_a_baseline_is_better(copy):
    better = metrics(0.8, {"au_pro": "no masks"}) | {"iou": 0.2}
    change_results(copy, NUT, baselines={"z_score": better, "pca": metrics(0.7, {})})
    pages.write_run(copy)
    run, page = Page(copy / "report.html"), Page(copy / NUT / "report.html")
    assert "Against trivial baselines" in page.text and "z score" in page.text
    assert "best trivial method 0.8000 0.8000 0.8000 0.7000 0.8000 0.7000" in run.text
    # 0.75 is below 0.8, but not where the best baseline has 0.7.
    assert page.text.count("▼ 0.7500") == run.text.count("▼ 0.7500") == len(METRICS) - 2
    without = metrics(0.5, dict.fromkeys(METRICS, "no test images"))
    change_results(copy, NUT, baselines={"z_score": without})
    pages.write_run(copy)
    assert "▼ 0" not in Page(copy / NUT / "report.html").text


@pytest.mark.usefixtures("no_plots")
def test_maps_of_another_method_have_a_page_without_a_model(copy):
    nothing = ("params_sha256", "steps", "train_seconds", "parameters", "flops_per_image")
    scale = {"scores": [-3.0, 40.0], "levels": [0.0, 1.0]}
    entries = thresholds(image=0.5, region=18.5)
    entries["shown_thresholds"]["region"]["level"] = 0.5
    change_results(
        copy, NUT, **dict.fromkeys(nothing), maps_dir="<maps>", map_scale=scale, **entries
    )
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    assert "of another method, from <maps>" in page.text
    assert "Scores from -3 to 40 are shown from 0 to 1" in page.text
    assert "is marked from 18.5 on: best IoU" in page.text and 'style="left:50.0%"' in page.source
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


@pytest.mark.usefixtures("no_plots")
def test_a_large_gallery_stays_small(copy):
    rng = np.random.default_rng(0)
    count = 40
    noise = rng.integers(0, 256, (count, 64, 64, 3), np.uint8)
    masks = np.zeros((count, 64, 64), bool)
    arrays = {"image": noise, "mask": masks, "map": noise[..., 0], "region": masks}
    np.savez(copy / NUT / "evaluation.npz", **arrays)
    rows = [(f"good/{i:03}.png", "good", 0, i / count, None) for i in range(count)]
    write_csv(copy / NUT / "images.csv", rows, has_mask=True)
    pages.write_run(copy, max_cards=30, max_bytes=400_000)
    page = Page(copy / NUT / "report.html")
    cards = page.all("li", **{"class": "card"})
    assert len(cards) == 30 and cards[0]["data-name"] == "good/039.png"
    assert "30 of 40 images are shown." in page.text
    assert sum(len(a["src"]) for a in page.all("img", loading="lazy")) < 400_000


def test_errors_are_one_line_that_names_the_file(tmp_path, copy):
    with pytest.raises(ResultsError, match=f"{tmp_path} has no results.json; run --mode=train"):
        pages.write_run(tmp_path)
    for content in ("[]", "{", '{"mean": {}}'):
        (copy / "results.json").write_text(content)
        with pytest.raises(ResultsError, match="results.json") as error:
            pages.write_run(copy)
        assert "\n" not in str(error.value)

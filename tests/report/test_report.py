"""The HTML pages of a run: their content, its order, and how they work in a browser."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from anoseg_jax.evaluation.metrics import METRICS
from anoseg_jax.evaluation.results import ResultsError, mean_of
from anoseg_jax.report import pages, plots

NUT, WEAVE = "nüt <b>#1 %20", "weave"
CRACK = "<b>riß</b> $x$ 裂"
# name, defect type, label, score, IoU: the image threshold is 0.5.
IMAGES = (
    ("good/0.png", "good", 0, 0.9, 0.0),
    ("good/1.png", "good", 0, 0.1, None),
    ("good/2 & ü.png", "good", 0, 0.2, 0.0),
    ("dent/0.png", "dent", 1, 0.2, 0.1),
    ("dent/1.png", "dent", 1, 0.8, 0.9),
    ("dent/2.png", "dent", 1, 0.7, 0.3),
    ("crack/<i>0.png", CRACK, 1, 0.45, 0.9),
    ("crack/1.png", CRACK, 1, 0.6, 0.4),
)
# Wrong verdicts by distance from the threshold, then by 1 - IoU, without an IoU last.
WORST_FIRST = (0, 3, 6, 2, 5, 7, 4, 1)


def metrics(value, reasons):
    names = (*METRICS, "image_ap", "image_f1_max", "au_pro_0.05")
    numbers = {name: None if name in reasons else value for name in names}
    return numbers | {"not_available": reasons}


def thresholds(image, region):
    """Returns the entries of results.json: no threshold from good images, those of the test set."""
    how = "none: too few good images"
    return {
        "thresholds": {kind: {"threshold": None, "how": how} for kind in ("pixel", "image")},
        "shown_thresholds": {
            "image": {"threshold": image, "how": "best F1 <of> the test images"},
            "region": {"threshold": region, "level": region, "how": "best IoU"},
        },
    }


def write_csv(path, images, *, has_mask):
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("name", "defect_type", "label", "score", "has_mask", "iou"))
        writer.writerows((*row[:4], has_mask, row[4]) for row in images)


def write_files(workdir):
    """Writes a run of two categories: one with all files, one with few."""
    nut, weave = workdir / NUT, workdir / WEAVE
    for folder in (nut, weave):
        folder.mkdir(parents=True)
    maps = np.zeros((8, 16, 24), np.uint8)
    maps[:, 4:8, 4:8] = 255
    arrays = {"image": np.full((8, 16, 24, 3), 90, np.uint8), "mask": maps > 0, "map": maps}
    arrays["mask"][:3] = False
    arrays["region"] = maps > 0
    np.savez_compressed(nut / "evaluation.npz", **arrays)
    write_csv(nut / "images.csv", IMAGES, has_mask=True)
    line = {"x": [0.0, 0.2, 1.0], "y": [0.0, 0.7, 1.0]}
    axes = {
        "roc": ("false_positive_rate", "true_positive_rate"),
        "pr": ("recall", "precision"),
        "pro": ("false_positive_rate", "overlap"),
        "iou": ("threshold", "iou"),
        "image_roc": ("false_positive_rate", "true_positive_rate"),
        "image_pr": ("recall", "precision"),
    }
    curves = {name: {x: line["x"], y: line["y"]} for name, (x, y) in axes.items()}
    (nut / "curves.json").write_text(json.dumps(curves))
    log = [{"step": s, "loss_segmentation": 1 / s, "learning_rate": 1e-3} for s in (1, 2, 3)]
    lines = [json.dumps(entry | {"loss_adversarial": None}) + "\n" for entry in log]
    (nut / "train_log.jsonl").write_text("".join(lines) + '{"step": 4, "los')
    (nut / "config.json").write_text(json.dumps({"batch_size": 4, "data_dir": "<script>"}))

    write_csv(weave / "images.csv", [("good/0.png", "good", 0, 0.5, None)], has_mask=False)
    (weave / "curves.json").write_text("{}")
    both = {"params_sha256": "cafe", "train_seconds": 75.0, "steps": 3, "test_images": 8}
    of_nut = metrics(0.75, {}) | both
    of_nut |= thresholds(image=0.5, region=0.6)
    of_nut["defect_types"] = {
        "dent": {"images": 3} | metrics(0.5, {}),
        CRACK: {"images": 2} | metrics(0.5, {"au_pro": "no masks of <this> type"}),
    }
    pixel = {name: "no masks" for name in METRICS if name != "image_auroc"}
    image = dict.fromkeys(("image_auroc", "image_ap", "image_f1_max"), "no defective images")
    of_weave = metrics(0.25, pixel | image | {"au_pro_0.05": "no masks"}) | both
    of_weave |= thresholds(image=None, region=None) | {"defect_types": {}}
    categories = {NUT: of_nut, WEAVE: of_weave}
    results = {
        "categories": categories,
        "mean": mean_of(categories),
        "command": "python launch.py --config=<x> && true",
        "config_sha256": "beef",
        "versions": {"python": "3.11", "jax": "0.10"},
        "device": "1 x <cpu>",
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def change_results(workdir, category, **changes):
    path = workdir / "results.json"
    results = json.loads(path.read_text())
    results["categories"][category] |= changes
    path.write_text(json.dumps(results))


class Page(HTMLParser):
    """A parsed page: its elements and its text; fails on elements that are not closed."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.words = [], [], []
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def all(self, tag, **wanted):
        matches = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in matches if all(a.get(key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = write_files(tmp_path_factory.mktemp("run") / "W")
    pages.write_run(workdir)
    return workdir


@pytest.fixture(scope="module")
def written_pages(workdir):
    return {name: Page(workdir / name / "report.html") for name in (".", NUT, WEAVE)}


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "copy")


@pytest.fixture
def no_plots(monkeypatch):
    """Leaves the plots out, which take most of the time."""
    monkeypatch.setattr(plots, "draw_plot", lambda plot: "<svg></svg>")


def test_the_run_lists_every_category_and_links_to_its_page(written_pages, workdir):
    page = written_pages["."]
    assert NUT in page.text and WEAVE in page.text and "Mean" in page.text
    links = [a["href"] for a in page.all("a") if a["href"].endswith("report.html")]
    assert links == ["n%C3%BCt%20%3Cb%3E%231%20%2520/report.html", "weave/report.html"]
    assert "1 of 5" not in page.text and "2 of 5" in page.text and "1 of 3" in page.text


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
    for name in ("dent", CRACK, "Missed", "False alarm", "How it was made", "cafe", "beef"):
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


def test_the_gallery_has_every_image_the_worst_first(written_pages):
    cards = written_pages[NUT].all("li", **{"class": "card"})
    assert [card["data-name"] for card in cards] == [IMAGES[i][0] for i in WORST_FIRST]
    verdicts = "false_alarm missed missed passed found found found passed".split()
    assert [card["data-verdict"] for card in cards] == verdicts
    assert "Wrong verdicts come first" in written_pages[NUT].text
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
    assert "No verdict 8" in text


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
    assert "Missed" not in written_pages[WEAVE].text and "No verdict 1" in written_pages[WEAVE].text
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
def test_recorded_thresholds_decide_and_say_how_they_were_made(copy):
    how = "the 0.99 quantile of 20 held-out good images"
    entries = thresholds(image=0.15, region=0.9)
    entries["shown_thresholds"]["image"]["how"] = how
    for kind in ("image", "pixel"):
        entries["thresholds"][kind] = {"threshold": 0.15, "how": how, "false_positive_rate": 0.01}
    change_results(copy, NUT, **entries, warnings=["the image threshold is <odd>"])
    pages.write_run(copy)
    page = Page(copy / NUT / "report.html")
    assert page.text.count(how) == 2 and "best F1" not in page.text
    assert "false positive rate: 0.01" in page.text and "map at or above 0.9, best IoU" in page.text
    assert "Warning: the image threshold is <odd>." in page.text
    cards = {a["data-name"]: a["data-verdict"] for a in page.all("li", **{"class": "card"})}
    assert cards["dent/0.png"] == "found" and cards["good/2 & ü.png"] == "false_alarm"
    # As images.csv has it, which is measured at the threshold of the region.
    assert "dent · score 0.200 · IoU 0.100" in page.text


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
    page = Page(copy / NUT / "report.html")
    assert "Against trivial baselines" in page.text and "z score" in page.text
    # 0.75 is below 0.8, but not where the best baseline has 0.7.
    assert page.text.count("▼ 0.7500") == len(METRICS) - 2
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
    assert "map at or above 18.5" in page.text and 'style="left:50.0%"' in page.source
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
    assert "the 30 worst of 40 images" in page.text
    assert sum(len(a["src"]) for a in page.all("img", loading="lazy")) < 400_000


def test_errors_are_one_line_that_names_the_file(tmp_path, copy):
    with pytest.raises(ResultsError, match=f"{tmp_path} has no results.json; run --mode=train"):
        pages.write_run(tmp_path)
    for content in ("[]", "{", '{"mean": {}}'):
        (copy / "results.json").write_text(content)
        with pytest.raises(ResultsError, match="results.json") as error:
            pages.write_run(copy)
        assert "\n" not in str(error.value)


@pytest.fixture
def open_page(browser):
    """Opens pages in a window of a width; none may complain or ask for anything."""
    messages, contexts = [], []

    def open_page(path, width):
        context = browser.new_context(viewport={"width": width, "height": 844})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [line for line in messages if not line.startswith(("file:", "data:"))]


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window_and_are_quiet(workdir, open_page, width):
    for folder in (".", NUT):
        page = open_page(workdir / folder / "report.html", width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width


def test_the_links_between_pages_lead_there(workdir, open_page):
    page = open_page(workdir / "report.html", 1280)
    page.get_by_role("link", name=NUT).click()
    assert page.get_by_role("heading", level=1).inner_text() == NUT
    page.get_by_role("link", name="All categories").click()
    assert page.get_by_role("heading", level=1).inner_text() == "2 categories"


def test_filters_choose_cards_by_mouse_and_by_keyboard(workdir, open_page):
    page = open_page(workdir / NUT / "report.html", 1280)
    shown = page.locator(".card:visible")
    assert shown.count() == 8
    page.locator("label", has_text="Missed").click()
    assert [card.get_attribute("data-name") for card in shown.all()] == [
        "dent/0.png",
        "crack/<i>0.png",
    ]
    assert page.get_by_role("status").inner_text() == "2 of 8 images shown"
    page.locator("input[name=type]").first.focus()
    page.keyboard.press("ArrowRight")  # good
    assert page.get_by_role("status").inner_text() == "0 of 8 images shown"
    page.keyboard.press("ArrowRight")  # the first defect type
    assert shown.count() == 1
    page.locator("input[name=verdict]:checked").focus()
    page.keyboard.press("ArrowLeft")  # all verdicts
    assert shown.count() == 2
    image = shown.first.locator("img").first
    image.scroll_into_view_if_needed()
    page.wait_for_function("image => image.naturalWidth == 288", arg=image.element_handle())


def test_print_shows_everything(workdir, open_page):
    page = open_page(workdir / NUT / "report.html", 1280)
    page.locator("input[value=missed]").check()
    page.emulate_media(media="print")
    assert page.locator(".card:visible").count() == 8
    assert not page.locator("#filters").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("pre").is_visible()
    page.wait_for_function("[...document.images].every(image => image.naturalWidth > 0)")

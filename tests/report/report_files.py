"""Files of a small run, and a parser of its pages."""

import csv
import json
from html.parser import HTMLParser

import numpy as np

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import mean_of

NUT, WEAVE = "nüt <b>#1 %20", "weave"
CRACK = "<b>riß</b> $x$ 裂"
# name, defect type, label, score, IoU: the image threshold is 0.5.
IMAGES = (
    ("good/0.png", "good", 0, 0.9, 0.0),
    ("good/1.png", "good", 0, 0.1, None),
    ("good/2 & ü.png", "good", 0, 0.2, 0.0),
    ("dent/0.png", "dent", 1, 0.2, 0.1),
    ("dent/1.png", "dent", 1, 0.8, 0.9),
    ("dent/" + 60 * "2" + ".png", "dent", 1, 0.7, 0.3),
    ("crack/<i>0.png", CRACK, 1, 0.45, 0.9),
    ("crack/1.png", CRACK, 1, 0.6, 0.4),
)
# What was found, one of each type before a second; wrong verdicts by distance from the threshold;
# then by 1 - IoU, without an IoU last.
ORDER = (4, 7, 5, 0, 3, 6, 2, 1)


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
    rates, recall = ("false_positive_rate", "true_positive_rate"), ("recall", "precision")
    axes = {"roc": rates, "image_roc": rates, "pr": recall, "image_pr": recall}
    axes |= {"pro": ("false_positive_rate", "overlap"), "iou": ("threshold", "iou")}
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

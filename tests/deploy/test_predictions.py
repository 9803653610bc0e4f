"""--mode=predict: its table, maps, overlays and page, over files that come and files that break."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from part_images import draw_part
from PIL import Image

from anoseg_jax.deploy.photographs import Photographs
from anoseg_jax.deploy.predictions import predict
from anoseg_jax.deploy.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments):
    return [sys.executable, str(ROOT / "launch.py"), "--mode=predict", *map(str, arguments)]


def predict_folder(predictor, folder, out, **options):
    return predict(predictor, Photographs([str(folder)], exclude=out), out, **options)


def read_rows(out):
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as table:
        return {row["file"]: row for row in csv.DictReader(table)}


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor(workdir, pixel_threshold=0.01)


def test_one_command_writes_table_maps_overlays_and_page(workdir, photographs, tmp_path):
    (photographs / "monday" / "broken.png").write_bytes(b"no image")
    (photographs / "notes.txt").write_text("no image either")
    (photographs / "camera.raw").write_bytes(b"no image")
    out, blocked = tmp_path / "out", tmp_path / "blocked"
    blocked.mkdir()
    for name in ("tensorflow", "sklearn", "matplotlib", "clu", "optax"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    thresholds = {"pixel_threshold": 0.01, "image_threshold": 0.0}
    flags = [f"--{name}={value}" for name, value in thresholds.items()]
    done = subprocess.run(
        command(f"--workdir={workdir}", f"--out={out}", *flags, photographs),
        env=os.environ | {"PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "6 of 6 images" in done.stdout and "1 unreadable" in done.stdout
    assert "skipped 1 files that are no images: camera.raw" in done.stderr
    rows = read_rows(out)
    assert len(rows) == 6
    broken = rows.pop(str(photographs / "monday" / "broken.png"))
    assert broken["verdict"] == "unreadable" and broken["error"].startswith("is not an image")
    ranked = sorted(rows, key=lambda name: -float(rows[name]["score"]))
    names = ", ".join(str(Path(name).relative_to(photographs)) for name in ranked)
    assert f"defective, the highest score first: {names}\n" in done.stdout
    expected = Predictor(workdir, **thresholds)(photographs / "monday" / "a.png")
    row = rows[str(photographs / "monday" / "a.png")]
    assert float(row["score"]) == pytest.approx(expected.score, rel=1e-7)
    assert float(row["threshold"]) == pytest.approx(expected.thresholds.image)
    assert row["verdict"] == expected.verdict
    regions = json.loads(row["regions"])
    assert len(regions) == min(20, int(row["num_regions"])) == min(20, len(expected.regions))
    largest = expected.regions[0]
    assert regions[0] == {"area": largest.area, "box": list(largest[1:])}
    stored = np.asarray(Image.open(out / "maps" / "monday" / "a.png.png"))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored / 65535, expected.anomaly_map, atol=1e-5)
    assert Image.open(out / "overlays" / "monday" / "a.png.jpg").size == (60, 40)
    page = (out / "report.html").read_text()
    assert "monday/a.png" in page and "monday/broken.png" in page and page.count("<li class") == 5
    assert "http" not in page.replace("http-equiv", "")


def test_files_folders_and_patterns_have_names_of_their_own(predictor, photographs, tmp_path):
    out = tmp_path / "out"
    arguments = [
        str(photographs / "monday" / "a.png"),
        str(photographs / "tuesday"),
        str(photographs / "*" / "*.png"),
    ]
    assert predict(predictor, Photographs(arguments), out)
    written = sorted(str(path.relative_to(out / "maps")) for path in out.rglob("*.png"))
    assert written == [
        "monday/a.png.png",
        "tuesday/a.png.png",
        "tuesday/c.bmp.png",
        "tuesday/d e ü.tif.png",
    ]
    assert len(read_rows(out)) == 4


def test_the_results_are_not_taken_for_photographs_and_names_may_be_long(
    predictor, photographs, tmp_path
):
    Image.fromarray(draw_part(0)).save(photographs / f"{'x' * 240}.png")
    out = photographs / "results"
    assert predict_folder(predictor, photographs, out)
    assert predict_folder(predictor, photographs, out)
    assert len(read_rows(out)) == 6
    assert len(list((out / "maps").rglob("*.png"))) == 6


def test_maps_are_written_for_those_that_are_asked_for(workdir, photographs, tmp_path):
    scores = [prediction.score for prediction in Predictor(workdir)(photographs)]
    middle = Predictor(workdir, image_threshold=float(np.median(scores)))
    assert predict_folder(middle, photographs, tmp_path, maps="defective")
    rows = read_rows(tmp_path)
    assert [row["verdict"] for row in rows.values()].count("defective") == 3
    assert len(list((tmp_path / "maps").rglob("*.png"))) == 3
    assert predict_folder(middle, photographs, tmp_path, maps="none")
    assert not list((tmp_path / "maps").rglob("*.png"))


def test_the_page_has_defective_photographs_first(workdir, photographs, tmp_path):
    predictor = Predictor(workdir)
    assert predict_folder(predictor, photographs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    by_score = sorted(predictor(photographs), key=lambda prediction: -prediction.score)
    names = [os.path.relpath(prediction.name, photographs) for prediction in by_score]
    places = [page.index(f"<h3><span>{name}</span>") for name in names]
    assert places == sorted(places)


def test_without_an_image_threshold_there_are_scores_and_it_is_said(
    predictor, photographs, tmp_path, capsys
):
    none = predictor.thresholds._replace(image=None)
    predictor = Predictor(predictor.folder)
    predictor.thresholds = none
    assert predict_folder(predictor, photographs, tmp_path)
    assert "no image threshold, so scores without verdicts" in capsys.readouterr().out
    assert {row["verdict"] for row in read_rows(tmp_path).values()} == {""}
    assert "No verdict" in (tmp_path / "report.html").read_text()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_follow_appends_complete_files_until_it_is_stopped(workdir, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    Image.fromarray(draw_part(0)).save(inbox / "0.png")
    Image.fromarray(draw_part(1, (90, 90))).save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()
    arguments = command(f"--workdir={workdir}", f"--out={out}", "--follow", inbox)
    table = out / "predictions.csv"

    def count():
        return len(read_rows(out)) if table.exists() else 0

    for already in (0, 2):
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
            if not already:
                wait_for(lambda: count() == 1)
                # A file that is still being copied.
                with (inbox / "1.png").open("wb") as file:
                    for start in range(0, len(data), len(data) // 4):
                        file.write(data[start : start + len(data) // 4])
                        file.flush()
                        time.sleep(0.4)
                wait_for(lambda: count() == 2)
                wait_for(lambda: "2 photographs" in (out / "report.html").read_text())
            else:
                Image.fromarray(draw_part(2)).save(inbox / "2.png")
                wait_for(lambda: count() == 3)
            process.send_signal(signal.SIGTERM if already else signal.SIGINT)
            assert process.wait(30) == 0, process.stderr.read()
    rows = read_rows(out)
    assert {row["error"] for row in rows.values()} == {""}
    assert table.read_text().count("\n") == 4  # nothing twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=O"], "needs photographs"),
        (["PHOTO"], "needs --out=DIR"),
        (["--out=O", "missing.png"], "missing.png: there is no such file or folder"),
        (["--out=O", "--config=tests/tiny_config.py", "PHOTO"], "--config does not belong to"),
        (
            ["--out=O", "--pixel_threshold=128", "PHOTO"],
            "--pixel_threshold=128: 128.0 is not a number in the range [0, 1]",
        ),
        (["--out=O", "--category=ring", "PHOTO"], "is the model of bolt, not of ring"),
    ],
)
def test_errors_of_use_are_one_line(workdir, photographs, tmp_path, arguments, message):
    photograph = str(photographs / "monday" / "a.png")
    arguments = [{"PHOTO": photograph, "--out=O": f"--out={tmp_path}"}.get(x, x) for x in arguments]
    done = subprocess.run(
        command(f"--workdir={workdir}/bolt", *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_flags_of_prediction_are_refused_by_other_modes():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--mode=report", "--workdir=W", "--follow"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--follow does not belong to --mode=report, but to --mode=predict" in done.stderr

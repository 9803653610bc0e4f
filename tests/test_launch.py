"""The command as people use it: its files, exit codes, errors, Ctrl-C and kill -9."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments):
    return [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]


def launch(*arguments, cwd=ROOT):
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """One category in the folder layout: stripes, with a white square in defective ones."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(path, defect=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(90, 160, (40, 40, 3), np.uint8)
        image[:, ::4] //= 2
        mask = np.zeros((40, 40), np.uint8)
        if defect:
            image[10:20, 15:25] = 255
            mask[10:20, 15:25] = 255
            truth = root / "bolt" / "ground_truth" / defect / f"{path.stem}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(truth)
        Image.fromarray(image).save(path)

    for index in range(6):
        write(root / "bolt" / "train" / "good" / f"{index:03d}.png")
    for index in range(3):
        write(root / "bolt" / "test" / "good" / f"{index:03d}.png")
        write(root / "bolt" / "test" / "hole" / f"{index:03d}.png", defect="hole")
    return root


def arguments(data_dir, workdir, *more):
    return (
        "--config=tests/tiny_config.py",
        f"--config.data_dir={data_dir}",
        f"--workdir={workdir}",
        *more,
    )


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    done = launch(*arguments(data_dir, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_one_command_trains_evaluates_and_writes_all_its_files(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results.keys() >= {"categories", "mean", "config_sha256", "versions", "device"}
    assert "launch.py --config=tests/tiny_config.py" in results["command"]
    bolt = results["categories"]["bolt"]
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro"):
        assert 0 <= bolt[metric] <= 1
        assert results["mean"][metric] == bolt[metric]
    assert len(bolt["params_sha256"]) == 64 and bolt["train_seconds"] > 0
    assert bolt["parameters"] > 0 and bolt["flops_per_image"] > 0
    assert "| bolt |" in (workdir / "results.md").read_text()
    folder = workdir / "bolt"
    assert [line["step"] for line in map(json.loads, open(folder / "train_log.jsonl"))] == [2, 4, 6]
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 6
    assert len(list(folder.glob("events.*"))) == 1
    assert len(list((folder / "pictures").glob("*.png"))) >= 4
    assert len(list(csv.DictReader(open(folder / "images.csv")))) == 6
    assert "anomaly_head" in (folder / "parameters.txt").read_text()
    assert str(workdir / "results.md") in done.stdout and "step 6/6" in done.stdout
    for page in (workdir / "report.html", folder / "report.html"):
        assert "bolt" in page.read_text()


def test_thresholds_come_from_all_good_images(finished):
    workdir, _ = finished
    bolt = json.loads((workdir / "results.json").read_text())["categories"]["bolt"]
    pixel, image = bolt["thresholds"]["pixel"], bolt["thresholds"]["image"]
    assert pixel["images"] == image["images"] == 6
    assert "held out: 2; trained on, by leave-one-out: 4" in pixel["how"]
    assert 0 < pixel["threshold"] < 1
    assert image["found"] + image["missed"] == image["good_images"] == 3
    assert 0 <= pixel["iou"] <= 1


def test_the_same_command_again_trains_nothing_and_gives_the_same_results(finished, data_dir):
    workdir, _ = finished
    before = json.loads((workdir / "results.json").read_text())
    again = launch(*arguments(data_dir, workdir))
    assert again.returncode == 0 and "step " not in again.stdout
    assert json.loads((workdir / "results.json").read_text()) == before


def test_report_and_comparison_are_made_from_the_files_alone(finished, tmp_path):
    workdir, _ = finished
    page = workdir / "bolt" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert launch("--mode=report", f"--workdir={workdir}").returncode == 0
    assert page.read_bytes() == before
    done = launch("--mode=compare", f"--workdir={tmp_path}", workdir, workdir)
    assert done.returncode == 0, done.stderr
    assert "bolt" in done.stdout and (tmp_path / "comparison.md").exists()


def test_maps_from_files_are_evaluated_like_a_model_and_compared_with_one(
    finished, data_dir, tmp_path
):
    workdir, _ = finished
    with np.load(workdir / "bolt" / "evaluation.npz") as arrays:
        maps, masks = arrays["map"], arrays["mask"]
    rows = list(csv.DictReader(open(workdir / "bolt" / "images.csv")))
    for row, image_map in zip(rows, maps, strict=True):
        path = tmp_path / "maps" / "bolt" / Path(row["name"]).relative_to("test")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".npy"), image_map / 100)
    more = ("--mode=evaluate", f"--config.maps_dir={tmp_path / 'maps'}")
    done = launch(*arguments(data_dir, tmp_path / "peer", *more))
    assert done.returncode == 0, done.stderr
    model, peer = (
        json.loads((folder / "results.json").read_text())["categories"]["bolt"]
        for folder in (workdir, tmp_path / "peer")
    )
    assert peer["maps_dir"] == str(tmp_path / "maps") and peer["train_seconds"] is None
    # Of the maps in 8 bits: the model's own metric is of its maps before rounding.
    expected = roc_auc_score(masks.ravel() > 0, maps.ravel())
    assert peer["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert peer["baselines"] == model["baselines"]
    assert len(list((tmp_path / "peer" / "bolt" / "pictures").glob("*.png"))) >= 4
    page = (tmp_path / "peer" / "bolt" / "report.html").read_text()
    assert "Against trivial baselines" in page and "of another method" in page
    done = launch("--mode=compare", f"--workdir={tmp_path}", workdir, tmp_path / "peer")
    assert done.returncode == 0 and "peer" in done.stdout, done.stderr
    refused = launch(*arguments(data_dir, workdir, *more))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "bolt is a model's: give the results of maps_dir another --workdir" in refused.stderr


def test_several_seeds_are_run_side_by_side_and_averaged(data_dir, tmp_path):
    more = ("--config.seeds=(1,2)", "--config.num_steps=2", "--config.evaluate.pictures=0")
    scores = ("--config.detector.enabled=True", "--config.evaluate.image_score=detector")
    done = launch(*arguments(data_dir, tmp_path, *more, *scores))
    assert done.returncode == 0, done.stderr
    one, two, both = (
        json.loads((tmp_path / folder / "results.json").read_text())["categories"]["bolt"]
        for folder in ("seed_1", "seed_2", ".")
    )
    assert one["params_sha256"] != two["params_sha256"]
    assert both["pixel_auroc"] == pytest.approx((one["pixel_auroc"] + two["pixel_auroc"]) / 2)
    assert both["pixel_auroc_std"] >= 0
    detectors = [category["image_scores"]["detector"] for category in (one, two)]
    assert both["image_scores"]["detector"]["image_auroc"] == both["image_auroc"]
    assert both["image_auroc"] == pytest.approx(np.mean([d["image_auroc"] for d in detectors]))
    assert [d["image_auroc"] for d in detectors] == [one["image_auroc"], two["image_auroc"]]
    assert "score of the detector" in (tmp_path / "seed_1" / "bolt" / "report.html").read_text()
    assert "| image_auroc of | map | detector |" in (tmp_path / "results.md").read_text()


def test_evaluate_works_from_checkpoints_alone(finished, data_dir, tmp_path):
    workdir, _ = finished
    before = json.loads((workdir / "results.json").read_text())["categories"]["bolt"]
    (workdir / "results.json").unlink()
    more = ("--config.evaluate.native_size=True", "--config.evaluate.pixel_threshold=0.25")
    done = launch(*arguments(data_dir, workdir, "--mode=evaluate", *more))
    assert done.returncode == 0, done.stderr
    bolt = json.loads((workdir / "results.json").read_text())["categories"]["bolt"]
    for key in ("params_sha256", "train_seconds", "image_auroc", "steps"):
        assert bolt[key] == before[key]
    assert bolt["defect_pixels"] == 300 > before["defect_pixels"]  # 3 of 10x10 at 40x40
    assert bolt["thresholds"]["pixel"]["threshold"] == 0.25
    missing = launch(*arguments(data_dir, tmp_path, "--mode=evaluate"))
    assert missing.returncode == 1
    waits = ("evaluating bolt", "... ")  # a slow machine says what it waits for
    (line,) = [line for line in missing.stderr.splitlines() if not line.startswith(waits)]
    assert line.startswith("error: bolt: no checkpoint in")


LONG = ("--config.num_steps=40", "--config.checkpoint_every=5", "--config.evaluate.pictures=0")


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert launch(*arguments(data_dir, workdir, *LONG)).returncode == 0
    return workdir


def start(out, *arguments, devices=None):
    """Starts the command, its output in a file, on other virtual devices if `devices` are given."""
    environment = dict(os.environ)
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with open(out, "w") as file:
        return subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=file, stderr=file, env=environment
        )


def signal_when(process, number, condition):
    """Sends a signal once the condition holds; returns the exit code."""
    while process.poll() is None and not condition():
        time.sleep(0.01)
    assert process.poll() is None, "it was over before it could be stopped"
    process.send_signal(number)
    return process.wait()


def category_results(workdir):
    results = json.loads((workdir / "results.json").read_text())["categories"]["bolt"]
    results.pop("train_seconds")
    return results


RESUME = (
    r"stopped at step (\d+) of 40\. Checkpoints are kept\. Run the same command again to resume\."
)


def test_killed_stopped_interrupted_and_damaged_the_same_command_again_changes_nothing(
    data_dir, uninterrupted, tmp_path
):
    workdir, out = tmp_path / "w", tmp_path / "out"
    command_line = arguments(data_dir, workdir, *LONG)
    checkpoints = workdir / "bolt" / "checkpoints"

    def run_until(number, condition):
        return signal_when(start(out, *command_line), number, condition)

    def saved_steps():
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())

    # Ctrl-C before or while the first step is compiled ends the process at once.
    code = run_until(signal.SIGINT, lambda: "== bolt" in out.read_text())
    assert code == -signal.SIGINT
    assert "Traceback" not in out.read_text() and "error" not in out.read_text()
    assert not checkpoints.exists() or not saved_steps()

    code = run_until(signal.SIGKILL, (checkpoints / "5").exists)
    assert code == -signal.SIGKILL and not (workdir / "results.json").exists()

    code = run_until(signal.SIGTERM, (checkpoints / "15").exists)
    text = out.read_text()
    assert code == 75 and "resumed at step" in text and "error" not in text
    assert "SIGTERM: stopping after this step\n" in text
    (step,) = re.fullmatch(RESUME, text.splitlines()[-1]).groups()
    assert saved_steps()[-1] == int(step)

    code = run_until(signal.SIGINT, (checkpoints / "25").exists)
    text = out.read_text()
    assert code == 75 and f"resumed at step {step}\n" in text and "error" not in text
    assert "stopping after this step; press Ctrl-C again to stop now\n" in text
    (step,) = re.fullmatch(RESUME, text.splitlines()[-1]).groups()
    steps = saved_steps()
    assert steps[-1] == int(step)

    newest = checkpoints / step
    largest = max(
        (p for p in newest.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    resumed = launch(*command_line)
    assert resumed.returncode == 0 and f"resumed at step {steps[-2]}\n" in resumed.stdout
    assert f"warning: damaged checkpoint {newest}: " in resumed.stderr
    assert category_results(workdir) == category_results(uninterrupted)

    # The evaluation stops, too, and leaves the results that exist.
    before = (workdir / "results.json").read_bytes()
    evaluation = start(out, *command_line, "--mode=evaluate")
    code = signal_when(evaluation, signal.SIGTERM, lambda: "== bolt" in out.read_text())
    assert code == 75 and (workdir / "results.json").read_bytes() == before
    assert re.match(
        r"stopped (before|in the evaluation of) bolt\.", out.read_text().splitlines()[-1]
    )


def test_two_processes_give_what_one_gives_and_survive_the_death_of_one(
    data_dir, uninterrupted, tmp_path
):
    """Two devices in each of two processes, against four in one."""
    workdir, outs = tmp_path / "w", [tmp_path / "out0", tmp_path / "out1"]

    def start_both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [
            start(
                outs[index],
                *arguments(data_dir, workdir, *LONG),
                f"--coordinator=localhost:{port}",
                "--num_processes=2",
                f"--process_id={index}",
                devices=2,
            )
            for index in (0, 1)
        ]

    first, second = start_both()
    checkpoints = workdir / "bolt" / "checkpoints"
    assert signal_when(first, signal.SIGKILL, (checkpoints / "10").exists) == -signal.SIGKILL
    assert second.wait() not in (0, None)
    assert re.search("another (task died|process of this run ended)", outs[1].read_text())

    assert [process.wait() for process in start_both()] == [0, 0], outs[0].read_text()
    assert "4 x cpu in 2 processes; resumed at step" in outs[0].read_text()
    assert "bolt: image_auroc" in outs[0].read_text()
    assert "bolt" not in outs[1].read_text()  # the main process alone prints
    logs = [
        [json.loads(line) for line in (w / "bolt" / "train_log.jsonl").read_text().splitlines()]
        for w in (workdir, uninterrupted)
    ]
    assert len(logs[0]) == len(logs[1]) == 24  # every 2 and every 5 steps
    for two, one in zip(logs[0][:12], logs[1], strict=False):  # up to step 20
        for name in ("loss_segmentation", "loss_reconstruction", "loss_discriminator"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), two["step"]
    assert (
        len(list((workdir / "bolt").glob("events.*"))) == 2
    )  # one a run: the main process alone writes
    two = category_results(workdir)
    done = launch(*arguments(data_dir, workdir, *LONG, "--mode=evaluate"))  # of the same weights
    assert done.returncode == 0, done.stderr
    one = category_results(workdir)
    assert two["params_sha256"] == one["params_sha256"]
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "au_pro"):
        assert two[metric] == pytest.approx(one[metric], abs=1e-5), metric


def test_what_cannot_be_measured_is_null_with_a_reason(data_dir, tmp_path):
    for name, missing in {
        "no_masks": ["ground_truth"],
        "no_test": ["test", "ground_truth"],
        "all_good": ["test/hole", "ground_truth"],
        "one_image": [f"train/good/{index:03d}.png" for index in range(1, 6)],
    }.items():
        shutil.copytree(data_dir / "bolt", tmp_path / "data" / name)
        for path in missing:
            target = tmp_path / "data" / name / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    more = ("--config.num_steps=2", "--config.evaluate.pictures=1")
    done = launch(*arguments(tmp_path / "data", tmp_path / "w", *more))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    available = {
        name: {
            m for m in ("image_auroc", "pixel_auroc", "iou", "au_pro") if category[m] is not None
        }
        for name, category in results["categories"].items()
    }
    assert available == {
        "no_masks": {"image_auroc"},
        "no_test": set(),
        "all_good": set(),
        "one_image": {"image_auroc", "pixel_auroc", "iou", "au_pro"},
    }
    for category in results["categories"].values():
        for metric in ("image_auroc", "pixel_auroc", "iou", "au_pro"):
            assert category[metric] is not None or category["not_available"][metric]
    one_image = results["categories"]["one_image"]["thresholds"]
    assert one_image["pixel"]["threshold"] is None and "too few" in one_image["pixel"]["how"]
    assert "Not available:" in (tmp_path / "w" / "results.md").read_text()


def test_a_run_on_good_parts_alone_ends_in_thresholds_pictures_and_the_next_command(
    data_dir, tmp_path
):
    shutil.copytree(data_dir / "bolt" / "train", tmp_path / "data" / "bolt" / "train")
    workdir = tmp_path / "w"
    done = launch(*arguments(tmp_path / "data", workdir, "--config.num_steps=2"))
    assert done.returncode == 0, done.stderr
    bolt = json.loads((workdir / "results.json").read_text())["categories"]["bolt"]
    assert bolt["test_images"] == 0 and bolt["held_out_images"] == 2 and bolt["image_auroc"] is None
    assert "image_auroc -" not in done.stdout
    for kind in ("image", "pixel"):
        assert f"from {bolt['thresholds'][kind]['threshold']:.4g} on: " in done.stdout
    rows = list(csv.DictReader(open(workdir / "bolt" / "images.csv")))
    assert len(rows) == 2 and all(row["name"].startswith("train/good/") for row in rows)
    assert len(list((workdir / "bolt" / "pictures").glob("good_*.png"))) == 2
    page = (workdir / "bolt" / "report.html").read_text()
    assert "held-out photographs of good parts" in page and "anomaly map" in page
    assert "not available" not in page and "--mode=predict" in page
    assert "not available" not in (workdir / "report.html").read_text().partition("<h2>What")[0]
    (line,) = [line for line in done.stdout.splitlines() if "judge new photographs" in line]
    words = shlex.split(line.partition(": ")[2])
    assert (
        "python" in words[0] and words[1] == str(ROOT / "launch.py") and words[-1] == "PHOTOGRAPHS"
    )
    photographs = data_dir / "bolt" / "test" / "hole"
    predicted = launch(*words[2:-1], photographs)
    assert predicted.returncode == 0, predicted.stderr
    assert (workdir / "bolt" / "predictions" / "predictions.csv").exists()
    done = launch("--mode=compare", f"--workdir={tmp_path}/c", workdir, workdir)
    assert done.returncode == 0, done.stderr


def test_check_reports_without_training(data_dir):
    done = launch("--config=tests/tiny_config.py", f"--config.data_dir={data_dir}", "--mode=check")
    assert done.returncode == 0, done.stderr
    assert "bolt" in done.stdout and "6 good" in done.stdout and "3 hole" in done.stdout


def test_a_bad_file_is_named_before_training(data_dir, tmp_path):
    broken = tmp_path / "bolt" / "train" / "good" / "000.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    done = launch(*arguments(tmp_path, tmp_path / "w"))
    assert done.returncode == 2
    assert done.stderr == f"error: {broken}: is empty (0 bytes): copy it again or remove it\n"
    assert not (tmp_path / "w").exists()


def test_help_needs_neither_jax_nor_tensorflow():
    program = """
import runpy, sys
sys.argv = ["launch.py", "--help"]
try:
    runpy.run_path("launch.py", run_name="__main__")
except SystemExit:
    pass
loaded = {name.split(".")[0] for name in sys.modules} & {"jax", "tensorflow", "flax", "orbax"}
print("loaded:", sorted(loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--workdir" in done.stdout and "loaded: []" in done.stdout

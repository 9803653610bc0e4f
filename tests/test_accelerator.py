"""benchmarks/accelerator.py in processes of its own, on small pictures and few steps."""

import json
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from drawings import disc, draw_category, save_mask
from programs import ROOT, run

from anoseg_jax import options
from anoseg_jax.evaluation import metrics
from anoseg_jax.images import input_pipeline, layout
from anoseg_jax.method import predict, train
from data import sources

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import category_arrays  # noqa: E402
import step_times  # noqa: E402
import training_curve  # noqa: E402

CONFIG = "--config=tests/tiny_config.py"
WITHOUT_TENSORFLOW = """
import runpy, sys
sys.path[:0] = "tests", "benchmarks"
import without_tensorflow
runpy.run_path("benchmarks/accelerator.py", run_name="__main__")
"""
STEPS = {"plain": 6, "no_game": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A grey category with pixels to ignore in a training and in a test image."""
    folder = draw_category(tmp_path_factory.mktemp("data") / "part")
    for name in ("train/good/001", "test/scratch/000"):
        save_mask(disc(3), folder / f"ignore/{name}.png")
    return folder


@pytest.fixture(scope="module")
def npz(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "part.npz"
    assert accelerator.main([CONFIG, "--write-npz", str(folder), str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def out(npz, tmp_path_factory):
    """The folder of a finished command with two variants."""
    out = tmp_path_factory.mktemp("out")
    variants = [
        f"--variant=plain: num_steps={STEPS['plain']}",
        f"--variant=no_game: config.num_steps={STEPS['no_game']} loss.adversarial_weight=0",
    ]
    flags = ["--data", npz, "--out", out, "--minutes=60", "--no-timing", "--maps"]
    done = run(WITHOUT_TENSORFLOW, CONFIG, *flags, *variants)
    assert done.returncode == 0, done.stderr
    return out


def read_table(out):
    return json.loads((out / "table.json").read_text())


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_images_are_those_of_a_run(kind, folder, npz):
    config = options.normalize(accelerator.parse_options([CONFIG]))
    images = category_arrays.read({"folder": folder, "npz": npz}[kind], config)
    splits = sources.open_splits(
        "folder", ("part",), data_dir=folder.parent, read=layout.ReadOptions.of(config)
    )["part"]
    train_arrays = input_pipeline.load_arrays(splits.train, config.image_size)
    np.testing.assert_array_equal(images.train, train_arrays["image"])
    test_arrays = input_pipeline.load_arrays(splits.test, config.image_size)
    assert images.test.keys() == test_arrays.keys() and images.test["ignore"].any()
    for key, array in test_arrays.items():
        np.testing.assert_array_equal(images.test[key], array, err_msg=key)
    assert (images.category, images.validation) == ("part", None)


def test_grey_images_are_stored_with_one_channel(npz):
    with np.load(npz) as stored:
        assert stored["train"].shape[-1] == stored["test_image"].shape[-1] == 1


def test_an_npz_of_another_size_is_refused(npz, tmp_path, capsys):
    arguments = [CONFIG, "--config.image_size=64", "--data", str(npz), "--out", str(tmp_path)]
    assert accelerator.main([*arguments, "--no-timing"]) == 2
    assert "image_size=(64, 64)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variant", ["a: nope=1", "a: num_steps=few", "a: num_steps", "a b: num_steps=1"]
)
def test_a_wrong_variant_is_refused_in_one_line(variant, npz, tmp_path, capsys):
    arguments = [CONFIG, "--data", str(npz), "--out", str(tmp_path / "out")]
    assert accelerator.main([*arguments, f"--variant={variant}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert variant in line
    assert not (tmp_path / "out").exists()


def test_the_table_has_a_row_for_each_share_of_the_steps(out):
    runs = {record["name"]: record for record in read_table(out)["runs"]}
    assert list(runs) == list(STEPS)
    for name, steps in STEPS.items():
        rows = runs[name]["rows"]
        shares = {max(1, round(share * steps)) for share in training_curve.SHARES}
        assert [row["step"] for row in rows] == [0, *sorted(shares)]
        assert all(0 <= row[key] <= 1 for row in rows for key in training_curve.METRICS)
        assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
        for row in rows[1:]:
            assert {"loss_segmentation", "gradient_norm_anomaly_head"} <= set(
                row["metrics_of_steps"]
            )
            assert all(x["median"] <= x["p99"] for x in row["metrics_of_steps"].values())
        assert runs[name]["config"]["num_steps"] == runs[name]["num_steps"] == steps
    last = {name: set(record["rows"][-1]["metrics_of_steps"]) for name, record in runs.items()}
    assert last["plain"] - last["no_game"] >= {"loss_adversarial"}


def test_the_text_has_every_row_and_the_columns_of_its_variant(out):
    text = (out / "table.md").read_text()
    for record in read_table(out)["runs"]:
        section = text.split(f"## {record['name']}\n")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(record["rows"])
        assert len({line.count("|") for line in lines[:1] + lines[2:]}) == 1
        for name in record["rows"][-1]["metrics_of_steps"]:
            assert name in lines[0]


def test_it_trains_what_a_run_trains(out, npz, tmp_path):
    config = accelerator.parse_options([CONFIG, f"--config.num_steps={STEPS['plain']}"])
    images = category_arrays.read(npz, config)
    saved = train.fit(config, images.train, tmp_path)
    variables = predict.replicate(predict.variables_of(saved.state))
    maps, scores, _ = predict.sharded_predict_fn(config)(variables, images.test["image"])
    with np.load(out / "plain.npz") as stored:
        np.testing.assert_allclose(stored["scores"], scores, rtol=1e-3, atol=1e-3)
        logits = stored["logits"].astype(np.float32)
        np.testing.assert_array_equal(stored["label"], images.test["label"])
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), maps, atol=1e-2)
    last = read_table(out)["runs"][0]["rows"][-1]
    measured = metrics.image_metrics(scores, images.test["label"])
    assert last["image_auroc"] == pytest.approx(measured["image_auroc"])


def test_a_killed_command_leaves_its_tables(npz, tmp_path):
    flags = ["--data", npz, "--out", tmp_path, "--minutes=60", "--no-timing"]
    command = [sys.executable, ROOT / "benchmarks/accelerator.py", CONFIG, *flags]
    command += ["--variant=long: num_steps=1000", "--variant=never:"]
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("| 20 |"):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    record = read_table(tmp_path)["runs"][0]
    assert [row["step"] for row in record["rows"][:2]] == [0, 20]
    assert record["num_steps"] == 1000
    assert "\n| 20 | " in (tmp_path / "table.md").read_text()


def test_time_that_is_over_ends_a_training_with_a_row(npz, tmp_path, capsys):
    flags = ["--data", str(npz), "--out", str(tmp_path), "--minutes=0", "--no-timing"]
    assert accelerator.main([CONFIG, *flags, "--config.num_steps=50"]) == 1
    (record,) = read_table(tmp_path)["runs"]
    assert [row["step"] for row in record["rows"]] == [0, 1]
    assert "step 1 of 50" in record["rows"][-1]["ended"]
    assert "step 1 of 50" in (tmp_path / "table.md").read_text()


def test_a_training_that_is_not_finite_ends_and_the_next_one_goes_on(npz, tmp_path):
    flags = ["--data", str(npz), "--out", str(tmp_path), "--minutes=60", "--no-timing"]
    variants = ["--variant=wild: learning_rate=1e30", "--variant=tame:"]
    assert accelerator.main([CONFIG, *flags, *variants, "--config.num_steps=20"]) == 1
    wild, tame = read_table(tmp_path)["runs"]
    assert "loss_segmentation" in wild["rows"][-1]["ended"]
    assert wild["rows"][-1]["metrics_of_steps"]["loss_segmentation"] is None
    assert tame["rows"][-1]["step"] == 20 and "ended" not in tame["rows"][-1]


def test_speed_is_measured_until_the_deadline(npz):
    config = accelerator.parse_options([CONFIG])
    images = category_arrays.read(npz, config)
    arrays, _ = train.split_images(config, images.train)
    state = accelerator.make_begin()(config, arrays, "")
    measure = partial(step_times.measure, config, images.train, state, with_torch=False)
    row = next(measure(deadline=float("inf")))
    assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["ms"])
    assert 1e3 * row["first_call"] > row["ms"] > 0
    skipped = list(measure(deadline=0.0))
    assert {row["batch_size"] for row in skipped} == {16, 64}
    assert {row["dtype"] for row in skipped} == {"float32", "bfloat16"}
    assert all(row["note"] == step_times.NO_TIME for row in skipped)

"""Exports in their real runtimes: what they compute, and the script that comes with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config
from part_images import draw_part
from PIL import Image

from anoseg_jax.deploy import export, exported_predict
from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.method import detector, train

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "stablehlo": ("jax",),
    "onnx": ("jax2onnx", "onnxruntime"),
    "saved_model": ("tensorflow",),
}


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor(workdir)


@pytest.mark.parametrize("name", PACKAGES)
def test_an_export_and_its_script_give_the_scores_and_maps_of_the_model(
    predictor, photographs, tmp_path, capsys, name
):
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason="see the extras in setup.cfg")
    paths = sorted(map(str, photographs.rglob("*.*")))
    export.export(predictor, name, tmp_path, paths)
    printed = capsys.readouterr().out
    assert "parity with JAX in float32 on 5 images" in printed
    assert "patches of its training photographs" in printed
    metadata = json.loads((tmp_path / "model.json").read_text())
    assert metadata["format"] == name and metadata["input"]["size"] == [32, 32]
    assert metadata["thresholds"] == predictor.thresholds._asdict()
    assert metadata["weights_sha256"] == predictor.model.weights_sha256
    assert max(metadata["parity"]["maps"], metadata["parity"]["scores"]) < 1e-4
    assert metadata["contains_training_patches"] is True

    predictions = predictor(paths)
    run = exported_predict.load_model(str(tmp_path), name)
    for count in (1, 3):  # the number of images is free
        images = np.stack([prediction.image for prediction in predictions[:count]])
        maps, scores = run(images)
        assert maps.dtype == scores.dtype == np.float32
        np.testing.assert_allclose(maps, predictor.compute(images)[0], atol=1e-4)
        np.testing.assert_allclose(scores, predictor.compute(images)[1], atol=1e-4)

    done = subprocess.run(
        [sys.executable, tmp_path / "predict.py", *paths, f"--out={tmp_path / 'maps'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == paths
    for line, prediction in zip(lines, predictions, strict=True):
        assert float(line[1]) == pytest.approx(prediction.score, abs=2e-4)
        assert line[2] == prediction.verdict
    assert len(list((tmp_path / "maps").iterdir())) == 4  # two have the same name


def test_the_image_level_detectors_score_is_exported_where_it_is_the_models(tmp_path):
    config = tiny_config.get_config()
    config.num_steps = config.detector.num_steps = 2
    config.detector.enabled, config.evaluate.image_score = True, "detector"
    config.memory_bank.size = 0
    images = np.stack([draw_part(seed) for seed in range(10)])
    train.fit(config, images, tmp_path / "nut")
    detector.fit(config, images, tmp_path / "nut")
    predictor = Predictor(tmp_path)
    maps, scores = jax.jit(export.export_fn(predictor.folder))(images)
    np.testing.assert_allclose(scores, predictor.compute(images)[1], atol=1e-5)
    np.testing.assert_allclose(
        scores, predictor.model.detector(images, np.asarray(maps)), atol=1e-5
    )
    recorded = predictor.model.detector.record["thresholds"]["image"]["threshold"]
    assert predictor.thresholds.image == recorded
    Image.fromarray(images[0]).save(tmp_path / "0.png")
    export.export(predictor, "stablehlo", tmp_path / "out", [str(tmp_path / "0.png")])
    metadata = json.loads((tmp_path / "out" / "model.json").read_text())
    assert metadata["image_score"] == "detector" and not metadata["contains_training_patches"]


def test_an_export_that_computes_something_else_fails_and_is_removed(
    predictor, photographs, tmp_path, monkeypatch, capsys
):
    def write_wrong(function, size, path):
        def wrong(images):
            maps, scores = function(images)
            return maps, scores + 0.01

        export.write_stablehlo(wrong, size, path)

    monkeypatch.setitem(export.FORMATS, "stablehlo", write_wrong)
    with pytest.raises(export.ExportError, match="differs by more than 0.0001"):
        export.export(predictor, "stablehlo", tmp_path, [str(photographs / "monday" / "a.png")])
    assert "scores by 1.0e-02" in capsys.readouterr().out
    assert not list(tmp_path.glob("model.*"))


def test_without_photographs_those_of_the_evaluation_are_compared(predictor, tmp_path):
    with pytest.raises(export.ExportError, match="the parity check needs photographs"):
        export.photographs_to_check(predictor, [])
    images = np.stack([draw_part(seed) for seed in range(40)])
    path = predictor.folder / "evaluation.npz"
    np.savez_compressed(path, image=images, mask=images[..., 0] > 0)
    try:
        chosen = export.photographs_to_check(predictor, [])
    finally:
        path.unlink()
    assert 1 < len(chosen) <= 32 and (chosen[0] == images[0]).all()


def test_a_missing_package_is_named_with_the_extra_that_has_it(
    predictor, photographs, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(export.ExportError, match=r"ONNX needs the extra \[onnx\]"):
        export.export(predictor, "onnx", tmp_path, [str(photographs / "monday" / "a.png")])


def test_the_command_exports_without_tensorflow_and_scikit_learn(workdir, photographs, tmp_path):
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    for name in ("tensorflow", "sklearn", "matplotlib"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=export", f"--workdir={workdir}"]
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, **options)
    assert done.returncode == 2 and "needs --out=DIR" in done.stderr
    done = subprocess.run(
        [*command, f"--out={out}", "--format=stablehlo", str(photographs)],
        env=os.environ | {"PYTHONPATH": str(blocked)},
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"model.stablehlo", "model.json", "predict.py"}

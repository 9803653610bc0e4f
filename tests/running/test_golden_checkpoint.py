"""A checkpoint that was written once still predicts the numbers that were written with it.

    PYTHONPATH=.:tests python tests/running/test_golden_checkpoint.py

writes both again, into golden/: model.zip, a category's folder with generator and detector, and
expected.npz, images with their maps and scores.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import tiny_config

from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import detector, train

GOLDEN = Path(__file__).parent / "golden"
ADVICE = """
Checkpoints that users have are no longer read, or predict something else. If that is not intended,
a module, a parameter or an option was renamed, or a forward pass changed: undo it. If it is, raise
FORMAT in anoseg_jax/running/checkpoint.py and write the golden files again (see this test's file).
"""


def predict(folder):
    """Returns maps, scores and the detector's scores of the golden images."""
    with np.load(GOLDEN / "expected.npz") as expected:
        images = expected["images"]
    predictor = TrainedModel(folder, detector=True)
    maps, scores = predictor(images)
    results = {"maps": maps, "scores": scores, "detector_scores": predictor.detector(images, maps)}
    return {"images": images} | results


def test_a_golden_checkpoint_predicts_the_numbers_that_were_written_with_it(tmp_path):
    shutil.unpack_archive(GOLDEN / "model.zip", tmp_path)
    with np.load(GOLDEN / "expected.npz") as expected:
        expected = dict(expected)
    try:
        results = predict(tmp_path)
    except Exception as error:
        raise AssertionError(ADVICE) from error
    for name, values in results.items():
        np.testing.assert_allclose(values, expected[name], 1e-5, 1e-5, err_msg=name + ADVICE)


def write():
    """Trains a model as small as possible and writes the golden files."""
    rows, columns = np.mgrid[:32, :32][..., None]
    waves = [np.sin((rows * (1 + i) + columns * i + np.arange(3)) / 5) for i in range(6)]
    images = np.uint8([128 + 90 * wave for wave in waves])
    config = tiny_config.get_config()
    config.update({"num_steps": 30, "checkpoint_every": 30, "learning_rate": 5e-3})
    config.update({"model": {"latent": 4}, "detector": {"num_steps": 30, "latent": 4}})
    config.memory_bank.update({"size": 16, "patch": 4, "components": 4})
    with tempfile.TemporaryDirectory() as path:
        saved = train.fit(config, images, f"{path}/trained")
        detector.fit(config, images, f"{path}/trained", generator=saved)
        for network in ("", "detector"):  # there and back: optimizers of zeros need little space
            trained, golden = (Path(path) / name / network for name in ("trained", "golden"))
            torch_weights.export_checkpoint(trained, Path(path) / "weights.safetensors")
            torch_weights.import_checkpoint(Path(path) / "weights.safetensors", golden)
        shutil.make_archive(GOLDEN / "model", "zip", f"{path}/golden")
        np.savez_compressed(GOLDEN / "expected.npz", images=images[::2])
        np.savez_compressed(GOLDEN / "expected.npz", **predict(f"{path}/golden"))


if __name__ == "__main__":
    write()

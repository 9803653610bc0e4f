"""Training from Python in one call."""

import numpy as np
import pytest
import tiny_config
from part_images import draw_part
from PIL import Image

import anoseg_jax
from anoseg_jax.images.decode import LayoutError
from anoseg_jax.options import OptionError
from anoseg_jax.running.loop import TrainingError

OPTIONS = {"num_steps": 2, "checkpoint_every": 2, "model.latent": 4}


def test_fit_on_a_folder_equals_fit_on_the_arrays_of_its_files(tmp_path):
    images = [draw_part(seed, (40, 40 + 4 * seed)) for seed in range(8)]
    folder = tmp_path / "good"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    options = {"config": tiny_config.get_config()}
    of_folder = anoseg_jax.fit(folder, tmp_path / "a" / "bolt", OPTIONS, **options)
    of_arrays = anoseg_jax.fit(images, tmp_path / "b" / "bolt", OPTIONS, **options)
    assert isinstance(of_folder, anoseg_jax.Predictor)
    assert of_folder.model.step == 2 and of_folder.model.config["model"]["latent"] == 4
    assert of_folder.model.weights_sha256 == of_arrays.model.weights_sha256
    assert of_folder(images[0]).score == of_arrays(folder / "0.png").score
    again = anoseg_jax.Predictor(tmp_path / "a")
    assert again.model.weights_sha256 == of_folder.model.weights_sha256
    resumed = anoseg_jax.fit(folder, tmp_path / "a" / "bolt", OPTIONS, **options)
    assert resumed.model.weights_sha256 == of_folder.model.weights_sha256
    (folder / "7.png").unlink()
    with pytest.raises(TrainingError, match="images"):
        anoseg_jax.fit(folder, tmp_path / "a" / "bolt", OPTIONS, **options)


def test_the_bit_depth_of_the_files_is_kept_with_the_model(tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(6):
        grey = draw_part(seed)[..., 0].astype(np.uint16) * 16
        Image.fromarray(grey).save(folder / f"{seed}.png")
    predictor = anoseg_jax.fit(folder, tmp_path / "bolt", OPTIONS, config=tiny_config.get_config())
    assert predictor.reading.bit_depth == 12
    (folder / "bad.png").write_bytes(b"")
    with pytest.raises(LayoutError, match="bad.png: is empty"):
        anoseg_jax.fit(folder, tmp_path / "nut", OPTIONS, config=tiny_config.get_config())


def test_options_are_checked_and_photographs_are_needed(tmp_path):
    images = np.stack([draw_part(seed) for seed in range(4)])
    with pytest.raises(OptionError, match="image_size"):
        anoseg_jax.fit(images, tmp_path / "bolt", {"image_size": 100}, config="cpu")
    for unknown in ("num_stepz", "model.depht"):
        with pytest.raises(OptionError, match=unknown.split(".")[-1]):
            anoseg_jax.fit(images, tmp_path / "bolt", {unknown: 4}, config="cpu")
    with pytest.raises(ValueError, match="fit needs several photographs"):
        anoseg_jax.fit(images[0], tmp_path / "bolt", config="cpu")
    with pytest.raises(AttributeError, match="no attribute 'Predictors'"):
        anoseg_jax.Predictors  # noqa: B018

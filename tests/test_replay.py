"""What --mode=export_replay writes is what training does."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from anoseg_jax.interop import replay, torch_weights
from anoseg_jax.method import train
from configs import test as test_config

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)


def make_config():
    config = test_config.get_config("bolt")
    config.image_size = (32, 48)
    config.num_steps = 20
    config.defects.preset = "plain"  # compiles fast
    return config


def test_losses_and_weights_are_those_of_training(tmp_path):
    config, batches = make_config(), [IMAGES[:4], IMAGES[4:]]
    replay.export(config, IMAGES, iter(batches), tmp_path)
    written = json.loads((tmp_path / "replay.json").read_text())

    parts = train.create_parts(config)
    remembered = IMAGES[np.arange(train.REMEMBERED) * len(IMAGES) // train.REMEMBERED]
    state = parts.create_state(remembered)
    initial, metadata = torch_weights.load(tmp_path / "initial.safetensors")
    for name, array in torch_weights.to_torch({"generator": state.generator}).items():
        np.testing.assert_array_equal(initial[name], array, err_msg=name)
    assert metadata["config"] == written["config"] == json.loads(config.to_json())

    step = jax.jit(partial(parts.train_step, axis_name=None))
    for batch, line in zip(batches, written["steps"], strict=True):
        state, metrics = step(state, batch, parts.draw_key)
        assert line.keys() == {"step", "learning_rate", *metrics}
        for name, value in metrics.items():
            assert line[name] == pytest.approx(float(value), rel=1e-4), name
    final, _ = torch_weights.load(tmp_path / "final.safetensors")
    expected = {"generator": state.ema, "discriminator": state.discriminator}
    found = torch_weights.group(final, "weights") | torch_weights.group(final, "average")
    for name, array in torch_weights.to_torch(expected).items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)

    batch, _ = torch_weights.load(tmp_path / "batch_00002.safetensors")
    assert {name: x.shape for name, x in batch.items()} == {
        "good": (4, 3, 32, 48),
        "defective": (4, 3, 32, 48),
        "masks": (4, 32, 48),
        "marks": (4,),
    }
    np.testing.assert_allclose(batch["good"].transpose(0, 2, 3, 1), IMAGES[4:] / 255, atol=1e-6)
    first, _ = torch_weights.load(tmp_path / "first_step.safetensors")
    norm = np.sqrt(
        sum(np.sum(x**2) for k, x in first.items() if k.startswith("gradients.generator."))
    )
    assert norm == pytest.approx(written["steps"][0]["gradient_norm_generator"], rel=1e-5)

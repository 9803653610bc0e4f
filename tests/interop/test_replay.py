"""What --mode=export_replay writes is what training does."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from replays import IMAGES, export, make_config, make_paper_config

from anoseg_jax.images import batches
from anoseg_jax.interop import replay, torch_weights
from anoseg_jax.method import losses, memory_bank, train, train_state

STEPS = 3


PREFIXES = {
    "reconstructor": "generator.reconstructor.",
    "anomaly_head": "generator.map_head.",
    "discriminator": "discriminator.",
}


def network_norms(gradients):
    """Returns the norm of each network's gradients; `gradients` are those of both players."""
    return {
        network: np.sqrt(sum(np.sum(x**2) for k, x in gradients.items() if k.startswith(prefix)))
        for network, prefix in PREFIXES.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("replay"), make_config(STEPS))


def test_a_replay_has_the_losses_weights_and_bank_of_fit(folder, tmp_path):
    config = make_config(STEPS)
    written = json.loads((folder / "replay.json").read_text())
    assert written["format"] == "anoseg_jax replay 7"
    initial, metadata = torch_weights.load(folder / "initial.safetensors")
    assert metadata["config"] == written["config"] == json.loads(config.to_json())

    state = train.fit(config, IMAGES, tmp_path / "run").state
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").open()]
    assert len(log) == len(written["steps"]) == STEPS
    for logged, line in zip(log, written["steps"], strict=True):
        assert line.keys() == logged.keys() - {"images_per_second"}
        for name, value in line.items():
            assert value == pytest.approx(logged[name], rel=1e-4), name

    # The bank is that of fit to the bit, before the first step and after the last.
    final, _ = torch_weights.load(folder / "final.safetensors")
    weights = torch_weights.group(final, "weights")
    bank = {"memory_bank": state["memory_bank"]}
    for name, array in torch_weights.to_torch({"generator": bank}).items():
        np.testing.assert_array_equal(initial[name], array, err_msg=name)
        np.testing.assert_array_equal(weights[name], array, err_msg=name)

    # The weights are those of training's step on one device, as replay has one.
    static, options = train_state.split_options(config)
    init_key, step_key = train_state.seed_keys(config.seed)
    create = train_state.jit_create(train_state.create_state)
    one = create(init_key, options, static=static, image_size=config.image_size)
    one = one.replace(memory_bank=memory_bank.from_dicts(state["memory_bank"]))
    step = jax.jit(partial(train.train_step, static=static, axis_name=None))
    arrays, _ = train.split_images(config, IMAGES)
    stream = batches.train_batches(arrays, 0, batch_size=config.batch_size, seed=config.seed)
    for _, batch in zip(range(STEPS), stream, strict=False):
        one, _ = step(one, batch, step_key, options)
    averages = torch_weights.group(final, "average")
    for name, array in torch_weights.to_torch({"generator": one.ema}).items():
        np.testing.assert_allclose(averages[name], array, atol=1e-5, err_msg=name)
    players = {player: getattr(one, player) for player in one.PLAYERS}
    for name, array in torch_weights.to_torch(players).items():
        np.testing.assert_allclose(weights[name], array, atol=1e-5, err_msg=name)

    first_step, _ = torch_weights.load(folder / "first_step.safetensors")
    gradients = torch_weights.group(first_step, "gradients")
    for network, norm in network_norms(gradients).items():
        logged = written["steps"][0][f"gradient_norm_{network}"]
        assert norm == pytest.approx(logged, rel=1e-5), network


def test_batches_are_those_of_training_with_image_ids_and_distances(folder):
    config = make_config(STEPS)
    arrays, _ = train.split_images(config, IMAGES)
    brightness = torch_weights.load(folder / "initial.safetensors")[0]["generator.brightness"]
    expected = batches.train_batches(arrays, 0, batch_size=config.batch_size, seed=config.seed)
    for step, (batch, _) in enumerate(zip(expected, range(STEPS), strict=False), start=1):
        arrays, _ = torch_weights.load(folder / f"batch_{step:05}.safetensors")
        assert {name: (x.dtype.name, x.shape) for name, x in arrays.items()} == {
            "good": ("float32", (4, 3, 32, 48)),
            "defective": ("float32", (4, 3, 32, 48)),
            "masks": ("float32", (4, 32, 48)),
            "image_ids": ("int32", (4,)),
            "noise": ("float32", (4, 4, 32, 48)),
            "bank_distances": ("float32", (4, 2, 16, 24)),
        }
        good = arrays["good"].transpose(0, 2, 3, 1)
        images = batch["image"] / 255
        scaled = images * brightness / images.mean(axis=(1, 2, 3), keepdims=True)
        np.testing.assert_allclose(good, scaled.clip(0, 1), atol=1e-6)
        np.testing.assert_array_equal(arrays["image_ids"], batch["image_id"])


@pytest.mark.parametrize("make", [make_config, make_paper_config])
def test_the_words_name_what_each_step_has(make):
    words = replay.in_words(make(STEPS))
    static, _ = train_state.split_options(make(STEPS))
    names = {"loss_segmentation", "loss_reconstruction", "loss_adversarial", "loss_discriminator"}
    assert names <= words.keys()
    assert ("loss_penalty" in words) == static.adversarial.penalized
    assert ("adversarial_gradients" in words) == static.adversarial.limited


def test_each_segmentation_loss_has_words_of_its_own():
    config, sentences = make_config(STEPS), []
    for kind in losses.SEGMENTATION:
        config.loss.segmentation = kind
        sentences.append(replay.in_words(config)["loss_segmentation"])
    assert len(set(sentences)) == len(sentences)


def test_without_a_bank_and_with_moments_by_the_names_of_their_parameters(tmp_path):
    config = make_config(1, bank_size=0)
    config.loss.gradient_penalty = 0.0
    replay.export(config, IMAGES, tmp_path)
    batch, _ = torch_weights.load(tmp_path / "batch_00001.safetensors")
    assert batch.keys() == {"good", "defective", "masks", "image_ids"}
    assert "memory_bank" not in json.loads((tmp_path / "replay.json").read_text())["in_words"]

    final, _ = torch_weights.load(tmp_path / "final.safetensors")
    kinds = {kind: torch_weights.group(final, kind) for kind in ("weights", "gradients")}
    assert kinds["weights"].keys() == kinds["gradients"].keys()
    # Clipped: each network by itself.
    for network, norm in network_norms(kinds["gradients"]).items():
        beta1 = 0.5 if network == "discriminator" else 0.9
        for name, gradient in kinds["gradients"].items():
            if not name.startswith(PREFIXES[network]):
                continue
            clipped = gradient * min(1, config.clip_norm / norm)
            for moment, expected in (
                ("first_moment", (1 - beta1) * clipped),
                ("second_moment", 0.001 * clipped**2),
            ):
                actual = final[f"{moment}.{name}"]
                np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-9, err_msg=name)

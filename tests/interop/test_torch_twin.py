"""The PyTorch twin with the same weights and batches: networks, losses, training, metrics."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from replays import IMAGES, export, make_config, make_paper_config

from anoseg_jax.evaluation import evaluate
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import detector, losses, predict

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import torch_networks  # noqa: E402
import torch_prediction  # noqa: E402
import torch_replay  # noqa: E402
import torch_training  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other take longer than these networks
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("replay"), make_config(STEPS))


def largest(row, *kinds):
    return max(row[kind]["difference"] for kind in kinds)


def check_in_float64(folder):
    """Returns the rows of the comparison; all must agree."""
    rows = torch_replay.compare(folder, "float64")
    assert len(rows) == STEPS
    assert largest(rows[0], "outputs") < 1e-12
    assert largest(rows[0], "gradients") < 1e-10
    for row in rows:
        assert largest(row, *torch_replay.kinds_of(rows)) < 1e-8
    return rows


def test_in_float64_outputs_gradients_and_20_steps_agree(folder):
    rows = check_in_float64(folder)
    assert {"loss_penalty", "gradient_norm_adversarial", "gradient_norm_anomaly_head"} <= {*rows[0]}
    # The report says so, and where the first difference is if the twin's step were another one.
    assert torch_replay.first_difference(rows, 1e-8) == "within 1e-08 in all of 20 steps"
    rows[1]["weights"] = {"difference": 0.5, "of": "generator.map_head.convs.0.bias"}
    report = torch_replay.first_difference(rows, 1e-8)
    assert "from step 2 on: weights by 5.0e-01 (generator.map_head.convs.0.bias)" in report


def test_in_float64_the_losses_of_the_paper_agree_too(tmp_path):
    rows = check_in_float64(export(tmp_path, make_paper_config(STEPS)))
    assert "loss_penalty" not in rows[0]


def test_distances_of_the_bank_agree_and_leave_the_image_out(folder):
    config = make_config(STEPS)
    arrays, _ = torch_weights.load(folder / "initial.safetensors")
    generator, _ = torch_networks.create(config)
    generator.load_state_dict(
        {name: tensor(x) for name, x in torch_weights.group(arrays, "generator").items()}
    )
    batch, _ = torch_weights.load(folder / "batch_00001.safetensors")
    defective, image_ids = tensor(batch["defective"]), tensor(batch["image_ids"])
    distances = generator.bank_distances(defective, image_ids)
    np.testing.assert_allclose(distances.numpy(), batch["bank_distances"], rtol=1e-3, atol=1e-3)
    good = tensor(batch["good"])
    in_bank = torch.isin(image_ids, generator.memory.source)
    assert in_bank.any()
    to_all = generator.bank_distances(good)[in_bank]
    to_others = generator.bank_distances(good, image_ids)[in_bank]
    assert bool((to_others >= to_all).all()) and not torch.equal(to_others, to_all)
    # With one image in the bank nothing is left out.
    for bank in (generator.memory, generator.coarse_memory):
        bank.source.fill_(7)
    of_one_image = generator.bank_distances(good, torch.full((len(good),), 7))
    assert torch.equal(of_one_image, generator.bank_distances(good))


def test_a_replay_of_another_format_is_refused(folder, tmp_path):
    written = json.loads((folder / "replay.json").read_text()) | {"format": "anoseg_jax replay 3"}
    (tmp_path / "replay.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="format 'anoseg_jax replay 3', must be"):
        torch_replay.compare(tmp_path, "float32")


def test_in_float32_a_step_agrees_and_our_losses_are_those_that_were_exported(folder):
    (row,) = torch_replay.compare(folder, "float32", steps=1)
    assert largest(row, "outputs") < 1e-5
    assert largest(row, "gradients") < 1e-4
    written = json.loads((folder / "replay.json").read_text())["steps"][0]
    for name, (ours, _) in row["losses"].items():
        assert written[name] == pytest.approx(ours, rel=1e-5), name


def test_report_and_curve_are_written(folder, tmp_path, monkeypatch, capsys):
    row = {"step": 1, "outputs": {"difference": 1e-9, "of": "logits"}}
    row["losses"] = {"loss_adversarial": (0.5, 0.75), "gradient_norm_anomaly_head": (1.0, 1.0)}
    monkeypatch.setattr(torch_replay, "compare", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["", str(folder), "--out", str(tmp_path / "out" / "report")])
    torch_replay.main()
    printed = capsys.readouterr().out
    assert (
        "| outputs | 1e-09 |" in printed and "| loss_adversarial | 0.50000 / 0.75000 |" in printed
    )
    for name in ("report.md", "report.json", "report.png", "report_losses.png"):
        assert (tmp_path / "out" / name).stat().st_size > 50


def tensor(array):
    return torch.from_numpy(np.array(array))


def numbers(results, path=""):
    """Yields all that is measured, by its path; thresholds are in units of the scores."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{name}.")
        elif isinstance(value, float) and "threshold" not in path + name:
            yield path + name, value


@pytest.mark.parametrize("kind", losses.SEGMENTATION)
def test_each_segmentation_loss_agrees(kind):
    rng = np.random.default_rng(1)
    logits, masks = 4 * rng.normal(size=(2, 5, 6)), rng.uniform(size=(2, 5, 6))
    logits, masks = logits.astype(np.float32), masks.astype(np.float32)
    expected = losses.SEGMENTATION[kind](logits=logits, masks=masks)
    actual = torch_training.segmentation_loss(tensor(logits), tensor(masks), kind)
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)


def test_limited_gradients_agree_below_and_above_the_limit():
    rng = np.random.default_rng(1)
    images, maps = rng.normal(size=(3, 8, 10, 3)), rng.normal(size=(3, 8, 10))
    scale = np.array([1e-4, 1e-2, 10.0])  # of each example: below, about and above the limit
    gradients = images * scale[:, None, None, None], maps * scale[:, None, None]
    with jax.enable_x64(True):
        expected, expected_norm = losses.limit_gradients(gradients)
    assert np.array_equal(expected[0][0], gradients[0][0])
    assert not np.allclose(expected[0][2], gradients[0][2])
    tensors = tensor(gradients[0].transpose(0, 3, 1, 2)), tensor(gradients[1])
    actual, norm = torch_training.limit_gradients(tensors)
    np.testing.assert_allclose(actual[0].permute(0, 2, 3, 1), expected[0], rtol=1e-12)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12)
    assert norm.item() == pytest.approx(float(expected_norm), rel=1e-12)


def test_the_gradient_penalty_agrees():
    rng = np.random.default_rng(1)
    images, maps = rng.uniform(size=(3, 8, 10, 3)), rng.uniform(size=(3, 8, 10))
    noise, weights = rng.normal(size=(3, 8, 10, 4)), rng.normal(size=(4,))

    def judge(images, maps):  # all channels count differently
        return (weights[0] * images[..., 0] + images[..., 1] * images[..., 2]) * weights[3] * maps

    def twin_judge(images, maps):
        return judge(images.permute(0, 2, 3, 1), maps)

    with jax.enable_x64(True):
        expected = losses.gradient_penalty(judge, (images, maps), judge(images, maps), noise)
    images, noise = (tensor(x.transpose(0, 3, 1, 2)) for x in (images, noise))
    pair = (images, tensor(maps))
    actual = torch_training.gradient_penalty(twin_judge, pair, twin_judge(*pair), noise)
    assert actual.item() == pytest.approx(float(expected), rel=1e-12)


def test_the_discriminators_loss_agrees():
    real, fake = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    expected = losses.discriminator_loss(real_logits=real, fake_logits=fake, smoothing=0.1)
    actual = torch_training.discriminator_loss(tensor(real), tensor(fake), 0.1)
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)


def test_without_adversarial_loss_the_discriminator_stays():
    config = make_config(STEPS)
    config.loss.adversarial_weight = 0.0
    config.memory_bank.size = 0
    training = torch_training.Training(*torch_networks.create(config), config)
    before, twice = ([p.clone() for p in training.discriminator.parameters()] for _ in "12")
    moved = [p.clone() for p in training.generator.parameters()]
    images = torch.rand(2, 3, 32, 48)
    examples = {"good": images, "defective": images}
    examples |= {"masks": torch.zeros(2, 32, 48), "image_ids": torch.arange(2)}
    metrics = training.step(examples)
    assert "loss_adversarial" not in metrics
    assert all(map(torch.equal, before, training.discriminator.parameters()))
    assert not all(map(torch.equal, moved, training.generator.parameters()))


def test_the_twins_maps_and_scores_have_the_same_metrics(folder):
    """Of generator and detector with converted weights: all of results.json that is measured."""
    config = make_config(STEPS)
    arrays, _ = torch_weights.load(folder / "final.safetensors")
    arrays = torch_weights.group(arrays, "weights")
    twin, _ = torch_networks.create(config)
    twin.load_state_dict(
        {name: tensor(x) for name, x in torch_weights.group(arrays, "generator").items()}
    )
    template = detector.template(config)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype),
        {"detector": template.detector, "discriminator": template.discriminator},
    )
    twin_detector, twin_discriminator = torch_networks.create_detector(config)
    for name, network in (("detector", twin_detector), ("discriminator", twin_discriminator)):
        weights = torch_weights.to_torch(params[name])
        network.load_state_dict({key: tensor(x) for key, x in weights.items()})

    # The generators in float64: rounding would put pixels into another order.
    twin.double()
    with jax.enable_x64(True):
        state, static, _ = torch_replay.create_state(config, arrays, "float64")
    our_predict = partial(
        predict.predict_fn,
        {"params": state.generator, "memory_bank": state.memory_bank},
        generator=static.generator,
        options=predict.bank_options(config.memory_bank),
        top_fraction=0.01,
    )
    detector_static, _ = detector.split_options(config)
    our_detect = partial(
        predict.detect_fn,
        params | {"brightness": np.float32(state.memory_bank.brightness)},
        detector=detector_static.detector,
        discriminator=detector_static.discriminator,
    )

    def of_ours(images):
        with jax.enable_x64(True):
            maps, scores, _ = map(np.float32, jax.jit(our_predict)(images))
        detected = np.asarray(jax.jit(our_detect)(images, maps))
        return maps, {"map": scores, "detector": detected}

    def of_twin(images):
        images = tensor(images.transpose(0, 3, 1, 2)) / 255
        maps, scores, _ = torch_prediction.predict(twin, images.double(), top_fraction=0.01)
        maps, scores = maps.float(), scores.float()
        detected = torch_prediction.detect(twin, twin_detector, twin_discriminator, images, maps)
        return maps.numpy(), {"map": scores.numpy(), "detector": detected.numpy()}

    images = IMAGES.copy()
    images[0] //= 4  # more than the largest factor of the brightness makes up for
    images[1] = 255 - images[1] // 4
    batch = {
        "image": images,
        "mask": np.zeros(images.shape[:3], np.uint8),
        "label": np.arange(8) // 4,
        "has_mask": np.ones(8, bool),
        "defect_type": np.array(["good", "hole"])[np.arange(8) // 4],
        "name": np.array([f"test/{i}.png" for i in range(8)]),
    }
    batch["mask"][4:, 4:12, 8:20] = 1
    (ours_maps, ours_scores), (twin_maps, twin_scores) = (f(images) for f in (of_ours, of_twin))
    np.testing.assert_allclose(twin_maps, ours_maps, atol=1e-5)
    for kind in ours_scores:
        np.testing.assert_allclose(twin_scores[kind], ours_scores[kind], rtol=1e-4, err_msg=kind)
    ours, twins = (
        evaluate.measure([(batch, maps, scores)], metadata={}, image_size=(32, 48)).results
        for maps, scores in ((ours_maps, ours_scores), (twin_maps, twin_scores))
    )
    compared = dict(numbers(ours))
    assert {"pixel_ap", "au_pro", "image_scores.detector.image_auroc"} <= compared.keys()
    assert dict(numbers(twins)) == pytest.approx(compared, abs=1e-6)

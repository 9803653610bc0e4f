"""Weights to a state_dict of PyTorch and back; PyTorch is not needed."""

import json
import re

import jax
import numpy as np
import pytest
import tiny_config

from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import detector, predict, train_state
from anoseg_jax.running import checkpoint

CONFIG = tiny_config.get_config("bolt")


def no_bank():
    config = tiny_config.get_config("bolt")
    config.memory_bank.size = 0
    return config


def random_like(template, seed=0):
    """Returns random arrays of the shapes and dtypes of `template`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(10 * rng.normal(size=x.shape), x.dtype), template)


def generator_template(config=CONFIG):
    state = train_state.template(config)
    generator = torch_weights.generator_arrays(state.generator, state.memory_bank)
    return {"generator": generator, "discriminator": state.discriminator}


def detector_template():
    state = detector.template(CONFIG)
    return {"detector": state.detector, "discriminator": state.discriminator}


@pytest.mark.parametrize("case", ["bank", "no bank", "detector"])
def test_there_and_back_changes_no_bit_and_no_name(case):
    template = detector_template() if case == "detector" else None
    template = template or generator_template(CONFIG if case == "bank" else no_bank())
    params = random_like(template)
    arrays = torch_weights.to_torch(params)
    back = torch_weights.from_torch(arrays, template)
    assert checkpoint.arrays_sha256(back) == checkpoint.arrays_sha256(params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert len(arrays) == len(jax.tree.leaves(params))


def test_names_are_those_of_the_modules_in_pytorch():
    generator, networks = (
        torch_weights.to_torch(random_like(template))
        for template in (generator_template(), detector_template())
    )
    banks = {name for name in generator if "memory." in name}
    arrays = "basis|centre|mean|patches|place|source|spread"
    assert len(banks) == 2 * 7
    assert all(re.fullmatch(rf"generator.(memory|coarse_memory).({arrays})", x) for x in banks)
    layers = r"blocks\.\d\.(conv\.weight|norm\.(weight|bias))|convs\.\d\.(weight|bias)"
    modules = r"generator\.(reconstructor|map_head)|discriminator|detector\.reconstructor"
    banks.add("generator.brightness")
    assert banks <= generator.keys()
    for name in {*generator, *networks} - banks:
        assert re.fullmatch(rf"({modules})\.({layers})", name), name


def test_kernels_are_transposed_and_other_arrays_are_not():
    params = random_like(generator_template())["discriminator"]
    arrays = torch_weights.to_torch(params)
    by_shape = lambda leaves: {x.shape: x for x in leaves}  # noqa: E731
    ours, pytorchs = by_shape(jax.tree.leaves(params)), by_shape(arrays.values())
    width, channels = CONFIG.model.discriminator_width, 4 * 6  # image, map and coordinates, folded
    kernel = ours[3, 3, channels, width]
    np.testing.assert_array_equal(pytorchs[width, channels, 3, 3], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(arrays["convs.1.bias"], ours[1,])


def test_all_that_does_not_fit_is_listed_at_once():
    template = generator_template()
    arrays = torch_weights.to_torch(random_like(template))
    arrays["generator.extra"] = arrays.pop("discriminator.convs.0.bias")
    arrays["discriminator.convs.0.weight"] = np.zeros((8, 24, 3, 1), np.float32)
    arrays["generator.memory.source"] = np.zeros(64, np.float32)
    with pytest.raises(torch_weights.WeightsError) as error:
        torch_weights.from_torch(arrays, template)
    assert sorted(str(error.value).splitlines()) == [
        "discriminator.convs.0.weight: float32 [8, 24, 3, 1], must be float32 [8, 24, 3, 3]",
        "generator.memory.source: float32 [64], must be int32 [64]",
        "missing: discriminator.convs.0.bias",
        "not known: generator.extra",
    ]


def write(path, arrays, config=CONFIG, **metadata):
    metadata = {"config": json.loads(config.to_json())} | metadata
    torch_weights.save(path, torch_weights.to_torch(arrays), metadata)


def there_and_back(path, folder):
    """Imports a file into a folder, exports it again and returns the metadata of the new file.

    Both files must hold the same bits.
    """
    again = path.with_name("again.safetensors")
    assert torch_weights.main(["import", str(path), str(folder)]) == 0
    assert torch_weights.main(["export", str(folder), str(again)]) == 0
    arrays, _ = torch_weights.load(path)
    back, metadata = torch_weights.load(again)
    bits = [{k: (v.dtype, v.tobytes()) for k, v in x.items()} for x in (arrays, back)]
    assert bits[0] == bits[1]
    return metadata


@pytest.mark.parametrize("case", ["bank", "no bank"])
def test_a_file_becomes_a_checkpoint_that_predicts_and_the_same_file_again(case, tmp_path):
    config = CONFIG if case == "bank" else no_bank()
    params = random_like(generator_template(config))
    file = tmp_path / "model.safetensors"
    write(file, params, config, step=5)
    assert there_and_back(file, tmp_path / "run")["step"] == 5
    bank = params["generator"].pop("memory_bank", None)
    variables = predict.variables_of({"ema": params["generator"], "memory_bank": bank})
    sha256 = checkpoint.arrays_sha256(variables)
    predictor = TrainedModel(tmp_path / "run")
    assert predictor.weights_sha256 == sha256
    assert predictor.step == 5

    if bank:
        detector_params = random_like(detector_template(), seed=1)
        record = {"generator_sha256": sha256, "train_seconds": 1.0}
        file = tmp_path / "detector.safetensors"
        write(file, detector_params, record=record)
        assert there_and_back(file, tmp_path / "run" / "detector")["step"] == 0
        predictor = TrainedModel(tmp_path / "run", detector=True)
        expected = checkpoint.arrays_sha256(detector_params["detector"])
        assert predictor.detector.weights_sha256 == expected


def test_an_imported_state_has_the_structure_of_a_trained_one(tmp_path):
    template = train_state.template(CONFIG)
    write(tmp_path / "model.safetensors", random_like(generator_template()), step=5)
    torch_weights.import_checkpoint(tmp_path / "model.safetensors", tmp_path / "run")
    with checkpoint.open_manager(tmp_path / "run" / "checkpoints") as manager:
        state = checkpoint.restore(manager, template=template).state
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (state, template)]
    assert shapes[0] == shapes[1]
    assert int(state.step) == 5
    optimizers = jax.tree.leaves((state.generator_opt, state.discriminator_opt))
    assert {int(x) for x in optimizers if x.dtype.kind == "i"} == {5}
    assert not any(x.any() for x in optimizers if x.dtype.kind == "f")


@pytest.mark.parametrize(
    "case, message",
    [
        ("no file", "not a safetensors file"),
        ("no config", "no config among its metadata"),
        ("old options", "was written by an older version of anoseg_jax"),
        ("old format", "was written by an older version of anoseg_jax"),
        ("no generator_sha256", "no record with generator_sha256"),
        ("used", "has checkpoints: name a folder without"),
    ],
)
def test_a_file_or_folder_that_cannot_be_used_is_refused_in_one_line(
    case, message, tmp_path, capsys
):
    path, config = tmp_path / "weights.safetensors", json.loads(CONFIG.to_json())
    if case == "no file":
        path.write_text("text")
    elif case == "no config":
        torch_weights.save(path, {"generator.x": np.zeros(1)}, {})
    elif case == "old options":
        del config["memory_bank"]
        config["model"]["memory"] = 64
        torch_weights.save(path, {"generator.x": np.zeros(1)}, {"config": config})
    elif case == "old format":
        metadata = {"config": config, "record": {"format": checkpoint.FORMAT - 1}}
        torch_weights.save(path, {"generator.x": np.zeros(1)}, metadata)
    else:
        write(path, random_like(detector_template()))
    if case == "used":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert torch_weights.main(["import", str(path), str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert torch_weights.main(["export", str(tmp_path / "none"), str(path)]) == 2

"""Weights as a state_dict of PyTorch's and back; PyTorch is not needed."""

import json

import jax
import numpy as np
import pytest

from anoseg_jax.interop import torch_weights
from anoseg_jax.method import detector, predict, train
from anoseg_jax.running import checkpoint
from configs import test as test_config

CONFIG = test_config.get_config("bolt")


def drawn(template, seed=0):
    """Random parameters of the shapes of `template`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), template)


def shapes_of(parts):
    return jax.eval_shape(parts.create_state, jax.ShapeDtypeStruct((4, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def template():
    state = shapes_of(train.create_parts(CONFIG))
    return {"generator": state.generator, "discriminator": state.discriminator}


@pytest.fixture(scope="module")
def detector_template():
    state = shapes_of(detector.create_parts(CONFIG, {}))
    return {"detector": state.generator, "discriminator": state.discriminator}


@pytest.mark.parametrize("networks", ["template", "detector_template"])
def test_there_and_back_changes_no_bit_and_no_name(networks, request):
    template = request.getfixturevalue(networks)
    params = drawn(template)
    arrays = torch_weights.to_torch(params)
    back = torch_weights.from_torch(arrays, template)
    assert checkpoint.params_sha256(back) == checkpoint.params_sha256(params)
    assert len(arrays) == len(jax.tree.leaves(params))
    assert not [name for name in arrays if "_0" in name]  # all of Flax's names have another


def test_layouts_and_names_are_pytorchs():
    block = {"Conv_0": {"kernel": np.zeros((3, 5, 7, 11))}, "GroupNorm_0": {"scale": np.zeros(11)}}
    head = {"kernel": np.arange(6).reshape(2, 3), "bias": np.zeros(3)}
    arrays = torch_weights.to_torch({"MapHead_0": {"ConvBlock_2": block, "Dense_0": head}})
    assert {name: array.shape for name, array in arrays.items()} == {
        "map_head.blocks.2.conv.weight": (11, 7, 3, 5),
        "map_head.blocks.2.norm.weight": (11,),
        "map_head.Dense_0.weight": (3, 2),
        "map_head.Dense_0.bias": (3,),
    }
    assert arrays["map_head.Dense_0.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_all_that_does_not_fit_is_listed_at_once(template):
    arrays = torch_weights.to_torch(drawn(template))
    arrays["generator.extra"] = arrays.pop("discriminator.convs.0.bias")
    arrays["discriminator.convs.0.weight"] = np.zeros((8, 24, 3, 1), np.float32)
    arrays["generator.memory.place"] = np.zeros((), np.float64)
    with pytest.raises(torch_weights.WeightsError) as error:
        torch_weights.from_torch(arrays, template)
    assert sorted(str(error.value).splitlines()) == [
        "discriminator.convs.0.weight: float32 [8, 24, 3, 1], must be float32 [8, 24, 3, 3]",
        "generator.memory.place: float64 [], must be float32 []",
        "missing: discriminator.convs.0.bias",
        "not known: generator.extra",
    ]


def write(path, params, **metadata):
    metadata = {"config": json.loads(CONFIG.to_json())} | metadata
    torch_weights.save(path, torch_weights.to_torch(params), metadata)


def test_a_file_becomes_a_checkpoint_that_predicts_and_the_same_file_again(
    template, detector_template, tmp_path
):
    run, names = tmp_path / "run", ("model", "detector")
    params = dict(zip(names, (drawn(template), drawn(detector_template, seed=1)), strict=True))
    sha256 = checkpoint.params_sha256(params["model"]["generator"])
    write(tmp_path / "model.safetensors", params["model"], step=5)
    record = {"generator_sha256": sha256, "train_seconds": 1.0}
    write(tmp_path / "detector.safetensors", params["detector"], record=record)
    for name, folder in zip(names, (run, run / "detector"), strict=True):
        first, again = (tmp_path / f"{name}{more}.safetensors" for more in ("", "_again"))
        assert torch_weights.main(["import", str(first), str(folder)]) == 0
        assert torch_weights.main(["export", str(folder), str(again)]) == 0
        arrays, _ = torch_weights.load(first)
        back, metadata = torch_weights.load(again)
        assert metadata["step"] == (5 if name == "model" else 0)
        assert {k: v.tobytes() for k, v in back.items()} == {
            k: v.tobytes() for k, v in arrays.items()
        }
    predictor = predict.Predictor(run, detector=True)
    assert checkpoint.params_sha256(predictor.params) == sha256
    assert predictor.step == 5
    expected = checkpoint.params_sha256(params["detector"]["detector"])
    assert predictor.detector.params_sha256 == expected


@pytest.mark.parametrize(
    "case, message",
    [
        ("no file", "not a file that this program can read"),
        ("no config", "no config among its metadata"),
        ("no generator_sha256", "no record with generator_sha256"),
        ("used", "has checkpoints: name a folder without"),
    ],
)
def test_a_file_or_folder_that_cannot_be_used_is_refused_in_one_line(
    case, message, detector_template, tmp_path, capsys
):
    path = tmp_path / "weights.safetensors"
    if case == "no file":
        path.write_text("text")
    elif case == "no config":
        torch_weights.save(path, {"generator.x": np.zeros(1)}, {})
    else:
        write(path, drawn(detector_template))
    if case == "used":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert torch_weights.main(["import", str(path), str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert torch_weights.main(["export", str(tmp_path / "none"), str(path)]) == 2

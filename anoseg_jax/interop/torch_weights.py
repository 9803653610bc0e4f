"""Converts weights to PyTorch and back: a state_dict of numpy arrays, in a safetensors file.

    python -m anoseg_jax.interop.torch_weights export W/screw screw.safetensors
    python -m anoseg_jax.interop.torch_weights import screw.safetensors W2/screw

The image-level detector in `W/screw/detector` is converted in the same way. PyTorch is not needed.
Names and layouts: docs/pytorch.md.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils.epath import Path
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.method import detector, memory_bank, train_state
from anoseg_jax.method.memory_bank import MemoryBank
from anoseg_jax.running import checkpoint, files

# Names of modules, parameters and memory banks here, and in PyTorch; all others are the same.
NAMES = (
    (r"\bConvBlock_(\d+)\.Conv_0\b", r"blocks.\1.conv"),
    (r"\bConvBlock_(\d+)\.GroupNorm_0\b", r"blocks.\1.norm"),
    (r"\bConv_(\d+)\b", r"convs.\1"),
    (r"\bReconstructor_0\b", "reconstructor"),  # the detector's; the generator's has a name
    (r"\banomaly_head\b", "map_head"),
    (r"\bmemory_bank\.fine\b", "memory"),
    (r"\bmemory_bank\.coarse\b", "coarse_memory"),
    (r"\bmemory_bank\.brightness\b", "brightness"),
    (r"\.patch_image_ids$", ".source"),
    (r"\.position_scale$", ".place"),
    (r"\.distance_mean$", ".centre"),
    (r"\.distance_std$", ".spread"),
    (r"\.(kernel|scale)$", ".weight"),
)


class WeightsError(UsageError):
    """Weights that cannot be converted; the message has a line for each problem."""


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the name in a state_dict of the array at `path`."""
    name = ".".join(path)
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the order of an array's axes in PyTorch.

    Only kernels are transposed: HWIO -> OIHW, or [in, out] -> [out, in].
    """
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def generator_arrays(params: Mapping[str, Any], bank: MemoryBank | None) -> dict[str, Any]:
    """Returns the generator's parameters and its memory bank, if any, as one tree of dicts."""
    return {**params, **({"memory_bank": to_state_dict(bank)} if bank else {})}


def to_torch(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns nested dicts of arrays as a state_dict of numpy arrays.

    `arrays` are Flax parameters, or those of several networks: {"generator": `generator_arrays`,
    "discriminator": ...}, whose names then come first.
    """
    flat = flatten_dict(jax.device_get(arrays))
    return {
        torch_name(path): np.array(np.transpose(leaf, axes(path, np.ndim(leaf))), order="C")
        for path, leaf in flat.items()
    }


def from_torch(state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict:
    """Returns the nested dicts of a state_dict: the inverse of `to_torch`, to the bit.

    `template` has arrays or shapes (`jax.eval_shape`) in the result's structure.

    Raises WeightsError, listing all names, shapes and dtypes that differ from the template's.
    """
    flat = flatten_dict(template)
    names = {torch_name(path): path for path in flat}
    wrong = [f"missing: {name}" for name in names if name not in state_dict]
    wrong += [f"not known: {name}" for name in state_dict if name not in names]
    arrays = {}
    for name in names.keys() & state_dict.keys():
        path, array = names[name], np.asarray(state_dict[name])
        leaf, order = flat[path], axes(path, len(flat[path].shape))
        expected = tuple(leaf.shape[i] for i in order)
        if array.shape != expected or array.dtype != leaf.dtype:
            wrong.append(
                f"{name}: {array.dtype} {list(array.shape)}, must be {leaf.dtype} {list(expected)}"
            )
            continue
        arrays[path] = np.array(np.transpose(array, np.argsort(order)), order="C")
    if wrong:
        raise WeightsError("\n".join(sorted(wrong)))
    return unflatten_dict({path: arrays[path] for path in flat})


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes arrays as safetensors; each value of `metadata` becomes JSON in the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {key: json.dumps(value) for key, value in metadata.items()}
    files.write_bytes(path, safetensors.numpy.save(dict(arrays), header))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and metadata of a safetensors file; WeightsError if it is not one."""
    try:
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
        # The format: the header's length in 8 bytes, then the header.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
        return arrays, {key: json.loads(value) for key, value in metadata.items()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error


def group(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Returns the state_dict of one network from that of several."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}


def export_checkpoint(folder: Path, path: Path) -> None:
    """Writes the newest checkpoint of a run's folder to a file.

    The file holds the averaged weights, the generator's memory bank and the discriminator, with
    `config`, `record` and `step` of the checkpoint as metadata.
    """
    state, config, record, step = checkpoint.restore_newest(folder / "checkpoints")
    arrays = {"discriminator": state["discriminator"]}
    if "detector" in state:
        arrays["detector"] = state["ema"]
    else:
        bank = memory_bank.from_dicts(state["memory_bank"])
        arrays["generator"] = generator_arrays(state["ema"], bank)
    save(path, to_torch(arrays), {"config": config, "record": record, "step": step})


def import_checkpoint(path: Path, folder: Path) -> None:
    """Makes a checkpoint from a file's weights, in a folder that has no checkpoints.

    The file's metadata must have `config`; for a detector also `record`, with the
    `generator_sha256` of the generator that it was trained for. Without `step` the weights are of
    step 0. The training weights become the averaged ones, and the optimizers' moments are zero.

    Raises:
      WeightsError: the file has no config, or one of an older version, or its arrays do not fit the
        config; or the folder has checkpoints.
    """
    arrays, metadata = load(path)
    if "config" not in metadata:
        raise WeightsError(f"{path}: no config among its metadata: add that run's config.json")
    written_as = metadata.get("record", {}).get("format", checkpoint.FORMAT)
    has_options = "position_weight" in metadata["config"].get("memory_bank", {})
    if written_as != checkpoint.FORMAT or not has_options:
        raise WeightsError(
            f"{path} was written by an older version of anoseg_jax, which this one cannot read: "
            "train again and export the new weights"
        )
    if (folder / "checkpoints").exists():
        raise WeightsError(f"{folder} has checkpoints: name a folder without")
    config, step = ConfigDict(metadata["config"]), metadata.get("step", 0)
    record = {"train_seconds": 0.0, "images_sha256": "unknown"} | metadata.get("record", {})
    is_detector = any(name.startswith("detector.") for name in arrays)
    if is_detector and "generator_sha256" not in record:
        raise WeightsError(f"{path}: no record with generator_sha256 among its metadata")
    template = (detector if is_detector else train_state).template(config)

    shapes = {player: getattr(template, player) for player in template.PLAYERS}
    if not is_detector:
        shapes["generator"] = generator_arrays(template.generator, template.memory_bank)
    params = from_torch(arrays, shapes)
    # The counts of steps (the schedule's, Adam's) continue from `step`.
    state = jax.tree.map(
        lambda x: np.full(x.shape, step if x.dtype.kind == "i" else 0, x.dtype), template
    )
    if not is_detector:
        bank = params["generator"].pop("memory_bank", None)
        state = state.replace(memory_bank=memory_bank.from_dicts(bank))
    state = state.replace(**params, ema=params[template.PLAYERS[0]])
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, state, step, config=metadata["config"], record=record)
    files.write_text(folder / "config.json", config.to_json(indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. Errors are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m anoseg_jax.interop.torch_weights")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint -> file")
    export.add_argument("folder", type=Path, help="W/<category>, or W/<category>/detector")
    export.add_argument("file", type=Path, help="written: .safetensors")
    back = commands.add_parser("import", help="file -> checkpoint")
    back.add_argument("file", type=Path, help=".safetensors, with its config as metadata")
    back.add_argument("folder", type=Path, help="of the new run")
    flags = parser.parse_args(arguments)
    try:
        if flags.command == "export":
            export_checkpoint(flags.folder, flags.file)
        else:
            import_checkpoint(flags.file, flags.folder)
    except (UsageError, FileNotFoundError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

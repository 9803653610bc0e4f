"""Weights for PyTorch and back: Flax parameters as a state_dict of numpy arrays, and its files.

    python -m anoseg_jax.interop.torch_weights export W/screw screw.safetensors
    python -m anoseg_jax.interop.torch_weights import screw.safetensors W2/screw

A folder of the image-level detector, `W/screw/detector`, is converted alike. PyTorch is not needed.
Names and layouts: docs/pytorch.md.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.method import detector, train
from anoseg_jax.running import checkpoint, files

# Flax's names of modules and parameters, and PyTorch's; what is not listed stays.
NAMES = (
    (r"\bConvBlock_(\d+)\.Conv_0\b", r"blocks.\1.conv"),
    (r"\bConvBlock_(\d+)\.GroupNorm_0\b", r"blocks.\1.norm"),
    (r"\bConv_(\d+)\b", r"convs.\1"),
    (r"\bReconstructor_0\b", "reconstructor"),
    (r"\bMapHead_0\b", "map_head"),
    (r"\bPatchMemory_0\.memory\b", "memory"),
    (r"\bPatchMemory_1\.memory\b", "coarse_memory"),
    (r"\.(kernel|scale)$", ".weight"),
)


class WeightsError(UsageError):
    """Weights that cannot be converted; a line for each thing that is wrong."""


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the name in a state_dict of the Flax parameter at `path`."""
    name = ".".join(path)
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the order of a Flax parameter's axes in PyTorch.

    Of kernels HWIO -> OIHW or [in, out] -> [out, in]; all else is as it is.
    """
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns Flax parameters (or what has their structure) as a state_dict of numpy arrays.

    Several networks, {"generator": .., "discriminator": ..}, have their names in front.
    """
    flat = flax.traverse_util.flatten_dict(jax.device_get(params))
    return {
        torch_name(path): np.array(np.transpose(leaf, axes(path, np.ndim(leaf))), order="C")
        for path, leaf in flat.items()
    }


def from_torch(state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict:
    """Returns the Flax parameters of a state_dict: the inverse of `to_torch`, to the bit.

    Args:
      state_dict: numpy arrays by name.
      template: parameters of the same structure: arrays or what `jax.eval_shape` returns.

    Raises:
      WeightsError: names, shapes or dtypes are others than the template's; all of them are listed.
    """
    flat = flax.traverse_util.flatten_dict(template)
    names = {torch_name(path): path for path in flat}
    wrong = [f"missing: {name}" for name in names if name not in state_dict]
    wrong += [f"not known: {name}" for name in state_dict if name not in names]
    params = {}
    for name, path in names.items():
        if name not in state_dict:
            continue
        array, leaf = np.asarray(state_dict[name]), flat[path]
        order = axes(path, len(leaf.shape))
        expected = tuple(leaf.shape[i] for i in order)
        if array.shape != expected or array.dtype != leaf.dtype:
            wrong.append(
                f"{name}: {array.dtype} {list(array.shape)}, must be {leaf.dtype} {list(expected)}"
            )
            continue
        params[path] = np.array(np.transpose(array, np.argsort(order)), order="C")
    if wrong:
        raise WeightsError("\n".join(wrong))
    return flax.traverse_util.unflatten_dict(params)


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes arrays as safetensors; each value of `metadata` becomes JSON in the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {key: json.dumps(value) for key, value in metadata.items()}
    files.write_bytes(path, safetensors.numpy.save(dict(arrays), header))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a safetensors file and its metadata; WeightsError if it is none."""
    try:
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
        # The format: the header's length in 8 bytes, then the header.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
        return arrays, {key: json.loads(value) for key, value in metadata.items()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a file that this program can read ({error})") from error


def group(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Returns the state_dict of one network out of that of several."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}


def export_checkpoint(folder: Path, path: Path) -> None:
    """Writes the newest checkpoint of a run's folder to a file: averaged weights, discriminator.

    Metadata: `config`, `record` and `step` of the checkpoint.
    """
    state, config, record, step = checkpoint.restore_newest(folder / "checkpoints")
    network = "detector" if "generator_sha256" in record else "generator"
    arrays = to_torch({network: state["ema"], "discriminator": state["discriminator"]})
    save(path, arrays, {"config": config, "record": record, "step": step})


def import_checkpoint(path: Path, folder: Path) -> None:
    """Makes a checkpoint of a file's weights in a folder that has none.

    The file needs `config` among its metadata, that of a detector also `record` with the
    `generator_sha256` it was trained for; without `step` the weights are of step 0. The training
    weights are the averaged ones, and the optimizers' averages start at zero.

    Raises:
      WeightsError: the file lacks its config or does not fit it, or the folder has checkpoints.
    """
    arrays, metadata = load(path)
    if "config" not in metadata:
        raise WeightsError(f"{path}: no config among its metadata: add that run's config.json")
    if (folder / "checkpoints").exists():
        raise WeightsError(f"{folder} has checkpoints: name a folder without")
    config, step = ConfigDict(metadata["config"]), metadata.get("step", 0)
    record = metadata.get("record", {"train_seconds": 0.0})
    of_detector = any(name.startswith("detector.") for name in arrays)
    if of_detector and "generator_sha256" not in record:
        raise WeightsError(f"{path}: no record with generator_sha256 among its metadata")
    network = "detector" if of_detector else "generator"
    parts = detector.create_parts(config, {}) if of_detector else train.create_parts(config)
    images = jax.ShapeDtypeStruct((4, *config.image_size, 3), np.uint8)
    template = jax.eval_shape(parts.create_state, images)
    params = from_torch(
        arrays, {network: template.generator, "discriminator": template.discriminator}
    )
    # Counts (of the schedule, of Adam) go on from `step`.
    state = jax.tree.map(
        lambda x: np.full(x.shape, step if x.dtype.kind == "i" else 0, x.dtype), template
    ).replace(generator=params[network], discriminator=params["discriminator"], ema=params[network])
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, state, step, config=metadata["config"], record=record)
    (folder / "config.json").write_text(config.to_json(indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. Errors of use are lines without a traceback."""
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

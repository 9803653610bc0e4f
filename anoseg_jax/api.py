"""Training from Python in one call; `anoseg_jax.fit` and `anoseg_jax.Predictor` are imported here.

Options are loaded by the name of their file, as the command does.
"""

import concurrent.futures
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from anoseg_jax import config_files
from anoseg_jax import options as config_options
from anoseg_jax.deploy.predictor import Photograph, Predictor, Reading, list_photographs, load
from anoseg_jax.images import check
from anoseg_jax.images.decode import LayoutError, printable
from anoseg_jax.images.examples import Example, ReadOptions
from anoseg_jax.images.layouts import GOOD
from anoseg_jax.method import detector, train
from anoseg_jax.running import distributed

__all__ = ["Predictor", "fit"]


def fit(
    photographs: epath.PathLike | Iterable[Photograph] | np.ndarray,
    folder: epath.PathLike,
    options: Mapping[str, Any] | None = None,
    *,
    config: str | ConfigDict = "default",
) -> Predictor:
    """Trains a model on photographs of good parts, or resumes, and returns its predictor.

    `fit("photos/good", "W/bolt", {"num_steps": 500}, config="cpu")`

    Args:
      photographs: a folder, a list of files, arrays or PIL images of any size, or an array uint8
        [n, h, w, 3].
      folder: where the model is kept. If it has checkpoints of the same photographs and options,
        training resumes from the newest.
      options: values by their path in configs/default.py, for example {"model.width": 16}.
      config: what the other options are: the name of a file in configs/, or options. "default" is
        for accelerators; take "cpu" without one.

    Raises:
      LayoutError: files cannot be read; names them.
      OptionError: an option cannot work.
      loop.TrainingError: photographs or options differ from those of the checkpoint, or a loss is
        not finite.
    """
    folder = epath.Path(folder).expanduser()
    chosen = config_files.load(config) if isinstance(config, str) else config
    chosen = config_options.changed(chosen, nested(options or {}))
    chosen = config_options.of_category(chosen, folder.name)
    config_options.check_devices(chosen)
    config_options.use_compilation_cache(chosen.compilation_cache)
    several = list_photographs(photographs)
    if not several:
        raise ValueError(
            "fit needs several photographs of good parts: a folder, a list or an array"
        )
    with chosen.unlocked():
        chosen.bit_depth = choose_bit_depth(several, chosen)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        load_one = partial(load, how=Reading.of(chosen))
        images = np.stack([loaded.image for loaded in pool.map(load_one, several)])
    with distributed.lock(folder):
        train.fit(chosen, images, folder)
        if chosen.detector.enabled:
            detector.fit(chosen, images, folder)
    return Predictor(folder)


def choose_bit_depth(photographs: Sequence[Photograph], config: ConfigDict) -> str:
    """Returns the option `bit_depth` that holds all files; "auto" if there are arrays among them.

    Raises LayoutError, a line for each file that cannot be used.
    """
    is_file = [isinstance(photograph, str | os.PathLike) for photograph in photographs]
    if not all(is_file):
        return config.bit_depth
    paths = map(epath.Path, photographs)
    examples = [Example(path, (), GOOD, printable(path)) for path in paths]
    checked = check.check_files(examples, ReadOptions.of(config))
    errors = [error for one in checked for error in one.errors]
    if not errors:
        bit_depth = check.choose_bit_depth(checked, config.bit_depth)
        errors = check.bit_depth_errors(checked, bit_depth)
    if errors:
        raise LayoutError("\n".join(errors))
    return str(bit_depth)


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options by their path, {"model.width": 16}, as nested dicts.

    One number as image_size is a square.
    """
    tree: dict[str, Any] = {}
    for path, value in options.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = (value,) if path == "image_size" and isinstance(value, int) else value
    return tree

"""Options of a run: those of a variant and of a category, and whether they fit together."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.method import defects, losses, models

PATHS = ("data_dir", "tfds_dir", "maps_dir", "resume", "compilation_cache")
# What all variants of a run share.
SHARED_BY_VARIANTS = (
    "dataset data_dir tfds_dir categories category_options seed seeds shard variants "
    "compilation_cache layout mask_suffix ignore_name bit_depth max_megapixels"
).split()
# What all categories of a run share: the same, but a category may set its own seed.
SHARED_BY_CATEGORIES = tuple(key for key in SHARED_BY_VARIANTS if key != "seed")


class OptionError(UsageError):
    """An option that cannot work; the message is one line that names it and says what would."""


def normalize(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which paths are without "~", and one number as image_size is a square."""
    config = config.copy_and_resolve_references()
    for key in PATHS:
        config[key] = os.path.expanduser(config[key])
    if len(config.image_size) == 1:
        config.image_size = 2 * tuple(config.image_size)
    return config


def check(config: ConfigDict, *, training: bool = True) -> None:
    """Raises OptionError, naming the first option that cannot work, before anything is read.

    Whether the batch fits the devices matters for `training` only.
    """
    if len(config.image_size) != 2 or min(config.image_size) < 1:
        raise OptionError(
            f"image_size={tuple(config.image_size)} must be height and width in pixels, for "
            "example (256, 256)"
        )
    threshold = config.evaluate.pixel_threshold
    if threshold is not None and not config.maps_dir and not 0 <= threshold <= 1:
        raise OptionError(
            f"evaluate.pixel_threshold={threshold:g} must be from 0 to 1, the range of the maps"
        )
    if config.maps_dir:
        where = f"maps_dir={config.maps_dir!r}"
        if training:
            raise OptionError(f"{where} is for --mode=evaluate: there is nothing to train")
        if config.seeds:
            raise OptionError(f"{where} holds one run's maps: seeds={config.seeds} must be empty")
        if not Path(config.maps_dir).is_dir():
            raise OptionError(f"{where} is no folder; it holds <category>/<defect type>/<stem>.npy")
    shard_of(config.shard)
    devices = jax.device_count() if training else 1
    parts = devices * max(1, config.accumulate)
    if config.batch_size < 1 or (training and config.batch_size % parts):
        times = f", times accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise OptionError(
            f"batch_size={config.batch_size} must be a multiple of the {devices} devices{times}, "
            f"for example {max(1, config.batch_size // parts) * parts}"
        )
    for key, value in (
        *((key, config[key]) for key in "accumulate num_steps log_every checkpoint_every".split()),
        ("detector.num_steps", config.detector.num_steps),
    ):
        if value < 1:
            raise OptionError(f"{key}={value} must be at least 1")
    for key in ("held_out", "evaluate.top_fraction"):
        value = config.evaluate.top_fraction if "." in key else config[key]
        if not 0 <= value < 1:
            raise OptionError(f"{key}={value} must be from 0 to less than 1")
    for key, value, choices in (
        ("defects.preset", config.defects.preset, defects.PRESETS),
        ("loss.segmentation", config.loss.segmentation, losses.SEGMENTATION),
        ("loss.reconstruction", config.loss.reconstruction, losses.RECONSTRUCTION),
        ("loss.adversarial", config.loss.adversarial, losses.ADVERSARIAL),
        ("evaluate.image_score", config.evaluate.image_score, ("map", "detector")),
        ("dataset", config.dataset, ("folder", "mvtec_ad", "synthetic_ad")),
    ):
        if value not in choices:
            raise OptionError(f"{key}={value!r} must be one of {', '.join(choices)}")
    if config.evaluate.image_score == "detector" and not config.detector.enabled:
        raise OptionError("evaluate.image_score='detector' needs detector.enabled=True")
    grid = config.defects.hard_augmentation.grid
    if not 1 <= grid <= min(config.image_size):
        raise OptionError(f"defects.hard_augmentation.grid={grid} must fit the image's pixels")
    try:
        models.create(config.model, config.loss)
        models.create_detector(config.model, config.detector)
        models.check_size(config.image_size, config.model.depth)
        models.check_size(config.image_size, config.model.discriminator_depth)
        check_memory_bank(config.memory_bank, config.image_size)
    except ValueError as error:
        raise OptionError(str(error)) from error


def check_memory_bank(bank: ConfigDict, image_size: tuple[int, int]) -> None:
    """Raises OptionError, naming the first option of `config.memory_bank` that cannot work."""
    if bank.size < 0:
        raise OptionError(f"memory_bank.size={bank.size} must be at least 0, which is no bank")
    if not bank.size:
        return
    for key, least in (
        *(("patch", 2), ("stride", 1), ("components", 1), ("candidates_per_patch", 1)),
        ("num_bank_images", 4),
    ):
        if bank[key] < least:
            raise OptionError(f"memory_bank.{key}={bank[key]} must be at least {least}")
    quarter = min(image_size) // 4
    if bank.patch > quarter:
        raise OptionError(
            f"memory_bank.patch={bank.patch} must fit a quarter of the image, {quarter} pixels of "
            f"image_size={tuple(image_size)}"
        )
    if any(side % (4 * bank.stride) for side in image_size):
        raise OptionError(
            f"memory_bank.stride={bank.stride}: a quarter of image_size={tuple(image_size)} must "
            "be a multiple of it"
        )
    if bank.components > 3 * bank.patch**2:
        raise OptionError(
            f"memory_bank.components={bank.components} must be at most {3 * bank.patch**2}, the "
            f"values of a patch of memory_bank.patch={bank.patch}"
        )
    if len(bank.distance_weights) != 2:
        raise OptionError(
            f"memory_bank.distance_weights={tuple(bank.distance_weights)} must be two numbers: for "
            "half size and for quarter size"
        )
    if not len(bank.position_weights) or min(bank.position_weights) < 0:
        raise OptionError(
            f"memory_bank.position_weights={tuple(bank.position_weights)} must be numbers of at "
            "least 0"
        )


def shard_of(shard: str) -> tuple[int, int]:
    """Returns i and n of "i/n"; 0 and 1, which is all, of "". Raises OptionError."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        raise OptionError(f"shard={shard!r} must be i/n with i from 0 to n-1, for example '0/4'")
    return index, count


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of the options with some changed; OptionError if there is no such."""
    config = config.copy_and_resolve_references().lock()
    try:
        config.update(changes)
    except (AttributeError, KeyError, TypeError) as error:
        raise OptionError(" ".join(str(error).split())) from error
    return normalize(config).lock()


def of_category(config: ConfigDict, category: str, *, training: bool = True) -> ConfigDict:
    """Returns the options of one category: those of the run, with its `category_options` applied.

    Raises OptionError if `category_options` names an option that does not exist or cannot work.
    """
    try:
        changes = config.category_options.get(category, {})
        shared = sorted(set(SHARED_BY_CATEGORIES) & set(changes))
        if shared:
            raise OptionError(f"{shared[0]} is the same for all categories of a command")
        config = changed(config, changes)
    except OptionError as error:
        raise OptionError(f"category_options.{category}: {error}") from error
    with config.unlocked():
        config.category_options = ConfigDict()
        config.categories = (category,)
    check(config, training=training)
    return config


def of_variants(
    config: ConfigDict, categories: Iterable[str], *, training: bool = True
) -> dict[str, ConfigDict]:
    """Returns the options of each of `config.variants`, in their order.

    They are those of the run with the variant's applied, also over the `category_options`: whatever
    a category says, variants differ as written. Each is checked with each category: OptionError
    names the variant.
    """
    variants = {}
    for name, changes in config.variants.items():
        try:
            if not re.fullmatch(r"\w+", name):
                raise OptionError("the name, a folder's, must be of letters, digits and _")
            shared = sorted(set(SHARED_BY_VARIANTS) & set(changes))
            if shared:
                raise OptionError(f"{shared[0]} is the same for all variants of a command")
            variants[name] = changed(config, changes)
            with variants[name].unlocked():
                variants[name].variants = ConfigDict()
                for options in variants[name].category_options.values():
                    options.update(changes)
            for category in categories:
                of_category(variants[name], category, training=training)
        except OptionError as error:
            raise OptionError(f"variants.{name}: {error}") from error
    return variants


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` from run to run; "" keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

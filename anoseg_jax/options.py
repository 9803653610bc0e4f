"""Options of a run: those of one category, and whether they fit together."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from anoseg_jax import UsageError, defects, losses, models


class OptionError(UsageError):
    """An option that cannot work; the message is one line that names it and says what would."""


def check(config: ConfigDict) -> None:
    """Raises OptionError, naming the first option that cannot work, before anything is read."""
    devices = jax.local_device_count()
    if config.batch_size < 1 or config.batch_size % devices:
        raise OptionError(
            f"batch_size={config.batch_size} must be a multiple of the {devices} devices, for "
            f"example {max(1, config.batch_size // devices) * devices}"
        )
    for key, value in (
        *((key, config[key]) for key in ("num_steps", "log_every", "checkpoint_every")),
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
    except ValueError as error:
        raise OptionError(str(error)) from error


def of_category(config: ConfigDict, category: str) -> ConfigDict:
    """Returns the options of one category: those of the run, with its `category_options` applied.

    Raises OptionError if `category_options` names an option that does not exist or cannot work.
    """
    changes = config.category_options.get(category, {})
    config = config.copy_and_resolve_references()
    config.unlock()
    config.category_options = ConfigDict()
    config.categories = (category,)
    config.lock()
    try:
        config.update(changes)
    except (AttributeError, KeyError, TypeError) as error:
        raise OptionError(f"category_options.{category}: {' '.join(str(error).split())}") from error
    check(config)
    return config


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("~" is the home) from run to run; "" keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

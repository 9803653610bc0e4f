"""Options of a run: those of a variant and of a category, and whether they fit together.

Importing this imports no JAX: a wrong option is refused before that. Only `check_devices`,
`check_run_devices` and `use_compilation_cache` need it.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError

PATHS = ("data_dir", "tfds_dir", "maps_dir", "resume", "compilation_cache")
# The values of options that are names. A test holds them to what the method has.
CHOICES = {
    "dataset": ("folder", "mvtec_ad", "synthetic_ad"),
    "defects.preset": ("default", "paper", "plain"),
    "loss.segmentation": ("l1", "bce", "focal"),
    "model.dtype": ("float32", "bfloat16"),
    "evaluate.image_score": ("map", "detector"),
}
# The least value of numbers.
AT_LEAST = {
    "batch_size accumulate num_steps log_every checkpoint_every detector.num_steps model.depth "
    "model.discriminator_depth model.latent detector.latent evaluate.batch_size "
    "defects.cut_and_paste.regions defects.hard_augmentation.regions": 1,
    "seed warmup_steps evaluate.pictures evaluate.threshold_images weight_decay "
    "discriminator_scale loss.gradient_penalty loss.segmentation_weight "
    "loss.reconstruction_weight loss.adversarial_weight "
    "detector.adversarial_weight detector.reconstruction_weight": 0,
}
POSITIVE = ("learning_rate", "clip_norm", "detector.learning_rate", "max_megapixels")
FRACTIONS = (
    "held_out ema_decay defects.normal_fraction loss.label_smoothing evaluate.top_fraction "
    "evaluate.pixel_false_positive_rate evaluate.image_false_positive_rate"
).split()
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

    Whether the batch fits the devices is for `check_devices`.
    """
    check_tuples(config)
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
    check_lists(config)
    check_ranges(config)
    for key, choices in CHOICES.items():
        value = _value(config, key)
        if value not in choices:
            raise OptionError(f"{key}={value!r} must be one of {', '.join(choices)}")
    if config.evaluate.image_score == "detector" and not config.detector.enabled:
        raise OptionError("evaluate.image_score='detector' needs detector.enabled=True")
    grid = config.defects.hard_augmentation.grid
    if not 1 <= grid <= min(config.image_size):
        raise OptionError(f"defects.hard_augmentation.grid={grid} must fit the image's pixels")
    check_networks(config)
    check_memory_bank(config.memory_bank, config.image_size)


def _value(config: ConfigDict, path: str) -> Any:
    """Returns the value of an option by its path, such as "model.width"."""
    for name in path.split("."):
        config = config[name]
    return config


def check_ranges(config: ConfigDict) -> None:
    """Raises OptionError, naming the first number that is out of its range."""
    for keys, least in AT_LEAST.items():
        for key in keys.split():
            if not _value(config, key) >= least:
                raise OptionError(f"{key}={_value(config, key)} must be at least {least}")
    for key in POSITIVE:
        if not _value(config, key) > 0:
            raise OptionError(f"{key}={_value(config, key)} must be above 0")
    for key in FRACTIONS:
        if not 0 <= _value(config, key) < 1:
            raise OptionError(f"{key}={_value(config, key)} must be from 0 to less than 1")
    for kind, options in config.defects.items():
        for key, value in options.items() if isinstance(options, ConfigDict) else ():
            if isinstance(value, tuple) and not (len(value) == 2 and value[0] <= value[1]):
                raise OptionError(
                    f"defects.{kind}.{key}={value} must be two numbers, smallest and largest"
                )


def check_lists(config: ConfigDict) -> None:
    """Raises OptionError if a seed is no whole number from 0 up, or something is named twice."""
    if any(not isinstance(seed, int) or seed < 0 for seed in config.seeds):
        raise OptionError(f"seeds={config.seeds} must be whole numbers of at least 0")
    for key in ("seeds", "categories"):
        values = config[key]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise OptionError(f"{key}: {twice} is named twice, but has one folder: name it once")


def check_tuples(config: ConfigDict, path: str = "") -> None:
    """Raises OptionError if an option that is several numbers has something else in it."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in ("category_options", "variants"):
            check_tuples(value, f"{path}{key}.")
        elif isinstance(value, tuple):
            kind, what = (str, "names") if key == "categories" else (int | float, "numbers")
            if not all(isinstance(item, kind) for item in value):
                raise OptionError(f"{path}{key}={value} must be {what}")


def check_networks(config: ConfigDict) -> None:
    """Raises OptionError if the networks cannot have these widths, or not this size of images."""
    for key in ("model.width", "model.discriminator_width", "detector.width"):
        value = _value(config, key)
        if value % 8 or value < 1:
            raise OptionError(f"{key}={value} must be a multiple of 8, the groups of GroupNorm")
    height, width = config.image_size
    for key in ("model.depth", "model.discriminator_depth"):
        step = 2 ** _value(config, key)
        if height % step or width % step:
            good = tuple(max(step, round(side / step) * step) for side in (height, width))
            raise OptionError(
                f"image_size {height}x{width} does not fit {key}={_value(config, key)}: height and "
                f"width must be multiples of {step}, for example {good[0]}x{good[1]}"
            )


def check_devices(config: ConfigDict) -> None:
    """Raises OptionError if the devices cannot divide a batch of training among them."""
    import jax

    devices = jax.device_count()
    parts = devices * config.accumulate
    if config.batch_size % parts:
        times = f", times accumulate={config.accumulate}" if config.accumulate > 1 else ""
        these = "1 device" if devices == 1 else f"{devices} devices"
        raise OptionError(
            f"batch_size={config.batch_size} must be a multiple of {parts} ({these}{times}), for "
            f"example {max(1, config.batch_size // parts) * parts}"
        )


def check_run_devices(config: ConfigDict, categories: Iterable[str]) -> None:
    """Raises OptionError if `check_devices` refuses the options of a category or variant."""
    variants = of_variants(config, categories) or {"": config}
    for variant_config in variants.values():
        for category in categories:
            check_devices(of_category(variant_config, category))


def check_memory_bank(bank: ConfigDict, image_size: tuple[int, int]) -> None:
    """Raises OptionError, naming the first option of `config.memory_bank` that cannot work."""
    if bank.size < 0:
        raise OptionError(f"memory_bank.size={bank.size} must be at least 0, which is no bank")
    if not bank.size:
        return
    for key, least in (
        *(("patch", 2), ("stride", 1), ("components", 1), ("candidates_per_patch", 1)),
        *(("num_bank_images", 4), ("position_weight", 0)),
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


def shard_of(shard: str) -> tuple[int, int]:
    """Returns i and n of "i/n"; 0 and 1, which is all, of "". Raises OptionError."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        raise OptionError(f"shard={shard!r} must be i/n with i from 0 to n-1, for example '0/4'")
    return index, count


def unknown_option(error: KeyError | AttributeError, paths: Iterable[str] = ()) -> str:
    """Returns the message for an option that does not exist, from the error of a ConfigDict.

    `paths` are those that were named, such as "--config.model.widht": the message has the one with
    the name in it.
    """
    text = str(error.args[0]) if error.args else ""
    words = re.findall(r"\w+", text.removeprefix("Key "))
    named = [(path, word) for word in words for path in paths if word in path.split(".")]
    path, name = named[0] if named else (words[0], words[0])
    similar = re.search(r"""Did you mean ["'\\]*(\w+)""", text)
    advice = "configs/default.py has all options"
    if similar:
        advice = f"did you mean {path.replace(name, similar.group(1))}?"
    return f"{path}: there is no such option; {advice}"


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of the options with some changed; OptionError if there is no such."""
    config = config.copy_and_resolve_references().lock()
    try:
        config.update(changes)
    except KeyError as error:
        raise OptionError(unknown_option(error)) from error
    except (AttributeError, TypeError) as error:
        raise OptionError(" ".join(str(error).split())) from error
    return normalize(config).lock()


def keep_overrides(config: ConfigDict, paths: Iterable[str]) -> ConfigDict:
    """Returns a copy without those `category_options` that the command line has set otherwise.

    `paths` are the options that it has set, such as "augment.rotation": it wins over the file. An
    option of one category, "category_options.screw.num_steps", wins over that for all.
    """
    config = config.copy_and_resolve_references()
    paths = [path.partition("[")[0] for path in paths]
    for category, options in config.category_options.items():
        for path in paths:
            *parents, name = path.split(".")
            branch: Any = options
            for parent in parents:
                branch = branch.get(parent) if isinstance(branch, ConfigDict) else None
            is_set = isinstance(branch, ConfigDict) and name in branch
            if is_set and f"category_options.{category}.{path}" not in paths:
                with branch.unlocked():
                    del branch[name]
    return config


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


def check_run(
    config: ConfigDict, categories: Iterable[str], *, training: bool = True
) -> dict[str, ConfigDict]:
    """Checks the options of every category and variant; returns `of_variants`.

    Raises OptionError.
    """
    check(config, training=training)
    for category in categories:
        of_category(config, category, training=training)
    return of_variants(config, categories, training=training)


def check_resume(config: ConfigDict, categories: Iterable[str], workdir: Path) -> None:
    """Raises OptionError if a new `workdir` is to resume from a folder without checkpoints."""
    for category in categories if not workdir.exists() else ():
        folder = of_category(config, category).resume
        if folder and not (Path(folder) / "checkpoints").is_dir():
            raise OptionError(
                f"resume={folder!r}: there is no checkpoint; it is the folder of a category in the "
                "--workdir of another run"
            )


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` from run to run; "" keeps none."""
    if folder:
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

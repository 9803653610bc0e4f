"""What a run would need and write, without running it: reads and writes no file."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from anoseg_jax import UsageError, options
from anoseg_jax.method import detector, models, train, train_state

# Trainings that agree in these are the same program, but for config.augment, which costs little.
OF_THE_PROGRAM = "image_size batch_size accumulate remat model loss detector defects".split()
# What a run writes beside checkpoints, none of it large: in each training's folder, and above.
OF_A_TRAINING = (
    "config.json parameters.txt train_log.jsonl events.* report.html images.csv curves.json "
    "evaluation.npz pictures/"
)
OF_A_RUN = "results.json results.md report.html"


def prepare(devices: int | None) -> None:
    """Has JAX keep no compiled programs, and run on so many virtual CPU devices.

    With None it runs on the devices that are there. Raises UsageError if JAX has started: their
    number is taken once.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    if devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        raise UsageError(f"--devices={devices}: {' '.join(str(error).split())}") from error


def trainings(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Yields the folder in the workdir and the options of each training that the config asks for.

    Where the categories are those that data_dir holds, one stands for them: <category>.
    """
    names = ["<category>" if name == "all" else name for name in config.categories]
    for variant, of_variant in (options.of_variants(config, names) or {"": config}).items():
        for seed in [f"seed_{seed}" for seed in config.seeds] or [""]:
            for name in names:
                folder = "/".join(filter(None, (variant, seed, name)))
                yield folder, options.of_category(of_variant, name)


def programs(config: ConfigDict) -> list[list[tuple[str, ConfigDict]]]:
    """Returns the `trainings`, those of one program together."""
    groups: dict[str, list[tuple[str, ConfigDict]]] = {}
    for folder, own in trainings(config):
        groups.setdefault(str([str(own[key]) for key in OF_THE_PROGRAM]), []).append((folder, own))
    return list(groups.values())


def measure_speed(config: ConfigDict) -> float:
    """Returns the FLOPs a second of each device, all at work, on a block of the network.

    The block (models.ConvBlock) runs forward and backward at a quarter of the image's size, on as
    many images as a device takes at once.
    """
    devices, features = jax.local_device_count(), 2 * config.model.width
    block = models.ConvBlock(features, dtype=jnp.dtype(config.model.dtype))
    images = config.batch_size // devices // config.accumulate
    x = jnp.ones((devices, images, *(side // 4 for side in config.image_size), features))
    params = block.init(jax.random.key(0), x[0])
    gradient = jax.grad(lambda params, x: jnp.sum(block.apply(params, x) ** 2), argnums=(0, 1))
    run = jax.pmap(gradient, in_axes=(None, 0))
    jax.block_until_ready(run(params, x))  # compiles
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < 1 and len(seconds) < 1000):
        began = time.perf_counter()
        jax.block_until_ready(run(params, x))
        seconds.append(time.perf_counter() - began)
    return models.count_flops(gradient, params, x[0]) / statistics.median(seconds)


def size_of(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(parts: train.Parts, config: ConfigDict) -> tuple[Any, Any]:
    """Returns the state as shapes, and the training step compiled as train.run_steps does."""
    devices, image = jax.local_device_count(), (*config.image_size, 3)
    state = jax.eval_shape(parts.create_state, jax.ShapeDtypeStruct((4, *image), np.uint8))
    batch = jax.ShapeDtypeStruct((devices, config.batch_size // devices, *image), np.uint8)
    step = jax.pmap(
        parts.train_step,
        axis_name="batch",
        in_axes=(None, 0, None, *(None for _ in parts.frozen)),
        out_axes=(None, 0),
        donate_argnums=0,
    )
    return state, step.lower(state, batch, parts.draw_key, *parts.frozen).compile()


def analyse(parts: train.Parts, config: ConfigDict) -> dict[str, Any]:
    """Returns what XLA says of the training step.

    The `state` as shapes; in bytes a device the `arguments`, `outputs` and `temporaries` of a step,
    their sum `memory`, in which what is overwritten counts once, and what is `all_reduced`; and the
    `flops` of a step of all devices together.
    """
    state, compiled = compile_step(parts, config)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    # XLA counts what is in a loop once: in the step of one image no loop is run twice.
    of_one = partial(parts.train_step, axis_name=None, accumulate=1)
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), np.uint8)
    inputs = (state, image, parts.draw_key, *parts.frozen)
    _, metrics = jax.eval_shape(of_one, *inputs)
    losses = [metrics[name] for name in metrics if name.startswith("loss_")]
    learned = train_state.is_learned(state.generator)
    learned = jax.tree.map(lambda x, changes: x if changes else (), state.generator, learned)
    several = jax.local_device_count() > 1
    return sizes | {
        "state": state,
        "memory": sum(sizes.values()) - memory.alias_size_in_bytes,
        "flops": config.batch_size * models.count_flops(of_one, *inputs),
        "all_reduced": several * size_of((learned, state.discriminator, losses)),
    }


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """Returns a number with prefix and unit: `scaled(2.5e6, "FLOP")` is "2.5 MFLOP"."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if base == 1024 else ("", "k", "M", "G", "T")
    power = 0
    while value >= base and power < 4:
        value, power = value / base, power + 1
    return f"{value:.4g} {prefixes[power]}{unit}"


def in_time(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def describe(found: dict[str, Any], config: ConfigDict, network: str, *, speed: float) -> str:
    """Returns the lines about one program, which `found` is the analysis of."""
    state, devices = found["state"], jax.local_device_count()
    learned, of_judge = (
        sum(x.size for x in jax.tree.leaves(player))
        for player in (state.generator, state.discriminator)
    )
    height, width = config.image_size
    share = config.batch_size // devices
    accumulated = f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    names = ("memory", "arguments", "outputs", "temporaries", "all_reduced")
    size = {name: scaled(found[name], "B", 1024) for name in names}
    flops, of_image = (scaled(found["flops"] / n, "FLOP") for n in (1, config.batch_size))
    return f"""\
  {network}
    parameters         {learned:,}, of its discriminator {of_judge:,}
    batch              {config.batch_size} images of {height}x{width}, {share} a device{accumulated}
    memory a device    {size["memory"]}: arguments {size["arguments"]}, outputs {size["outputs"]} \
(in place where possible), temporaries {size["temporaries"]}
    computed a step    {flops}, {of_image} an image
    all-reduced a step {size["all_reduced"]} a device
    time a step        {in_time(found["flops"] / devices / speed)} (estimate)"""


def report(config: ConfigDict, workdir: str | None, devices: int | None = None) -> str:
    """Returns what `--mode=dry_run` prints: programs, estimates, files.

    Args:
      config: the options of configs/default.py; data_dir may be anything.
      workdir: where the files would be; None stands for one.
      devices: see `prepare`.

    Raises UsageError, as a run would, if the options cannot work.
    """
    prepare(devices)
    options.check(config, training=True)
    workdir = workdir or "<workdir>"
    count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    virtual = " (virtual, on the cores of this machine)" if devices else ""
    lines = [f"dry run for {count} x {kind}{virtual}; nothing is read, nothing is written"]
    files, stored, seconds = [], 0, 0.0
    for group in programs(config):
        own, speed = group[0][1], measure_speed(group[0][1])
        parts = train.create_parts(own)
        generator = analyse(parts, own)
        players = [(type(parts.generator).__name__.lower(), generator)]
        if own.detector.enabled:
            weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), generator["state"].ema)
            players.append(("detector", analyse(detector.create_parts(own, weights), own)))
        lines += ["", f"trainings, {len(group)}: {', '.join(folder for folder, _ in group)}"]
        lines += [describe(found, own, name, speed=speed) for name, found in players]
        lines.append(
            f"  speed measured       {scaled(speed, 'FLOP/s')} a device, all at once, of a "
            "convolution with its normalisation, forward and backward"
        )
        for folder, there in group:
            for name, found in players:
                steps, of = there.num_steps, f"{workdir}/{folder}"
                if name == "detector":
                    steps, of = there.detector.num_steps, f"{of}/detector"
                size = size_of(found["state"])
                kept = min(2, -(-steps // there.checkpoint_every))
                files.append(f"  {of}/checkpoints/  {kept} x {scaled(size, 'B', 1024)}")
                stored += kept * size
                seconds += steps * found["flops"] / count / speed
    lines += [
        "",
        f"All trainings: {in_time(seconds)} (estimate: the operations as XLA counts them, at the "
        "speed measured; without compiling, reading, saving, evaluating)",
        "",
        f"What would be written; checkpoints take up to {scaled(stored, 'B', 1024)}:",
        *files,
        f"  beside each checkpoints/  {OF_A_TRAINING}",
    ]
    above = {f"{workdir}/{folder}".rpartition("/")[0] for folder, _ in trainings(config)}
    lines += [f"  {folder}/  {OF_A_RUN}" for folder in sorted(above)]
    if config.dataset != "folder":
        lines.append(f"  {config.tfds_dir or '~/tensorflow_datasets'}/{config.dataset}/  by TFDS")
    if config.compilation_cache:
        lines.append(f"  {config.compilation_cache}/  compiled programs")
    return "\n".join(lines)

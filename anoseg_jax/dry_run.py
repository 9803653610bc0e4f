"""What a run would need and write, without running it: reads and writes no file."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from anoseg_jax import UsageError, options
from anoseg_jax.method import detector, models, train, train_state
from anoseg_jax.running import distributed, loop

# What a run writes beside checkpoints, none of it large: in each training's folder, and above.
OF_A_TRAINING = (
    "config.json parameters.txt train_log.jsonl events.* report.html images.csv curves.json "
    "histograms.npz evaluation.npz pictures/"
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


def program_key(config: ConfigDict) -> Hashable:
    """Returns what decides which training steps are compiled: static options, sizes of arrays."""
    static, _ = train_state.split_options(config)
    detector_static = detector.split_options(config)[0] if config.detector.enabled else None
    bank = config.memory_bank
    sizes = (*config.image_size, config.batch_size, bank.size, bank.components)
    return static, detector_static, sizes


def group_by_program(config: ConfigDict) -> list[list[tuple[str, ConfigDict]]]:
    """Returns the `trainings`, grouped by the compiled program that they share."""
    groups: dict[Hashable, list[tuple[str, ConfigDict]]] = {}
    for folder, training_config in trainings(config):
        groups.setdefault(program_key(training_config), []).append((folder, training_config))
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


class Step(NamedTuple):
    """A training step, and the shapes of what it takes.

    Attributes:
      name: of the network that is trained.
      step: train.train_step or detector.train_step.
      static: its static options.
      state: of the step.
      key: the PRNG key.
      options: the arrays of `split_options`.
    """

    name: str
    step: Callable
    static: Any
    state: Any
    key: jax.Array
    options: dict[str, Any]

    @property
    def params(self) -> list[Any]:
        """The parameters of both players: the gradients have their shapes."""
        return [getattr(self.state, player) for player in self.state.PLAYERS]


def training_steps(config: ConfigDict) -> list[Step]:
    """Returns the generator's training step, and the detector's where it is enabled."""
    static, arrays = train_state.split_options(config)
    state = train_state.template(config)
    _, key = train_state.seed_keys(config.seed)
    steps = [Step("generator", train.train_step, static, state, key, arrays)]
    if config.detector.enabled:
        variables = {"params": state.ema, "memory_bank": state.memory_bank}
        static, arrays = detector.split_options(config)
        state = detector.template(config)
        _, key = detector.seed_keys(config.seed)
        steps.append(Step("detector", detector.train_step, static, state, key, arrays | variables))
    return steps


def batch_shapes(*leading: int, image_size: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch with these leading axes."""
    return {
        "image": jax.ShapeDtypeStruct((*leading, *image_size, 3), np.uint8),
        "image_id": jax.ShapeDtypeStruct(leading, np.int32),
    }


def compile_step(step: Step, config: ConfigDict) -> Any:
    """Returns the step on all devices, compiled as training compiles it."""
    devices, image_size = jax.local_device_count(), tuple(config.image_size)
    batch = batch_shapes(devices, config.batch_size // devices, image_size=image_size)
    on_all = loop.parallelize(step.step, step.static)
    return on_all.lower(step.state, batch, step.key, step.options).compile()


def analyze(step: Step, config: ConfigDict) -> dict[str, Any]:
    """Returns what XLA says of a training step.

    In bytes a device: the `arguments`, `outputs` and `temporaries` of a step, their sum `memory`,
    in which what is overwritten counts once, and what is `all_reduced`. `flops`: of a step of all
    devices together.
    """
    memory = compile_step(step, config).memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    # XLA counts what is in a loop once: in the step of one image no loop is run twice.
    batch = batch_shapes(1, image_size=tuple(config.image_size))
    inputs = (step.state, batch, step.key, step.options)
    of_one = partial(step.step, static=step.static._replace(accumulate=1), axis_name=None)
    _, metrics = jax.eval_shape(of_one, *inputs)
    # The losses and what comes with them; the other gradient norms are of averaged gradients.
    averaged = ("loss_", "gradient_norm_adversarial")
    losses = [metrics[name] for name in metrics if name.startswith(averaged)]
    several = jax.local_device_count() > 1
    return sizes | {
        "memory": sum(sizes.values()) - memory.alias_size_in_bytes,
        "flops": config.batch_size * models.count_flops(of_one, *inputs),
        "all_reduced": several * size_of((step.params, losses)),
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


def describe(step: Step, analysis: dict[str, Any], config: ConfigDict, *, speed: float) -> str:
    """Returns the lines about one training step; `analysis` is that of `analyze`."""
    devices = jax.local_device_count()
    parameters, discriminator_parameters = (
        sum(x.size for x in jax.tree.leaves(player)) for player in step.params
    )
    height, width = config.image_size
    share = config.batch_size // devices
    accumulated = f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    names = ("memory", "arguments", "outputs", "temporaries", "all_reduced")
    size = {name: scaled(analysis[name], "B", 1024) for name in names}
    flops, flops_an_image = (scaled(analysis["flops"] / n, "FLOP") for n in (1, config.batch_size))
    return f"""\
  {step.name}
    parameters         {parameters:,}, of its discriminator {discriminator_parameters:,}
    batch              {config.batch_size} images of {height}x{width}, {share} a device{accumulated}
    memory a device    {size["memory"]}: arguments {size["arguments"]}, outputs {size["outputs"]} \
(in place where possible), temporaries {size["temporaries"]}
    computed a step    {flops}, {flops_an_image} an image
    all-reduced a step {size["all_reduced"]} a device
    time a step        {in_time(analysis["flops"] / devices / speed)} (estimate)"""


def report(config: ConfigDict, workdir: str | None, devices: int | None = None) -> str:
    """Returns what `--mode=dry_run` prints: programs, estimates, files.

    Args:
      config: the options of configs/default.py; data_dir may be anything.
      workdir: where the files would be; None stands for one.
      devices: see `prepare`.

    Raises UsageError, as a run would, if the options cannot work.
    """
    prepare(devices)
    distributed.require_devices()
    options.check(config, training=True)
    for _, training_config in trainings(config):
        options.check_devices(training_config)
    workdir = workdir or "<workdir>"
    count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    virtual = " (virtual, on the cores of this machine)" if devices else ""
    lines = [f"dry run for {count} x {kind}{virtual}; nothing is read, nothing is written"]
    files, stored, seconds = [], 0, 0.0
    for group in group_by_program(config):
        first_config = group[0][1]
        speed = measure_speed(first_config)
        steps = training_steps(first_config)
        analyses = [analyze(step, first_config) for step in steps]
        lines += ["", f"trainings, {len(group)}: {', '.join(folder for folder, _ in group)}"]
        lines += [
            describe(step, analysis, first_config, speed=speed)
            for step, analysis in zip(steps, analyses, strict=True)
        ]
        lines.append(
            f"  speed measured       {scaled(speed, 'FLOP/s')} a device, all at once, of a "
            "convolution with its normalisation, forward and backward"
        )
        for folder, training_config in group:
            for step, analysis in zip(steps, analyses, strict=True):
                num_steps, category_dir = training_config.num_steps, f"{workdir}/{folder}"
                if step.name == "detector":
                    num_steps = training_config.detector.num_steps
                    category_dir += "/detector"
                size = size_of(step.state)
                kept = min(2, -(-num_steps // training_config.checkpoint_every))
                files.append(f"  {category_dir}/checkpoints/  {kept} x {scaled(size, 'B', 1024)}")
                stored += kept * size
                seconds += num_steps * analysis["flops"] / count / speed
    lines += [
        "",
        f"All trainings: {in_time(seconds)} (estimate: the operations as XLA counts them, at the "
        "speed measured; without compiling, reading, the memory bank, saving, evaluating)",
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

"""A training with its test metrics along the way.

`train_along` runs the step, the data order and the prediction of the program, without checkpoints.
"""

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from category_arrays import Images
from flax import linen as nn
from ml_collections import ConfigDict

from anoseg_jax.evaluation import evaluate, metrics
from anoseg_jax.images import batches
from anoseg_jax.method import memory_bank, models, predict, train, train_state
from anoseg_jax.running import loop, progress

FETCHED_STEPS = 50  # whose metrics are fetched together: each transfer holds up the device
# Evaluated after these shares of the steps, and before the first one.
SHARES = (1 / 50, 1 / 20, 1 / 10, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1)
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "au_pro")
TIMED_STEPS, TIMED_SECONDS = 20, 3.0  # what measures the step's time ends with either
RESERVE = 0.9  # share of the seconds that steps and evaluations may take

Row = dict[str, Any]


def test_batches(test: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the test images in order, in batches."""
    for start in range(0, len(test["label"]), size):
        yield {key: values[start : start + size] for key, values in test.items()}


def test_metrics(config: ConfigDict, state: Any, test: Mapping[str, np.ndarray]) -> Row:
    """Returns METRICS of the averaged weights on the test images; what is not available is None."""
    predict_fn = predict.sharded_predict_fn(config)
    variables = predict.replicate({"params": state.ema, "memory_bank": state.memory_bank})
    pixels = metrics.SegmentationAccumulator(max_scores=evaluate.MAX_SCORES)
    scores = [np.zeros(0)]
    for batch in test_batches(test, config.evaluate.batch_size):
        maps, batch_scores = predict_fn(variables, batch["image"], outputs=2)
        has_masks = zip(batch["mask"], batch["has_mask"], strict=True)
        known = [mask if has_mask else None for mask, has_mask in has_masks]
        pixels.add(maps, known, ignored=batch.get("ignore"))
        scores.append(batch_scores)
    image = metrics.image_metrics(np.concatenate(scores), test["label"])
    measured = evaluate.join_metrics(image, pixels.result())
    return {name: measured[name] for name in METRICS}


def logits_fn(
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    generator: nn.Module,
    options: predict.BankOptions,
    top_fraction: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of the maps [b, h, w], weighted distances added, and the scores [b]."""
    bank = variables["memory_bank"]
    images = memory_bank.to_float(images, bank and bank.brightness)
    logits, _ = predict.generator_logits(
        variables["params"], bank, images, generator=generator, options=options
    )
    return logits, predict.peak_over_median(logits, top_fraction)


def test_logits(
    config: ConfigDict, state: Any, test: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns `logits` float16 [n, h, w] and `scores` [n] of the test images, and their labels."""
    run = predict.shard_over_devices(
        logits_fn,
        config.evaluate.batch_size,
        generator=models.create(config.model, config.loss)[0],
        options=predict.bank_options(config.memory_bank),
        top_fraction=config.evaluate.top_fraction,
    )
    variables = predict.replicate({"params": state.ema, "memory_bank": state.memory_bank})
    results = [
        run(variables, batch["image"]) for batch in test_batches(test, config.evaluate.batch_size)
    ]
    logits, scores = (np.concatenate(x) for x in zip(*results, strict=True))
    names = ("label", "defect_type", "name")
    return {"logits": logits.astype(np.float16), "scores": scores} | {
        name: test[name] for name in names
    }


def summarize(window: Mapping[str, list[float]]) -> dict[str, dict[str, float] | None]:
    """Returns median and 99th percentile of each of the step's metrics; None if not all finite."""
    return {
        name: dict(zip(("median", "p99"), np.percentile(values, (50, 99)).tolist(), strict=True))
        if np.isfinite(values).all()
        else None
        for name, values in window.items()
    }


class Training(NamedTuple):
    """A training before its first step.

    Attributes:
      config: the options.
      step: from state, which it donates, batch and array options to state and metrics.
      state: the first one, of numpy arrays.
      make_batches: yields shuffled batches from the first one on.
      compile_seconds: of the step's first call.
      step_seconds: of one of its later calls.
    """

    config: ConfigDict
    step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
    state: Any
    make_batches: Callable[[], Iterator[Any]]
    compile_seconds: float
    step_seconds: float


def on_devices(state: Any) -> Any:
    """Returns a copy of a state of numpy arrays on the local devices; a step may donate it."""
    return loop.replicate(jax.tree.map(np.array, state))


def time_steps(step: Callable, state: Any, batch: Any, options: Any) -> tuple[float, float]:
    """Returns the seconds of the step's first call, and those of a later one."""
    began = time.monotonic()
    with progress.waiting("compiling the training step", "usually under a minute"):
        state, last = jax.block_until_ready(step(state, batch, options))
    compiled, steps = time.monotonic(), 0
    while not steps or (steps < TIMED_STEPS and time.monotonic() - compiled < TIMED_SECONDS):
        state, metrics_of_step = step(state, batch, options)
        jax.block_until_ready(last)  # one step is queued behind the one that runs
        last, steps = metrics_of_step, steps + 1
    jax.block_until_ready(last)
    return compiled - began, (time.monotonic() - compiled) / steps


def prepare(config: ConfigDict, images: Images, begin: Callable[..., Any]) -> Training:
    """Compiles and times the step of a config.

    `begin` takes the config, the arrays to train on and the hash of the images; it returns the
    first state, of numpy arrays.
    """
    arrays, _ = train.split_images(config, images.train, images.validation)
    state = begin(config, arrays, train.images_sha256(images.train, images.validation))
    static, options = train_state.split_options(config)
    parallel_step = loop.parallelize(train.train_step, static)
    key, options = loop.replicate((train_state.seed_keys(config.seed)[1], options))

    def step(state: Any, batch: Any, options: Any) -> tuple[Any, dict[str, jax.Array]]:
        return parallel_step(state, batch, key, options)

    def make_batches() -> Iterator[Any]:
        order = {"batch_size": config.batch_size, "seed": config.seed}
        return map(loop.shard, batches.train_batches(arrays, 0, **order))

    seconds = time_steps(step, on_devices(state), next(make_batches()), options)
    return Training(config, step, state, make_batches, *seconds)


def fill_steps(training: Training, test: Mapping[str, np.ndarray], deadline: float) -> int:
    """Returns how many steps fit before the deadline, evaluations included; prints them."""
    began = time.monotonic()
    test_metrics(training.config, training.state, test)
    evaluation = time.monotonic() - began
    seconds = RESERVE * (deadline - time.monotonic()) - len(SHARES) * evaluation
    steps = max(len(SHARES), int(seconds / training.step_seconds))
    print(
        f"{steps} steps of {1e3 * training.step_seconds:.1f} ms fill the "
        f"{deadline - time.monotonic():.0f} s that are left, with {len(SHARES)} evaluations of "
        f"{evaluation:.1f} s",
        flush=True,
    )
    return steps


def evaluation_steps(num_steps: int) -> list[int]:
    """Returns the steps after which a training is evaluated, in order."""
    return sorted({max(1, round(share * num_steps)) for share in SHARES})


def train_along(
    training: Training, test: Mapping[str, np.ndarray], deadline: float
) -> Iterator[tuple[Row, Any]]:
    """Trains `config.num_steps` steps; yields a row and the state after each of SHARES of them.

    Rows have `step`, `seconds` (of training alone), METRICS, and `metrics_of_steps`: median and
    99th percentile of each metric of the steps since the row before. The last row of a training
    that ends early says why in `ended`: the deadline, on the clock of `time.monotonic`, or a metric
    of a step that is not finite.
    """
    config, window = training.config, collections.defaultdict(list)
    evaluated = evaluation_steps(config.num_steps)
    options = loop.replicate(train_state.split_options(config)[1])
    state = on_devices(training.state)
    pending: list[dict[str, jax.Array]] = []  # metrics of the steps that may still run
    seconds, resumed = 0.0, time.monotonic()
    steps = range(1, config.num_steps + 1)
    for number, batch in zip(steps, training.make_batches(), strict=False):
        state, metrics_of_step = training.step(state, batch, options)
        pending.append(metrics_of_step)
        ended = ""
        if time.monotonic() > deadline and number < config.num_steps:
            ended = f"the minutes were over after step {number} of {config.num_steps}"
        pause = ended or number in evaluated
        jax.block_until_ready(pending[-3:][0])  # two queued steps keep the device busy
        bad = set()
        if pause or len(pending) == FETCHED_STEPS:
            for metrics_of_step in jax.device_get(pending):
                for name, value in metrics_of_step.items():
                    window[name].append(float(value[0]))
                    bad |= set() if np.isfinite(value[0]) else {name}
            pending = []
        if bad:
            ended = f"not finite within {FETCHED_STEPS} steps of step {number}: "
            ended += ", ".join(sorted(bad))
        if ended or pause:
            seconds += time.monotonic() - resumed
            row = {"step": number, "seconds": seconds} | test_metrics(config, state, test)
            row["metrics_of_steps"] = summarize(window)
            yield row | ({"ended": ended} if ended else {}), state
            window.clear()
            resumed = time.monotonic()
        if ended:
            return

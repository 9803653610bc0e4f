"""Times of the training step and the prediction: this program and, where it is, its PyTorch twin.

`measure` yields one row after the other, the most important ones first, and skips what does not fit
into the time that it is given.
"""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from anoseg_jax import options
from anoseg_jax.images import batches
from anoseg_jax.method import predict, train, train_state
from anoseg_jax.running import loop, progress

BLOCKS, CALLS = 3, 20  # the median of so many blocks of calls
BLOCK_SECONDS = 1.5  # a block that would take longer has fewer calls
OURS, EAGER, COMPILED = "this program", "PyTorch, eager", "PyTorch, torch.compile"
STEP, PREDICTION = "training step", "prediction"
COMPILER_SECONDS = 60.0  # of torch.compile, for a batch of 16
NO_TIME = "skipped: no time left"

Row = dict[str, Any]


class Case(NamedTuple):
    """What one row times: which program computes what, how precisely, on how many images."""

    program: str
    what: str
    dtype: str
    batch_size: int


class Timed(NamedTuple):
    """Seconds of the first call, of one call among many, and the number of calls in a block."""

    first: float
    seconds: float
    calls: int


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any]) -> Timed:
    """Times `call`; `wait` takes what it returns and blocks until it is computed."""
    began = time.perf_counter()
    wait(call())
    first = time.perf_counter() - began
    for _ in range(2):  # a second call may compile once more; the last one estimates
        began = time.perf_counter()
        wait(call())
        estimate = time.perf_counter() - began
    calls, seconds = max(1, min(CALLS, int(BLOCK_SECONDS / estimate))), []
    for _ in range(BLOCKS):
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        seconds.append((time.perf_counter() - began) / calls)
    return Timed(first, statistics.median(seconds), calls)


def our_call(case: Case, config: ConfigDict, images: np.ndarray, state: Any) -> Callable[[], Any]:
    """Returns the call that a case times: the whole step with its examples, or the prediction.

    `state` has numpy arrays; parameters are float32 whatever the case's dtype is.
    """
    static, arrays = train_state.split_options(config)
    data = {"image": images, "image_id": batches.assign_image_ids(images)}
    batch = next(batches.train_batches(data, 0, batch_size=case.batch_size, seed=config.seed))
    if case.what == PREDICTION:
        apply = partial(
            predict.predict_fn,
            generator=static.generator,
            options=predict.bank_options(config.memory_bank),
            top_fraction=config.evaluate.top_fraction,
        )
        variables = {"params": state.ema, "memory_bank": state.memory_bank}
        variables, inputs = jax.device_put((variables, batch["image"]))
        return partial(jax.jit(apply), variables, inputs)
    step = loop.parallelize(train.train_step, static)
    key = train_state.seed_keys(config.seed)[1]
    state, key, arrays = loop.replicate((jax.tree.map(jnp.asarray, state), key, arrays))
    shards = loop.shard(batch)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, shards, key, arrays)
        return metrics

    return call


def twin_call(case: Case, config: ConfigDict) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Returns the call of the twin, on examples that are drawn beforehand, and what waits for it.

    bfloat16 is torch.autocast's.
    """
    import torch
    import torch_case
    import torch_prediction

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # As XLA does by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    training = torch_case.create_training(config)
    for module in (training.generator, training.discriminator, training.average):
        module.to(device)
    examples = torch_case.draw_examples(case.batch_size, tuple(config.image_size))
    examples = {name: torch_case.to_tensor(x).to(device) for name, x in examples.items()}
    if case.program == COMPILED:
        torch._dynamo.reset()  # or a second batch size would compile for sizes that vary
    if case.what == STEP:
        if case.program == COMPILED:
            import torch._functorch.config

            # Both players' gradients come from one graph, which is kept for the second.
            torch._functorch.config.donated_buffer = False
            for module in (training.generator, training.discriminator, training.generator.memory):
                if module is not None:
                    module.compile()
        run = partial(training.step, examples)
    else:
        predict_fn = torch_prediction.predict
        if case.program == COMPILED:
            predict_fn = torch.compile(predict_fn)
        top = config.evaluate.top_fraction
        run = partial(predict_fn, training.generator, examples["good"], top_fraction=top)

    def call() -> Any:
        narrow = case.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16) if narrow else contextlib.nullcontext():
            return run()

    return call, lambda _: torch.cuda.synchronize() if device == "cuda" else None


def cases(*, with_torch: bool) -> list[Case]:
    """Returns all cases, the most important ones first."""
    order = [
        *((OURS, "float32", 16), (EAGER, "float32", 16), (OURS, "bfloat16", 16)),
        *((COMPILED, "float32", 16), (OURS, "float32", 64), (OURS, "bfloat16", 64)),
        *((EAGER, "float32", 64), (EAGER, "bfloat16", 16), (EAGER, "bfloat16", 64)),
        *((COMPILED, "float32", 64), (COMPILED, "bfloat16", 16), (COMPILED, "bfloat16", 64)),
    ]
    return [
        Case(program, what, dtype, batch_size)
        for program, dtype, batch_size in order
        for what in (STEP, PREDICTION)
        if with_torch or program == OURS
    ]


def measure(
    config: ConfigDict, images: np.ndarray, state: Any, *, deadline: float, with_torch: bool
) -> Iterator[Row]:
    """Yields a row for each case: its fields, `first_call`, `ms`, `images_per_second`, `calls`.

    A case that does not fit or fails has a `note` that says why instead of numbers.

    Args:
      config: of the networks; batch size and dtype are those of the cases.
      images: good images, uint8 [n, h, w, 3].
      state: a TrainState of numpy arrays.
      deadline: on the clock of `time.monotonic`.
      with_torch: also the twin; without PyTorch a row says that it is not installed.
    """
    has_torch = with_torch and importlib.util.find_spec("torch") is not None
    spent: dict[tuple[str, str], float] = {}  # the longest case of a program and call, seconds
    for case in cases(with_torch=has_torch):
        row, kind = case._asdict(), case[:2]
        expected = spent.get(kind, 0.0)
        if case.program == COMPILED:  # it unrolls the loop over the images
            expected = max(expected, COMPILER_SECONDS) * case.batch_size / 16
        if time.monotonic() + expected > deadline:
            yield row | {"note": NO_TIME}
            continue
        changes = {"batch_size": case.batch_size, "model": {"dtype": case.dtype}}
        of_case, began = options.changed(config, changes), time.monotonic()
        name = f"{case.program}, {case.what}, {case.dtype}, batch of {case.batch_size}"
        try:
            with progress.waiting(f"timing {name}", "compiles first"):
                if case.program == OURS:
                    timed = time_calls(
                        our_call(case, of_case, images, state), jax.block_until_ready
                    )
                else:
                    timed = time_calls(*twin_call(case, of_case))
        except Exception as error:  # out of memory, or a compiler that is missing: the next one
            lines = str(error).strip().splitlines()
            yield row | {"note": f"{type(error).__name__}: {lines[0][:120] if lines else ''}"}
            continue
        spent[kind] = max(spent.get(kind, 0), time.monotonic() - began)
        yield row | {
            "first_call": timed.first,
            "ms": 1e3 * timed.seconds,
            "images_per_second": case.batch_size / timed.seconds,
            "calls": timed.calls,
        }
    if with_torch and not has_torch:
        yield Case(EAGER, "all", "", 0)._asdict() | {"note": "PyTorch is not installed"}

"""Times the training step and inference of this program and of its PyTorch twin, side by side.

    python benchmarks/torch_compare.py [--sizes 128 256] [--runs 9] [--parts] [--clock cpu]

The networks of configs/cpu.py with a full memory bank, in float32 on the CPU, with as many threads
each as there are cores; batches of 16 images of 128x128, fewer of larger ones. The examples are
made beforehand. The two take turns in one process. `--parts` times the parts of a step; `--clock
cpu` counts the CPU seconds of all threads, which other programs on the machine change less than the
wall clock's. Prints markdown tables.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Waiting threads of PyTorch would otherwise spin and take the cores from whoever is next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torch_case  # noqa: E402
import torch_prediction  # noqa: E402
import torch_replay  # noqa: E402
import torch_training  # noqa: E402
from torch_case import to_tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.method import losses, memory_bank, models, predict, train_state  # noqa: E402
from configs import cpu  # noqa: E402

Contest = tuple[Callable[[], object], Callable[[], object], float]  # ours, twin, FLOPs


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def take_turns(
    contests: dict[str, Contest], runs: int, clock: Callable[[], float]
) -> dict[str, tuple[list, list]]:
    """Returns the seconds of each run of both sides of each contest, after one warm-up run."""
    seconds: dict[str, tuple[list, list]] = {name: ([], []) for name in contests}
    for run in range(runs + 1):
        for name, (ours, twin, _) in contests.items():
            for side, spent in zip((ours, twin), seconds[name], strict=True):
                began = clock()
                jax.block_until_ready(side())
                if run:
                    spent.append(clock() - began)
    return seconds


def print_table(contests: dict[str, Contest], runs: int, clock: Callable[[], float]) -> None:
    """Prints medians, their ratio, and FLOP/s where they are known."""
    print("| | ours, ms | PyTorch, ms | PyTorch / ours | GFLOP | ours, GFLOP/s | PyTorch |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, (ours, twin) in take_turns(contests, runs, clock).items():
        flops = contests[name][2] / 1e9
        a, b = statistics.median(ours), statistics.median(twin)
        speeds = [f"{flops:.2f}", f"{flops / a:.1f}", f"{flops / b:.1f}"] if flops else ["", "", ""]
        print(
            "|",
            " | ".join([name, f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{b / a:.2f}", *speeds]),
            "|",
        )


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A plain 3x3 convolution, NHWC."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def convolution(batch: int, side: int, inputs: int, outputs: int) -> dict[str, Contest]:
    """Returns a plain convolution: forward, and its gradient by the kernel."""
    rng = np.random.default_rng(0)
    shapes = ((batch, side, side, inputs), (3, 3, inputs, outputs), (batch, side, side, outputs))
    x, kernel, gradient = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    forward = jax.jit(convolve)
    by_kernel = jax.jit(lambda g: jax.vjp(partial(convolve, x), kernel)[1](g))
    images, gradients = to_tensor(x), to_tensor(gradient)
    weight = torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1).copy())

    def twin() -> torch.Tensor:
        with torch.no_grad():
            return F.conv2d(images, weight, padding=1)

    def twin_by_kernel() -> torch.Tensor:
        return torch.nn.grad.conv2d_weight(images, weight.shape, gradients, padding=1)

    flops = 2 * batch * side**2 * inputs * outputs * 9
    name = f"convolution {inputs} -> {outputs}, {side}x{side}"
    return {
        name: (lambda: forward(x, kernel), twin, flops),
        f"{name}, kernel's gradient": (lambda: by_kernel(gradient), twin_by_kernel, flops),
    }


class Case:
    """Networks, weights and a batch of both sides at one size."""

    def __init__(self, side: int) -> None:
        """`side` is height and width of the images."""
        config = cpu.get_config()
        config.image_size = (side, side)
        config.batch_size = self.batch_size = max(1, 16 * 128**2 // side**2)
        self.config = config
        examples = torch_case.draw_examples(self.batch_size, config.image_size)
        self.uint8 = np.uint8(255 * examples["good"])
        self.examples = {name: jnp.asarray(x) for name, x in examples.items()}
        self.twin_examples = {name: to_tensor(x) for name, x in examples.items()}
        # The twin's initial weights and its random memory bank serve both.
        self.training = torch_case.create_training(config)
        weights = {
            f"{player}.{name}": x.detach().numpy()
            for player in train_state.TrainState.PLAYERS
            for name, x in getattr(self.training, player).state_dict().items()
        }
        self.state, self.static, self.options = torch_replay.create_state(
            config, weights, "float32"
        )

    def count_flops(self, function: Callable, *inputs: object, loops: float = 1.25) -> float:
        """As models.count_flops, which counts the loops over the images of the bank once.

        The coarse scale's loop has a quarter of the patches: `loops` of 1.25 is both.
        """
        h, w = self.uint8.shape[1:3]
        bank = self.config.memory_bank
        cell = 2 * bank.stride
        one_image = 2 * (h // cell) * (w // cell) * bank.size * (bank.components + 2)
        return models.count_flops(function, *inputs) + loops * (self.batch_size - 1) * one_image

    def step(self) -> Contest:
        """Returns one training step on a batch of examples."""

        def step(state: train_state.TrainState, examples: dict, options: dict) -> tuple:
            # Gradients and outputs, which nothing reads, are not computed.
            return torch_replay.run_step(state, examples, options, static=self.static)[:2]

        state = jax.tree.map(jnp.copy, self.state)  # the step donates it
        flops = self.count_flops(step, state, self.examples, self.options)
        jitted = jax.jit(step, donate_argnums=0)

        def ours() -> dict[str, jax.Array]:
            nonlocal state
            state, metrics = jitted(state, self.examples, self.options)
            return metrics

        return ours, lambda: self.training.step(self.twin_examples), flops

    def inference(self) -> Contest:
        """Returns maps, scores and reconstructions of a batch of uint8 images."""
        top = self.config.evaluate.top_fraction
        apply = partial(
            predict.predict_fn,
            generator=self.static.generator,
            options=predict.bank_options(self.config.memory_bank),
            top_fraction=top,
        )
        variables = {"params": self.state.generator, "memory_bank": self.state.memory_bank}
        ours, twin_images = jax.jit(apply), to_tensor(self.uint8)

        def twin() -> tuple[torch.Tensor, ...]:
            images = twin_images.float() / 255
            return torch_prediction.predict(self.training.generator, images, top_fraction=top)

        flops = self.count_flops(apply, variables, self.uint8)
        return lambda: ours(variables, self.uint8), twin, flops

    def both_ways(
        self, name: str, apply: Callable, params: dict, module: torch.nn.Module, *inputs: jax.Array
    ) -> dict[str, Contest]:
        """Returns a part of a step: forward, and with the gradient by its parameters, if any."""
        twin_inputs = [to_tensor(array) for array in inputs]
        flops = self.count_flops(apply, params, *inputs, loops=int(name.startswith("bank")))
        forward = jax.jit(apply)

        def total(params: dict) -> jax.Array:
            return jnp.mean(apply(params, *inputs))

        backward = jax.jit(jax.grad(total))

        def twin_forward() -> torch.Tensor:
            with torch.no_grad():
                return module(*twin_inputs)

        def twin_backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(module(*twin_inputs).mean(), list(module.parameters()))

        contests = {name: (lambda: forward(params, *inputs), twin_forward, flops)}
        if list(module.parameters()):
            flops = models.count_flops(jax.grad(total), params)
            contests[f"{name}, with gradients"] = (lambda: backward(params), twin_backward, flops)
        return contests

    def parts_of_a_step(self) -> dict[str, Contest]:
        """Returns the parts of a step: forward, and forward and backward to the weights."""
        generator, twin = self.state.generator, self.training.generator
        model, depth, width = self.config.model, self.config.model.depth, self.config.model.width
        good, defective, masks = (self.examples[name] for name in ("good", "defective", "masks"))
        x = models.add_coords(2 * good - 1)
        head_input = jnp.concatenate([x, 2 * defective - 1, 4 * jnp.abs(good - defective)], axis=-1)
        b, h, w = masks.shape
        extra_features = jnp.zeros((b, h // 2, w // 2, model.distance_scales))

        def apply_fn(module: models.nn.Module) -> Callable:
            return lambda params, *inputs: module.apply({"params": params}, *inputs)

        contests = self.both_ways(
            "bank's fine distances",
            partial(memory_bank.standardized_distances, grid=self.static.grid),
            self.state.memory_bank.fine,
            twin.memory,
            defective,
        )
        contests |= self.both_ways(
            "reconstructor",
            apply_fn(models.Reconstructor(width, depth, model.latent)),
            generator["reconstructor"],
            twin.reconstructor,
            x,
        )
        contests |= self.both_ways(
            "anomaly head",
            apply_fn(models.AnomalyHead(width, depth)),
            generator["anomaly_head"],
            twin.map_head,
            head_input,
            extra_features,
        )
        contests |= self.both_ways(
            "discriminator",
            apply_fn(self.static.discriminator),
            self.state.discriminator,
            self.training.discriminator,
            good,
            masks,
        )
        return contests | self.segmentation_loss()

    def segmentation_loss(self) -> dict[str, Contest]:
        """Returns the gradient of the focal loss by the logits."""
        masks, twin_masks = self.examples["masks"], self.twin_examples["masks"]
        logits = jnp.asarray(np.random.default_rng(0).normal(size=masks.shape), jnp.float32)
        focal = jax.jit(jax.grad(lambda x: losses.segmentation_focal(logits=x, masks=masks)))
        twin_logits = to_tensor(logits).requires_grad_()

        def twin() -> tuple[torch.Tensor, ...]:
            loss = torch_training.segmentation_loss(twin_logits, twin_masks, "focal")
            return torch.autograd.grad(loss, twin_logits)

        return {"segmentation loss, with gradient": (lambda: focal(logits), twin, 0.0)}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="pixels a side")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--parts", action="store_true", help="also the parts of a step")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    flags = parser.parse_args()
    clock = CLOCKS[flags.clock]
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, jax {jax.__version__}, {threads} threads", end="")
    print(f", median of {flags.runs} runs, {flags.clock} clock")
    for side in flags.sizes:
        case = Case(side)
        print(f"\n{case.batch_size} images of {side}x{side}\n")
        contests = {
            "training step": case.step(),
            "inference": case.inference(),
            **convolution(case.batch_size, side // 8, 64, 64),
            **convolution(case.batch_size, side // 2, 16, 16),
            **convolution(case.batch_size, side // 2, 45, 16),  # the anomaly head's first
        }
        print_table(contests, flags.runs, clock)
        if flags.parts:
            print()
            print_table(case.parts_of_a_step(), flags.runs, clock)


if __name__ == "__main__":
    main()

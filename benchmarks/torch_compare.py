"""Times training step and inference of this program and of its twin in PyTorch, side by side.

    python benchmarks/torch_compare.py [--sizes 128 256] [--runs 9] [--parts] [--clock cpu]

The networks of configs/cpu.py with full patch memories, in float32 on the CPU, with as many threads
each as there are cores to run on; batches of 16 images of 128x128, fewer of larger ones. Examples
are drawn beforehand. The two take turns in one process. `--parts` times what a step is made of;
`--clock cpu` counts the CPU seconds of all threads, which other programs on the machine change less
than the wall clock's. Prints markdown tables.
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
import torch_reference  # noqa: E402
import torch_replay  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.interop import replay, torch_weights
from anoseg_jax.method import losses, models, predict, train  # noqa: E402
from configs import cpu  # noqa: E402

Contest = tuple[Callable[[], object], Callable[[], object], float]  # ours, twin, FLOPs


def tensor(array: np.ndarray) -> torch.Tensor:
    """Returns an array as a tensor, images as [b, c, h, w]."""
    return torch.from_numpy(np.array(replay.in_nchw(array)))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def take_turns(
    contests: dict[str, Contest], runs: int, clock: Callable[[], float]
) -> dict[str, tuple[list, list]]:
    """Returns the seconds of each run of both sides of each contest, after one run unmeasured."""
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
    images, gradients = tensor(x), tensor(gradient)
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
        self.config, self.keywords = config, train.create_parts(config).train_step.keywords
        rng = np.random.default_rng(0)
        shape = (self.batch_size, side, side)
        good, masks = rng.uniform(size=(*shape, 3)), np.zeros(shape)
        masks[:, : side // 8, : side // 8] = 1
        defective = np.where(masks[..., None] > 0, 1 - good, good)
        self.uint8 = np.uint8(255 * good)
        batch = good, defective, masks, np.arange(self.batch_size)
        self.batch = [jnp.asarray(array, jnp.float32) for array in batch]
        self.twin_batch = [tensor(array) for array in self.batch]
        # The twin draws the weights; it has no patches of its own.
        generator, discriminator = torch_reference.create(config)
        for memory in (generator.memory, generator.coarse_memory):
            for array in memory.buffers():
                array += torch.from_numpy(rng.normal(size=array.shape).astype(np.float32))
        self.training = torch_reference.Training(generator, discriminator, config)
        self.params = self.of_twin()

    def count_flops(self, function: Callable, *inputs: object, loops: float = 1) -> float:
        """As models.count_flops, and the fine memory's loop over the images that it counts once.

        The coarse memory's has a quarter of the patches: `loops` of 1.25 is both.
        """
        h, w = self.uint8.shape[1:3]
        cell, components = 2 * models.STRIDE, torch_reference.COMPONENTS + 2
        one = 2 * (h // cell) * (w // cell) * self.config.model.memory * components
        return models.count_flops(function, *inputs) + loops * (self.batch_size - 1) * one

    def of_twin(self) -> dict[str, dict]:
        """Returns the twin's weights as our parameters."""
        template = torch_replay.shapes_of(self.keywords, self.config.image_size)
        weights = {
            f"{player}.{name}": x.detach().numpy()
            for player in template
            for name, x in getattr(self.training, player).state_dict().items()
        }
        return jax.device_put(torch_weights.from_torch(weights, template))

    def step(self) -> Contest:
        """Returns one training step on a batch that is drawn."""
        networks = {name: self.keywords[name] for name in ("generator", "discriminator", "loss")}

        def step(state: train.TrainState, *batch: jax.Array):
            return train.update_players(
                state,
                partial(train.loss_fn, **networks),
                batch,
                optimizers=self.keywords["optimizers"],
                ema_decay=self.config.ema_decay,
                accumulate=1,
                axis_name=None,
            )

        # Copies: the step donates its state.
        params, ema = jax.tree.map(jnp.copy, (self.params, self.params["generator"]))
        optimizers = self.keywords["optimizers"]
        state = train.TrainState(
            step=jnp.zeros((), jnp.int32),
            generator_opt=optimizers.generator.init(params["generator"]),
            discriminator_opt=optimizers.discriminator.init(params["discriminator"]),
            ema=ema,
            **params,
        )
        flops = self.count_flops(step, state, *self.batch)
        jitted = jax.jit(step, donate_argnums=0)

        def ours() -> dict[str, jax.Array]:
            nonlocal state
            state, metrics = jitted(state, *self.batch)
            return metrics

        return ours, lambda: self.training.step(*self.twin_batch), flops

    def inference(self) -> Contest:
        """Returns maps, scores and reconstructions of a batch of uint8 images."""
        generator, top = self.keywords["generator"], self.config.evaluate.top_fraction
        apply = partial(predict.predict_fn, generator=generator, top_fraction=top)
        ours, twin_images = jax.jit(apply), tensor(self.uint8)

        def twin() -> tuple[torch.Tensor, ...]:
            images = twin_images.float() / 255
            return torch_reference.predict(self.training.generator, images, top_fraction=top)

        flops = self.count_flops(apply, self.params["generator"], self.uint8, loops=1.25)
        return lambda: ours(self.params["generator"], self.uint8), twin, flops

    def parts_of_a_step(self) -> dict[str, Contest]:
        """Returns what a step is made of: forward, and forward and backward to the weights."""
        generator, twin = self.params["generator"], self.training.generator
        model, depth, width = self.config.model, self.config.model.depth, self.config.model.width
        good, defective, masks, _ = self.batch
        twin_good, twin_defective, twin_masks, _ = self.twin_batch
        x = models.add_coords(2 * good - 1)
        seen = jnp.concatenate([x, 2 * defective - 1, 4 * jnp.abs(good - defective)], axis=-1)
        beside = jnp.zeros((*[n // 2 if i else n for i, n in enumerate(masks.shape)], 1))
        found: dict[str, Contest] = {}

        def both_ways(
            name: str, apply: Callable, params: dict, module: torch.nn.Module, *inputs: jax.Array
        ) -> None:
            twin_inputs = [tensor(array) for array in inputs]
            loops = int(name.startswith("memory"))
            flops = self.count_flops(apply, params, *inputs, loops=loops)
            forward = jax.jit(apply)

            def total(params: dict) -> jax.Array:
                return jnp.mean(apply(params, *inputs))

            backward = jax.jit(jax.grad(total))

            def twin_forward() -> torch.Tensor:
                with torch.no_grad():
                    return module(*twin_inputs)

            def twin_backward() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(module(*twin_inputs).mean(), list(module.parameters()))

            found[name] = (lambda: forward(params, *inputs), twin_forward, flops)
            if list(module.parameters()):
                flops = models.count_flops(jax.grad(total), params)
                found[f"{name}, with gradients"] = (
                    lambda: backward(params),
                    twin_backward,
                    flops,
                )

        def applied(module: models.nn.Module) -> Callable:
            return lambda params, *inputs: module.apply({"params": params}, *inputs)

        both_ways(
            "memory's distances",
            applied(models.PatchMemory(model.memory)),
            generator["PatchMemory_0"],
            twin.memory,
            defective,
        )
        both_ways(
            "reconstructor",
            applied(models.Reconstructor(width, depth, model.latent)),
            generator["Reconstructor_0"],
            twin.reconstructor,
            x,
        )
        both_ways(
            "map head",
            applied(models.MapHead(width, depth)),
            generator["MapHead_0"],
            twin.map_head,
            seen,
            beside,
        )
        both_ways(
            "discriminator",
            applied(self.keywords["discriminator"]),
            self.params["discriminator"],
            self.training.discriminator,
            good,
            masks,
        )
        logits = jnp.asarray(np.random.default_rng(0).normal(size=masks.shape), jnp.float32)
        focal = jax.jit(jax.grad(lambda x: losses.segmentation_focal(logits=x, masks=masks)))
        twin_logits = tensor(logits).requires_grad_()
        found["segmentation loss, with gradient"] = (
            lambda: focal(logits),
            lambda: torch.autograd.grad(
                torch_reference.segmentation_loss(twin_logits, twin_masks, "focal"), twin_logits
            ),
            0.0,
        )
        return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="pixels a side")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--parts", action="store_true", help="also what a step is made of")
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
            **convolution(case.batch_size, side // 2, 45, 16),  # the map head's first
        }
        print_table(contests, flags.runs, clock)
        if flags.parts:
            print()
            print_table(case.parts_of_a_step(), flags.runs, clock)


if __name__ == "__main__":
    main()

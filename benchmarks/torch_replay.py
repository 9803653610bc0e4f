"""Repeats a replay (docs/pytorch.md) in PyTorch and reports where the two implementations differ.

    python launch.py --mode=export_replay --config=configs/cpu.py:screw --config.data_dir=DIR \\
        --config.num_steps=50 --workdir=W
    python benchmarks/torch_replay.py W/screw/replay --out REPORT

Both implementations start from the replay's weights and are given its batches; each continues from
the weights that it computes itself. In float64 they must agree; in float32 rounding makes them
drift apart. Writes REPORT.md, REPORT.json, the curves of the differences, REPORT.png, and those of
the losses, REPORT_losses.png.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
import torch_networks
import torch_training
from ml_collections import ConfigDict
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.interop import replay, torch_weights  # noqa: E402
from anoseg_jax.method import memory_bank, train, train_state  # noqa: E402
from anoseg_jax.method.train_state import StaticOptions, TrainState  # noqa: E402
from anoseg_jax.running import files  # noqa: E402

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

# The largest relative difference of values that count as equal.
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
OUTPUTS = ("logits", "reconstructions", "fake_logits", "real_logits")
Arrays = Mapping[str, np.ndarray]


def create_state(
    config: ConfigDict, weights: Arrays, dtype: str
) -> tuple[TrainState, StaticOptions, dict[str, Any]]:
    """Returns the training state that has a replay's initial weights, and the options of a step.

    Args:
      config: the options of the replay.
      weights: a state_dict of both players and of the memory bank.
      dtype: "float32", or "float64" in JAX's x64 mode: of the state, the options, the computation.
    """
    with jax.enable_x64(False):
        static, _ = train_state.split_options(config)
        template = train_state.template(config)
    shapes = {
        "generator": torch_weights.generator_arrays(template.generator, template.memory_bank),
        "discriminator": template.discriminator,
    }
    params = jax.tree.map(
        lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else None),
        torch_weights.from_torch(weights, shapes),
    )
    bank = memory_bank.from_dicts(params["generator"].pop("memory_bank", None))
    # `split_options` rounds to float32, which float64 would show.
    options = {
        "loss": {name: config.loss[name] for name in train_state.LOSS_WEIGHTS},
        "optimizer": {name: config[name] for name in train_state.OPTIMIZER_OPTIONS},
    }
    options = jax.tree.map(lambda x: jnp.asarray(x, dtype), options)
    optimizers = train_state.create_optimizers(options["optimizer"])
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        generator_opt=optimizers[0].init(params["generator"]),
        discriminator_opt=optimizers[1].init(params["discriminator"]),
        ema=jax.tree.map(jnp.copy, params["generator"]),
        memory_bank=bank,
        **params,
    )
    # A 32-bit count makes a 32-bit learning rate.
    state = jax.tree.map(lambda x: x.astype(int) if x.dtype == jnp.int32 else x, state)
    modules = {
        name: getattr(static, name).clone(dtype=jnp.dtype(dtype)) for name in TrainState.PLAYERS
    }
    return state, static._replace(**modules), options


def run_step(
    state: TrainState,
    examples: Mapping[str, jax.Array],
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
) -> tuple:
    """As `replay.step`; computes the distances to the memory bank of `state`."""
    images, image_ids = examples["defective"], examples["image_ids"]
    bank_distances = train.bank_distances(state, images, image_ids, static=static)
    examples = {**examples, "bank_distances": bank_distances}
    return *replay.step(state, examples, options, static=static), bank_distances


class Ours:
    """The training of anoseg_jax in a chosen precision; float64 needs JAX's x64 mode."""

    def __init__(self, config: ConfigDict, initial: Arrays, dtype: str) -> None:
        """`initial` are the replay's weights."""
        self.state, static, self.options = create_state(config, initial, dtype)
        self.run = jax.jit(partial(run_step, static=static))

    def step(self, batch: Arrays) -> tuple[dict[str, Arrays], dict[str, float]]:
        """Returns outputs, gradients and the state after a step, by kind and name; and losses."""
        examples = {
            name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for name, x in batch.items()
        }
        self.state, metrics, gradients, outputs, bank_distances = self.run(
            self.state, examples, self.options
        )
        kinds = {"outputs": {name: replay.to_nchw(x) for name, x in outputs.items()}}
        if bank_distances is not None:
            kinds["outputs"]["bank_distances"] = replay.to_nchw(bank_distances)
        losses = {name: float(value) for name, value in metrics.items()}
        return kinds | replay.by_name(self.state, gradients), losses


class Twin:
    """The same training in PyTorch."""

    def __init__(self, config: ConfigDict, initial: Arrays, dtype: str) -> None:
        """`initial` are the replay's weights."""
        players = torch_networks.create(config)
        self.dtype = getattr(torch, dtype)
        self.outputs: dict[str, torch.Tensor] = {}
        for name, player in zip(TrainState.PLAYERS, players, strict=True):
            weights = torch_weights.group(initial, name)
            player.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()})
            player.to(self.dtype)
        self.training = torch_training.Training(*players, config)
        generator, discriminator = players
        generator.register_forward_hook(self.keep_generator_outputs)
        discriminator.register_forward_hook(self.keep_discriminator_outputs)

    def keep_generator_outputs(self, module: Any, inputs: tuple, outputs: tuple) -> None:
        """Keeps what the generator puts out, and the distances that it was given."""
        self.outputs = dict(zip(OUTPUTS[:2], outputs, strict=True))
        if inputs[1] is not None:
            self.outputs["bank_distances"] = inputs[1]

    def keep_discriminator_outputs(self, module: Any, inputs: tuple, logits: torch.Tensor) -> None:
        """Keeps what the discriminator puts out: first for generated pairs, then for real ones.

        Those of the gradient penalty come after them and are not kept.
        """
        for name in OUTPUTS[2:]:
            if name not in self.outputs:
                self.outputs[name] = logits
                break

    def step(self, batch: Arrays) -> tuple[dict[str, Arrays], dict[str, float]]:
        """As `Ours.step`."""
        tensors = {name: torch.from_numpy(x) for name, x in batch.items()}
        metrics = self.training.step(tensors)
        kinds = {"outputs": self.outputs} | self.by_name()
        losses = {name: float(value) for name, value in metrics.items()}
        return {
            kind: {name: x.detach().numpy() for name, x in of_kind.items()}
            for kind, of_kind in kinds.items()
        }, losses

    def by_name(self) -> dict[str, dict[str, torch.Tensor]]:
        """As `replay.by_name`."""
        names = ("weights", "average", "gradients", "first_moment", "second_moment")
        kinds: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
        training = self.training
        for player in TrainState.PLAYERS:
            module, moments = getattr(training, player), training.optimizers[player].state
            for name, x in module.state_dict().items():
                kinds["weights"][f"{player}.{name}"] = x
            named = zip(module.named_parameters(), training.gradients[player], strict=True)
            for (name, parameter), gradient in named:
                key = f"{player}.{name}"
                kinds["gradients"][key] = gradient
                kinds["first_moment"][key] = moments[parameter]["exp_avg"]
                kinds["second_moment"][key] = moments[parameter]["exp_avg_sq"]
        for name, x in training.average.named_parameters():
            kinds["average"][f"generator.{name}"] = x
        return kinds


def difference(ours: Arrays, twin: Arrays) -> tuple[float, str]:
    """Returns the largest relative difference of two sets of arrays, and the array that has it.

    An array's is the largest absolute difference over the largest absolute value.

    Raises ValueError unless both have the same names.
    """
    if set(ours) != set(twin):
        raise ValueError(f"only in one of the two: {sorted(set(ours) ^ set(twin))}")
    worst = (0.0, "")
    for name, array in ours.items():
        absolute = float(np.max(np.abs(array - twin[name])))
        if absolute:
            largest = float(np.max(np.abs(array)))
            worst = max(worst, (absolute / largest if largest else np.inf, name))
    return worst


def compare(folder: Path, dtype: str, steps: int | None = None) -> list[dict[str, Any]]:
    """Repeats a replay in both implementations; returns a row of differences for each step.

    Args:
      folder: the replay.
      dtype: "float64" or "float32".
      steps: the number of steps; None for all.

    Returns:
      For each kind its largest relative `difference` and the array that has it, `of`; for each
      loss the same; `losses` has both values of each loss. Raises ValueError if the folder holds a
      replay of another format.
    """
    written = json.loads((folder / "replay.json").read_text())
    if written["format"] != replay.FORMAT:
        raise ValueError(f"{folder}: format {written['format']!r}, must be {replay.FORMAT!r}")
    config = ConfigDict(written["config"])
    initial, _ = torch_weights.load(folder / "initial.safetensors")
    rows = []
    with jax.enable_x64(dtype == "float64"):
        both = Ours(config, initial, dtype), Twin(config, initial, dtype)
        for line in tqdm(written["steps"][:steps], desc=dtype, disable=None, leave=False):
            batch, _ = torch_weights.load(folder / f"batch_{line['step']:05}.safetensors")
            batch = {
                name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in batch.items()
            }
            (ours, losses), (twin, twin_losses) = (side.step(batch) for side in both)
            row = {"step": line["step"]}
            for kind in ours:
                largest, name = difference(ours[kind], twin[kind])
                row[kind] = {"difference": largest, "of": name}
            row["losses"] = {name: (losses[name], twin_losses[name]) for name in losses}
            for name, (a, b) in row["losses"].items():
                row[name] = {"difference": abs(a - b) / max(abs(a), 1e-30), "of": name}
            rows.append(row)
    return rows


def kinds_of(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the names of what is compared at each step."""
    return [kind for kind in rows[0] if kind not in ("step", "losses")]


def loss_names(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the names of the losses of each step, without the gradient norms."""
    return [name for name in rows[0]["losses"] if name.startswith("loss")]


def first_difference(rows: list[dict[str, Any]], tolerance: float) -> str:
    """Says at which step the difference of which kinds first exceeds the tolerance."""
    for row in rows:
        larger = [
            f"{kind} by {row[kind]['difference']:.1e} ({row[kind]['of']})"
            for kind in kinds_of(rows)
            if not row[kind]["difference"] <= tolerance
        ]
        if larger:
            return f"beyond {tolerance:g} from step {row['step']} on: {', '.join(larger)}"
    return f"within {tolerance:g} in all of {len(rows)} steps"


def to_markdown(comparisons: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns the report: for each precision the first difference, and tables of some steps."""
    lines = []
    for dtype, rows in comparisons.items():
        steps = sorted({1, 2, 5, 10, 20, 50, 100, 200, 500, len(rows)} & set(range(len(rows) + 1)))
        lines += [f"{dtype}: {first_difference(rows, TOLERANCES[dtype])}", ""]
        lines.append("| relative difference at step | " + " | ".join(map(str, steps)) + " |")
        lines.append("|---" * (len(steps) + 1) + "|")
        for kind in kinds_of(rows):
            cells = [f"{rows[step - 1][kind]['difference']:.0e}" for step in steps]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines += ["", "| loss, JAX / PyTorch, at step | " + " | ".join(map(str, steps)) + " |"]
        lines.append("|---" * (len(steps) + 1) + "|")
        for name in loss_names(rows):
            pairs = [rows[step - 1]["losses"][name] for step in steps]
            lines.append(f"| {name} | " + " | ".join(f"{a:.5f} / {b:.5f}" for a, b in pairs) + " |")
        lines.append("")
    return "\n".join(lines)


def draw_curves(comparisons: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the differences over the steps, one panel for each precision."""
    count = len(comparisons)
    figure, panels = plt.subplots(
        1, count, figsize=(4 * count + 2, 3.6), sharey=True, squeeze=False, layout="tight"
    )
    for panel, (dtype, rows) in zip(panels[0], comparisons.items(), strict=True):
        for kind in kinds_of(rows):
            values = [row[kind]["difference"] or None for row in rows]  # no difference: no point
            dotted = kind.startswith(("loss", "gradient_norm"))
            style = {"linestyle": ":" if dotted else "-", "linewidth": 1.2}
            panel.semilogy([row["step"] for row in rows], values, label=kind, **style)
        panel.set(title=dtype, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative difference")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_losses(comparisons: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the losses of both: one row of panels for each precision, one panel for each loss."""
    names = loss_names(next(iter(comparisons.values())))
    size = (len(comparisons), len(names))
    figure, panels = plt.subplots(
        *size, figsize=(2.4 * size[1], 2.2 * size[0]), sharex=True, squeeze=False, layout="tight"
    )
    for (dtype, rows), line in zip(comparisons.items(), panels, strict=True):
        steps = [row["step"] for row in rows]
        for name, panel in zip(names, line, strict=True):
            ours, twins = zip(*(row["losses"][name] for row in rows), strict=True)
            panel.plot(steps, ours, label="JAX", color="tab:orange", linewidth=3, alpha=0.6)
            panel.plot(steps, twins, "--", label="PyTorch", color="black", linewidth=1)
            panel.set_title(f"{name.removeprefix('loss_')}, {dtype}", fontsize=9)
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("step", fontsize=8)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Repeats the replay and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of launch.py --mode=export_replay")
    parser.add_argument("--out", type=Path, required=True, help="written: OUT.md, .json, .png")
    parser.add_argument("--steps", type=int, help="only the first STEPS")
    parser.add_argument("--dtype", choices=TOLERANCES, nargs="+", default=list(TOLERANCES))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    comparisons = {
        dtype: compare(arguments.folder, dtype, arguments.steps) for dtype in arguments.dtype
    }
    text = json.dumps(comparisons, indent=2) + "\n"
    files.write_text(arguments.out.with_suffix(".json"), text)
    files.write_text(arguments.out.with_suffix(".md"), to_markdown(comparisons))
    draw_curves(comparisons, arguments.out.with_suffix(".png"))
    draw_losses(comparisons, arguments.out.with_name(f"{arguments.out.stem}_losses.png"))
    print(to_markdown(comparisons))


if __name__ == "__main__":
    main()

"""Repeats a replay (docs/pytorch.md) with the twin in PyTorch and says where the two part ways.

    python launch.py --mode=export_replay --config=configs/cpu.py:screw --config.data_dir=DIR \\
        --config.num_steps=50 --workdir=W
    python benchmarks/torch_replay.py W/screw/replay --out REPORT

Both start from the replay's weights, see its batches, and go on from their own weights: first in
float64, where they must agree, then in float32, where rounding makes them drift. Writes REPORT.md,
REPORT.json and the curve REPORT.png.
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
import torch_reference
from ml_collections import ConfigDict
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax import evaluate
from anoseg_jax.interop import replay, torch_weights
from anoseg_jax.method import train  # noqa: E402
from anoseg_jax.method.train_state import Optimizers, TrainState  # noqa: E402

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

# From where on two values are not the same any more, relative to the largest of their kind.
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
OUTPUTS = ("logits", "reconstructions", "fake_logits", "real_logits")
Arrays = Mapping[str, np.ndarray]


def shapes_of(networks: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, dict]:
    """Returns the shapes of both networks' parameters, for torch_weights.from_torch."""
    key, images = jax.random.key(0), jnp.zeros((1, *image_size, 3))
    inputs = {"generator": (images,), "discriminator": (images, images[..., 0])}
    return {
        name: jax.eval_shape(networks[name].init, key, *of)["params"] for name, of in inputs.items()
    }


class Ours:
    """The networks of anoseg_jax in a precision of choice; made and called with its x64 mode."""

    def __init__(self, config: ConfigDict, initial: Arrays, dtype: str) -> None:
        """`initial` are the replay's weights."""
        keywords = train.create_parts(config).train_step.keywords
        with jax.enable_x64(False):
            networks = shapes_of(keywords, config.image_size)
        params = torch_weights.from_torch(initial, networks)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        optimizers = Optimizers(*map(replay.keep_gradients, keywords["optimizers"]))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            generator_opt=optimizers.generator.init(params["generator"]),
            discriminator_opt=optimizers.discriminator.init(params["discriminator"]),
            ema=params["generator"],
            **params,
        )
        # A 32-bit count makes a 32-bit learning rate.
        self.state = jax.tree.map(
            lambda x: x.astype(int) if jnp.issubdtype(x.dtype, jnp.integer) else x, state
        )
        self.run = jax.jit(
            partial(
                replay.step,
                optimizers=optimizers,
                loss=keywords["loss"],
                ema_decay=keywords["ema_decay"],
                **{name: keywords[name].clone(dtype=jnp.dtype(dtype)) for name in networks},
            )
        )

    def step(self, batch: Arrays) -> tuple[dict[str, Arrays], dict[str, float]]:
        """Returns what there is after a step, by kind and name, and the losses."""
        images = (batch[name].transpose(0, 2, 3, 1) for name in ("good", "defective"))
        self.state, metrics, outputs = self.run(self.state, *images, batch["masks"], batch["marks"])
        outputs = {name: replay.in_nchw(outputs[name]) for name in OUTPUTS}
        losses = {name: float(value) for name, value in metrics.items()}
        return {"outputs": outputs} | replay.by_name(self.state), losses


class Twin:
    """The same in PyTorch."""

    def __init__(self, config: ConfigDict, initial: Arrays, dtype: str) -> None:
        """`initial` are the replay's weights."""
        players = torch_reference.create(config)
        self.dtype = getattr(torch, dtype)
        self.outputs: list[torch.Tensor] = []
        for name, player in zip(("generator", "discriminator"), players, strict=True):
            weights = torch_weights.group(initial, name)
            player.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()})
            player.to(self.dtype)
        self.training = torch_reference.Training(*players, config)
        for player in players:
            player.register_forward_hook(lambda *call: self.outputs.append(call[-1]))

    def step(self, batch: Arrays) -> tuple[dict[str, Arrays], dict[str, float]]:
        """As `Ours.step`."""
        self.outputs.clear()
        named = {name: torch.from_numpy(x).to(self.dtype) for name, x in batch.items()}
        metrics = self.training.step(*(named[name] for name in replay.EXAMPLES))
        (logits, reconstructions), *judged = self.outputs
        outputs = dict(zip(OUTPUTS, (logits, reconstructions, *judged), strict=False))
        kinds = {"outputs": outputs} | self.by_name()
        losses = {name: float(value) for name, value in metrics.items()}
        return {
            kind: {name: x.detach().numpy() for name, x in of.items()} for kind, of in kinds.items()
        }, losses

    def by_name(self) -> dict[str, dict[str, torch.Tensor]]:
        """As `replay.by_name`."""
        found: dict[str, dict[str, torch.Tensor]] = {
            kind: {}
            for kind in ("weights", "average", "gradients", "first_moment", "second_moment")
        }
        training = self.training
        for player in ("generator", "discriminator"):
            module, moments = getattr(training, player), training.optimizers[player].state
            for name, x in module.state_dict().items():
                found["weights"][f"{player}.{name}"] = x
            named = zip(module.named_parameters(), training.gradients[player], strict=True)
            for (name, parameter), gradient in named:
                key = f"{player}.{name}"
                found["gradients"][key] = gradient
                found["first_moment"][key] = moments[parameter]["exp_avg"]
                found["second_moment"][key] = moments[parameter]["exp_avg_sq"]
        for name, x in training.average.named_parameters():
            found["average"][f"generator.{name}"] = x
        return found


def difference(ours: Arrays, twin: Arrays) -> tuple[float, str]:
    """Returns the largest difference of two sets of arrays, relative, and which array has it.

    Of each array, the largest absolute difference over its largest absolute value.

    Raises ValueError unless both have the same names.
    """
    if set(ours) != set(twin):
        raise ValueError(f"only one of the two has {sorted(set(ours) ^ set(twin))}")
    worst = (0.0, "")
    for name, array in ours.items():
        apart = float(np.max(np.abs(array - twin[name])))
        if apart:
            largest = float(np.max(np.abs(array)))
            worst = max(worst, (apart / largest if largest else np.inf, name))
    return worst


def compare(folder: Path, dtype: str, steps: int | None = None) -> list[dict[str, Any]]:
    """Repeats a replay's first steps (None: all) with both; returns a row of differences a step.

    Of each kind the relative difference and the array with the largest one; `losses` has both
    values of each loss.
    """
    about = json.loads((folder / "replay.json").read_text())
    config, recorded = ConfigDict(about["config"]), about["steps"][:steps]
    initial, _ = torch_weights.load(folder / "initial.safetensors")
    rows = []
    with jax.enable_x64(dtype == "float64"):
        both = Ours(config, initial, dtype), Twin(config, initial, dtype)
        for line in tqdm(recorded, desc=dtype, disable=None, leave=False):
            batch, _ = torch_weights.load(folder / f"batch_{line['step']:05}.safetensors")
            batch = {name: x.astype(dtype) for name, x in batch.items()}
            (ours, losses), (twin, twin_losses) = (side.step(batch) for side in both)
            row = {"step": line["step"]}
            row |= {
                kind: dict(
                    zip(("difference", "of"), difference(ours[kind], twin[kind]), strict=True)
                )
                for kind in ours
            }
            row["losses"] = {name: (losses[name], twin_losses[name]) for name in losses}
            for name, (a, b) in row["losses"].items():
                row[name] = {"difference": abs(a - b) / max(abs(a), 1e-30), "of": name}
            rows.append(row)
    return rows


def kinds_of(rows: list[dict[str, Any]]) -> list[str]:
    """Returns what is compared at each step."""
    return [kind for kind in rows[0] if kind not in ("step", "losses")]


def where_they_part(rows: list[dict[str, Any]], tolerance: float) -> str:
    """Says at which step the difference of which kinds first exceeds the tolerance."""
    for row in rows:
        apart = [(kind, row[kind]) for kind in kinds_of(rows)]
        apart = [
            f"{kind} by {found['difference']:.1e} ({found['of']})"
            for kind, found in apart
            if not found["difference"] <= tolerance
        ]
        if apart:
            return f"beyond {tolerance:g} from step {row['step']} on: {', '.join(apart)}"
    return f"within {tolerance:g} in all of {len(rows)} steps"


def as_markdown(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns the report: for each precision where they part, and the differences at some steps."""
    lines = []
    for dtype, rows in found.items():
        shown = sorted({1, 2, 5, 10, 20, 50, 100, 200, 500, len(rows)} & set(range(len(rows) + 1)))
        lines += [f"{dtype}: {where_they_part(rows, TOLERANCES[dtype])}", ""]
        lines.append("| relative difference at step | " + " | ".join(map(str, shown)) + " |")
        lines.append("|---" * (len(shown) + 1) + "|")
        for kind in kinds_of(rows):
            cells = [f"{rows[step - 1][kind]['difference']:.0e}" for step in shown]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the differences over the steps, one panel a precision."""
    figure, panels = plt.subplots(
        1, len(found), figsize=(4 * len(found) + 2, 3.6), sharey=True, squeeze=False, layout="tight"
    )
    for panel, (dtype, rows) in zip(panels[0], found.items(), strict=True):
        for kind in kinds_of(rows):
            values = [row[kind]["difference"] or None for row in rows]  # none at all: no point
            dotted = kind.startswith(("loss", "gradient_norm"))
            style = {"linestyle": ":" if dotted else "-", "linewidth": 1.2}
            panel.semilogy([row["step"] for row in rows], values, label=kind, **style)
        panel.set(title=dtype, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative difference")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Repeats the replay and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of launch.py --mode=export_replay")
    parser.add_argument("--out", type=Path, required=True, help="written: OUT.md, .json, .png")
    parser.add_argument("--steps", type=int, help="the first ones only")
    parser.add_argument("--dtype", choices=TOLERANCES, nargs="+", default=list(TOLERANCES))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {dtype: compare(arguments.folder, dtype, arguments.steps) for dtype in arguments.dtype}
    evaluate.write_text(arguments.out.with_suffix(".json"), json.dumps(found, indent=2) + "\n")
    evaluate.write_text(arguments.out.with_suffix(".md"), as_markdown(found))
    draw(found, arguments.out.with_suffix(".png"))
    print(as_markdown(found))


if __name__ == "__main__":
    main()

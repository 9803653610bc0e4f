"""The log of a training run: train_log.jsonl, the terminal, TensorBoard.

A line of train_log.jsonl is a JSON object: `step`; the means, since the line before, of the losses
and gradient norms; `learning_rate` of the step; `images_per_second`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path
from tqdm import tqdm

from anoseg_jax.running import files

LOSSES = ("loss_segmentation", "loss_adversarial", "loss_reconstruction", "loss_discriminator")


def create_writer(category_dir: Path) -> Any:
    """Returns a clu writer of TensorBoard events; imports TensorFlow."""
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(category_dir))


def keep_until(path: Path, step: int) -> None:
    """Drops the log's lines after `step`: a run that was killed may be ahead of its checkpoint."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    files.write_text(path, "".join(f"{line}\n" for line in kept))


def write_line(
    path: Path, line: dict[str, Any], bar: tqdm, num_steps: int, writer: Any = None
) -> None:
    """Adds the line to the log and to TensorBoard, and shows it on the bar.

    Without a terminal it is printed as text. Losses that are switched off are null.
    """
    if writer is not None:
        writer.write_scalars(line["step"], {k: v for k, v in line.items() if k != "step"})
    complete = {"step": line["step"]} | dict.fromkeys((*LOSSES, "images_per_second")) | line
    before = path.read_text() if path.exists() else ""
    files.write_text(path, before + json.dumps(complete) + "\n")
    # The losses of this line by their first three letters: seg, adv, rec, dis. A loss that is
    # switched off is not shown.
    terms = {name.removeprefix("loss_")[:3]: line[name] for name in LOSSES if name in line}
    text = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    speed = line.get("images_per_second")
    rate = f"  {speed:.1f} images/s" if speed else ""
    print(f"step {line['step']}/{num_steps}  {text}{rate}", flush=True)


def draw_panels(
    examples: Mapping[str, np.ndarray], maps: np.ndarray, reconstructions: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns rows of (good, defective, mask, map, reconstruction) by name: [b, h, 5 w, 3]."""
    in_colour = lambda x: np.repeat(x[..., None], 3, axis=-1)  # noqa: E731
    columns = [examples["good"], examples["defective"], in_colour(examples["masks"])]
    columns += [in_colour(maps), reconstructions]
    return {"good|defective|mask|map|reconstruction": np.concatenate(columns, axis=2)}

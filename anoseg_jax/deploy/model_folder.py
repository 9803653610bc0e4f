"""Finds the folder of a trained model in a workdir, and keeps thresholds beside the model."""

import json
from typing import Any

from etils import epath

from anoseg_jax import UsageError
from anoseg_jax.running.files import write_text

# How far below a workdir a category folder can be: W/<variant>/seed_<n>/<category>.
MAX_DEPTH = 3
THRESHOLDS = "thresholds.json"


class ModelError(UsageError):
    """There is no model where one was expected; the message is one line that says what is there."""


def find_model(workdir: epath.PathLike, category: str | None = None) -> epath.Path:
    """Returns the category folder with the checkpoints of a model.

    Args:
      workdir: a category folder, or the workdir of a run, of one of its variants or seeds.
      category: which of the models there; needed where there are several.

    Raises:
      ModelError: there is none, or there are several; names them.
    """
    workdir = epath.Path(workdir).expanduser()
    if not workdir.is_dir():
        raise ModelError(f"{workdir}: is not a folder; give the --workdir that was trained in")
    if _has_checkpoints(workdir):
        if category not in (None, workdir.name):
            raise ModelError(f"{workdir}: is the model of {workdir.name}, not of {category}")
        return workdir
    models = _models_below(workdir, MAX_DEPTH)
    names = sorted({folder.name for folder in models})
    chosen = [folder for folder in models if category in (None, folder.name)]
    if len(chosen) == 1:
        return chosen[0]
    if not models:
        raise ModelError(f"{workdir}: no trained model in it: train there first")
    if not chosen:
        raise ModelError(f"{workdir}: no model of {category} in it, only of {', '.join(names)}")
    if category is None and len(names) > 1:
        raise ModelError(
            f"{workdir}: has models of {', '.join(names)}: choose one, for example "
            f"--category={names[0]}"
        )
    parents = ", ".join(str(folder.parent) for folder in chosen)
    raise ModelError(
        f"{workdir}: has several models of {chosen[0].name}, in {parents}: give one of these "
        "folders as --workdir"
    )


def _has_checkpoints(folder: epath.Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _models_below(folder: epath.Path, depth: int) -> list[epath.Path]:
    models = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if _has_checkpoints(inner):
            models.append(inner)
        elif depth > 1 and not inner.name.startswith("."):
            models += _models_below(inner, depth - 1)
    return models


def write_thresholds(folder: epath.Path, weights_sha256: str, thresholds: dict[str, Any]) -> None:
    """Writes thresholds.json; they replace those of the checkpoint with the same weights."""
    content = {"weights_sha256": weights_sha256, "thresholds": thresholds}
    write_text(folder / THRESHOLDS, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_thresholds(folder: epath.Path, weights_sha256: str) -> dict[str, Any] | None:
    """Returns the thresholds that were written for these weights; None if there are none.

    Raises ModelError if the file is damaged.
    """
    path = folder / THRESHOLDS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        same_model = content["weights_sha256"] == weights_sha256
        return content["thresholds"] if same_model else None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): remove it") from None

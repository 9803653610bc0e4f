"""AnoSeg in JAX/Flax: learns to draw anomaly maps from good parts alone.

`anoseg_jax.fit` trains a model, `anoseg_jax.Predictor` loads one; both are in `anoseg_jax.api`.
"""

from typing import Any


class UsageError(ValueError):
    """An error that the user can fix.

    Each line of the message says what is wrong, where, and what to do.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def __getattr__(name: str) -> Any:
    """Imports `Predictor` and `fit` when they are asked for: JAX takes a second.

    `Predictor` needs neither TensorFlow nor what else only training needs.
    """
    if name == "Predictor":
        from anoseg_jax.deploy.predictor import Predictor

        return Predictor
    if name == "fit":
        from anoseg_jax.api import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

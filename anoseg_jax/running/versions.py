"""Versions of what a result was computed with."""

import importlib.metadata
import platform
from collections.abc import Sequence

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of packages, by default those of a training."""
    of_packages = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | of_packages

"""Versions of what a result was computed with."""

import importlib.metadata
import platform

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | packages

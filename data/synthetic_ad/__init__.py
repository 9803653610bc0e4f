"""TFDS builder of a generated data set of industrial parts."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Returns CATEGORIES of drawing, which `python -m` could not run were it imported here."""
    if name != "CATEGORIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data.synthetic_ad import drawing

    return drawing.CATEGORIES

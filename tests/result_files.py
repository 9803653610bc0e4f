"""Result files as a run writes them."""

from pathlib import Path
from typing import Any

from anoseg_jax.evaluation import results


def write_results(
    workdir: Path, category: str, content: dict[str, Any], *, config: str, command: str
) -> None:
    """Writes the results of a category and those of `workdir`."""
    results.write_category(workdir / category, content, config=config, command=command)
    results.assemble(workdir, [category])

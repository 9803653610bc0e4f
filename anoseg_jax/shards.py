"""What a run consists of, and how the results of its shards are merged.

A run is a list of units (variant, seed, category), each in a folder of its own. With
`config.shard` = i/n a command runs every n-th of them; `merge` writes the files that one command
for all would have written. Importing this imports no JAX.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.evaluation import results
from anoseg_jax.report import ablation, pages

Unit = tuple[str, int | None, str]  # variant ("" without any), seed (None without any), category


def plan_of(config: ConfigDict, categories: Sequence[str], command: str) -> dict[str, Any]:
    """Returns what a run consists of, a dict that JSON can hold."""
    return {
        "variants": list(config.variants),
        "seeds": list(config.seeds),
        "categories": list(categories),
        "image_size": list(config.image_size),
        "command": command,
    }


def units_of(plan: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> list[Unit]:
    """Returns the units of shard i of n: every n-th of all variants, seeds and categories."""
    index, count = shard
    variants, seeds = plan["variants"] or [""], plan["seeds"] or [None]
    return list(itertools.product(variants, seeds, plan["categories"]))[index::count]


def folder_of(workdir: Path, variant: str = "", seed: int | None = None) -> Path:
    """Returns the folder that holds the category folders of a variant and seed."""
    return results.seed_folder(workdir / variant if variant else workdir, seed)


def write_plan(workdir: Path, plan: Mapping[str, Any], shard: tuple[int, int]) -> None:
    """Writes `workdir`/run.json; every shard writes the same, each to its own temporary file."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / f"run.json.{shard[0]}.tmp"
    temporary.write_text(json.dumps(plan, indent=2) + "\n")
    temporary.replace(workdir / "run.json")


def write_mean(workdir: Path, plan: Mapping[str, Any], variant: str) -> bool:
    """Writes results.json and .md of the mean over those seeds that have one; False without any."""
    by_seed = results.read_finished({s: folder_of(workdir, variant, s) for s in plan["seeds"]})
    if by_seed:
        results.write_everything(folder_of(workdir, variant), results.mean_over_seeds(by_seed))
    return bool(by_seed)


def write_table(workdir: Path, plan: Mapping[str, Any], failures: Sequence[str]) -> dict[str, Any]:
    """Writes ablation.json and .md of the plan's variants; returns the table."""
    table = ablation.tabulate(workdir, plan["variants"], plan["categories"], plan["seeds"])
    table |= {key: plan[key] for key in ("image_size", "command")} | {"failures": list(failures)}
    ablation.write(table, workdir)
    return table


def merge(workdir: Path) -> list[str]:
    """Writes the files above the category folders, as one command for all shards would have.

    These are results.json, results.md and report.html for each variant and seed, the mean over
    seeds, and the table of the variants. Returns a line for each category without results, and for
    each folder whose categories were run with different options. Raises UsageError if no shard has
    written a run.json.
    """
    try:
        plan = json.loads((workdir / "run.json").read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{workdir} has no run.json: no run with --config.shard=i/n was started there"
        ) from None
    missing = []
    for variant in plan["variants"] or [""]:
        for seed in plan["seeds"] or [None]:
            folder = folder_of(workdir, variant, seed)
            contents = results.assemble(folder, plan["categories"])
            missing += [
                f"{folder / name}: has no results.json: its shard failed, or is not done"
                for name in plan["categories"]
                if name not in contents
            ]
            if len({content["config_sha256"] for content in contents.values()}) > 1:
                missing.append(
                    f"{folder}: the config_sha256 of its categories differ: run all shards with "
                    "the same options"
                )
            if contents:
                pages.write_run(folder)
        if plan["seeds"]:
            write_mean(workdir, plan, variant)
    if plan["variants"]:
        write_table(workdir, plan, missing)
    return missing

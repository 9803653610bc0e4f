"""A run spread over independent jobs: what each of them does, and their results put together.

The jobs of a run share a workdir and write into the folders of their own categories only. Each
leaves the same `W/run.json`: what the whole is made of. All is read from files.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.evaluation.results import assemble, read_results, write_everything
from anoseg_jax.report import ablation, pages, runs

Unit = tuple[str, int | None, str]  # variant ("" without any), seed (None without any), category


class MergeError(UsageError):
    """A workdir that cannot be merged; the message is one line that says why."""


def plan_of(config: ConfigDict, categories: Sequence[str], command: str) -> dict[str, Any]:
    """Returns what a run is made of, a dict that JSON can hold."""
    return {
        "variants": list(config.variants),
        "seeds": list(config.seeds),
        "categories": list(categories),
        "image_size": list(config.image_size),
        "command": command,
    }


def units_of(plan: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> list[Unit]:
    """Returns what shard i of n does: every n-th of all variants, seeds and categories."""
    index, count = shard
    variants, seeds = plan["variants"] or [""], plan["seeds"] or [None]
    return list(itertools.product(variants, seeds, plan["categories"]))[index::count]


def folder_of(workdir: Path, variant: str = "", seed: int | None = None) -> Path:
    """Returns the folder that holds the category folders of a variant and seed."""
    folder = workdir / variant if variant else workdir
    return folder if seed is None else folder / f"seed_{seed}"


def write_plan(workdir: Path, plan: Mapping[str, Any], shard: tuple[int, int]) -> None:
    """Writes `workdir`/run.json; every job writes the same, each under a name of its own first."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / f"run.json.{shard[0]}.tmp"
    temporary.write_text(json.dumps(plan, indent=2) + "\n")
    temporary.replace(workdir / "run.json")


def write_mean(workdir: Path, seeds: Sequence[int]) -> bool:
    """Writes results.json and .md of the mean over those seeds that have one; False without any."""
    folders = {seed: folder_of(workdir, seed=seed) for seed in seeds}
    results = {
        seed: read_results(folder)
        for seed, folder in folders.items()
        if (folder / "results.json").exists()
    }
    if results:
        write_everything(workdir, runs.mean_over_seeds(results))
    return bool(results)


def write_table(workdir: Path, plan: Mapping[str, Any], failures: Sequence[str]) -> dict[str, Any]:
    """Writes ablation.json and .md of the plan's variants; returns the table."""
    table = ablation.tabulate(workdir, plan["variants"], plan["categories"], plan["seeds"])
    made = {"image_size": plan["image_size"], "command": plan["command"]}
    table |= made | {"failures": list(failures)}
    ablation.write(table, workdir)
    return table


def merge(workdir: Path) -> list[str]:
    """Puts the results that the jobs of a run have written together, as one job would have.

    Writes results.json, results.md and report.html for each variant and seed, the mean over seeds,
    and the table of the variants. Returns a line for each category without results, and for each
    folder whose categories were run with different options.

    Raises:
      MergeError: no job has left a run.json.
    """
    try:
        plan = json.loads((workdir / "run.json").read_text())
    except FileNotFoundError:
        raise MergeError(
            f"{workdir} has no run.json: no job with --config.shard=i/n was started there"
        ) from None
    missing = []
    for variant in plan["variants"] or [""]:
        for seed in plan["seeds"] or [None]:
            folder = folder_of(workdir, variant, seed)
            found = assemble(folder, plan["categories"])
            missing += [
                f"{folder / name}: has no results.json: its job failed, or is not done"
                for name in plan["categories"]
                if name not in found
            ]
            if len({of_category["config_sha256"] for of_category in found.values()}) > 1:
                missing.append(
                    f"{folder}: the config_sha256 of its categories differ: run all jobs with the "
                    "same options"
                )
            if found:
                pages.write_run(folder)
        if plan["seeds"]:
            write_mean(folder_of(workdir, variant), plan["seeds"])
    if plan["variants"]:
        write_table(workdir, plan, missing)
    return missing

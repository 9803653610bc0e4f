"""The tables of benchmarks/accelerator.py as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from training_curve import METRICS

Row = Mapping[str, Any]
TIMING_COLUMNS = ("program", "call", "precision", "batch", "ms", "images/s", "first call, s")
TIMING_NOTE = (
    "Median of 3 blocks of calls. The training step draws its examples and updates both players; "
    "the twin's is given its examples. bfloat16 of the twin is torch.autocast's. The first call "
    "compiles, or loads from the cache."
)
CURVE_NOTE = (
    "Seconds of training alone, without evaluations; averaged weights. Losses and gradient norms: "
    "median / 99th percentile of the steps since the row before."
)


def to_line(cells: Sequence[str]) -> str:
    """Returns a line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def to_table(columns: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Returns the lines of a markdown table."""
    return [to_line(columns), "|---" * len(columns) + "|", *lines]


def machine_line(machine: Row) -> str:
    """Returns one line: the device, the number of CPU cores, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['devices']} x {machine['device']} ({machine['platform']}), "
        f"{machine['cpu_cores']} CPU cores; {versions}"
    )


def timing_line(row: Row) -> str:
    """Returns a line of the table of timings, see `step_times.measure`."""
    case = [row["program"], row["what"], row["dtype"], str(row["batch_size"] or "")]
    if "note" in row:
        return to_line([*case, row["note"], "", ""])
    numbers = f"{row['ms']:.2f}", f"{row['images_per_second']:,.0f}", f"{row['first_call']:.1f}"
    return to_line([*case, *numbers])


def header(names: Sequence[str]) -> list[str]:
    """Returns the header of the table of a training whose steps have metrics of these names."""
    return to_table(["step", "seconds", *(name.replace("_", " ") for name in METRICS), *names], [])


def curve_line(row: Row, names: Sequence[str] | None = None) -> str:
    """Returns a line of the table of a training, see `training_curve.train_along`.

    `names` are the columns of the steps' metrics; None: all of the row's, in order.
    """
    metrics = ["–" if row[name] is None else f"{row[name]:.3f}" for name in METRICS]
    values = row["metrics_of_steps"]
    names = sorted(values) if names is None else names
    pairs = [values.get(name) for name in names]  # None: not finite, or not of this row
    cells = [f"{pair['median']:.3g} / {pair['p99']:.3g}" if pair else "–" for pair in pairs]
    return to_line([f"{row['step']:,}", f"{row['seconds']:.1f}", *metrics, *cells])


def run_lines(record: Row) -> list[str]:
    """Returns the section of a training."""
    lines = [f"## {record['name']}", ""]
    lines.append(f"{record['data']}; {record['overrides'] or 'the options of the command'}.")
    if not record["rows"]:
        return [*lines, "Not evaluated yet.", ""]
    lines.append(
        f"{record['num_steps']:,} steps ({record['chosen']}) of {record['step_ms']:.1f} ms; the "
        f"first call took {record['compile_seconds']:.1f} s."
    )
    names = sorted({name for row in record["rows"] for name in row["metrics_of_steps"]})
    lines += ["", *header(names), *(curve_line(row, names) for row in record["rows"]), ""]
    ended = record["rows"][-1].get("ended")
    return lines + ([f"Ended early: {ended}.", ""] if ended else [])


def to_markdown(table: Row) -> str:
    """Returns the whole of table.md."""
    lines = ["# Accelerator", "", machine_line(table["machine"]), ""]
    lines += [f"Options: `{' '.join(table['options'])}`", ""]
    if table["timing"]:
        rows = [timing_line(row) for row in table["timing"]]
        lines += ["## Speed", "", *to_table(TIMING_COLUMNS, rows), "", TIMING_NOTE, ""]
    for record in table["runs"]:
        lines += run_lines(record)
    return "\n".join([*lines, CURVE_NOTE, ""] if table["runs"] else lines)

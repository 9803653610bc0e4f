"""Times and trains on whatever accelerator this machine has, within a budget; needs no TensorFlow.

    python benchmarks/accelerator.py --config=configs/mvtec.py --data screw.npz --out=DIR \\
        --minutes=8 [--config.KEY=VALUE ...] [--variant='NAME: KEY=VALUE ...' ...]
    python benchmarks/accelerator.py --config=configs/mvtec.py --write-npz FOLDER screw.npz

First the speed of the training step and of the prediction, for at most a quarter of the budget.
Then each variant is trained on each category, with its test metrics along the way. DIR/table.md and
DIR/table.json are written again after each row: both are complete if the program is killed.

--data is a category folder or an npz file of --write-npz. A variant is a name and options that
differ from those of the command. Without num_steps among its options, or in the command, it has as
many steps as fit into its share of the minutes that are left.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BEGAN = time.monotonic()
# Several programs, and PyTorch in this one, share the accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Waiting threads of PyTorch would otherwise spin and take the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import category_arrays  # noqa: E402
import curve_tables  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import step_times  # noqa: E402
import training_curve  # noqa: E402
from absl import flags  # noqa: E402
from etils import epath  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from anoseg_jax import UsageError, options  # noqa: E402
from anoseg_jax.method import train  # noqa: E402
from anoseg_jax.running import files, progress, versions  # noqa: E402

Begin = Callable[[ConfigDict, dict[str, np.ndarray], str], Any]
TIMING_SHARE = 0.25  # of the budget, if there is training as well


class Run(NamedTuple):
    """A training: its name, category, options, and how they differ from the command's.

    `fill` is whether it has as many steps as fit.
    """

    name: str
    data: str
    config: ConfigDict
    overrides: str
    fill: bool


def parse_options(tokens: Sequence[str], config: ConfigDict | None = None) -> ConfigDict:
    """Returns the options that flags --config=FILE and --config.KEY=VALUE give.

    With a `config`, the flags change a copy of it. Values are parsed as launch.py does.

    Raises UsageError for an option that does not exist, or a value that it cannot have.
    """
    values, argv = flags.FlagValues(), ["accelerator.py", *tokens]
    how = {"flag_values": values, "sys_argv": argv}
    try:
        if config is None:
            config_flags.DEFINE_config_file("config", None, **how)
        else:
            config = config.copy_and_resolve_references()
            config_flags.DEFINE_config_dict("config", config, **how)
        values(argv)
        if values.config is None:
            raise UsageError("needs --config=FILE; options are set as --config.KEY=VALUE")
        return options.normalize(values.config)
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        raise UsageError(f"the config has no option {name!r}") from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise UsageError(lines[-1] if "Traceback" in str(error) else " ".join(lines)) from error


def list_runs(
    config: ConfigDict, tokens: Sequence[str], data: Sequence[str], variants: Sequence[str]
) -> list[Run]:
    """Returns the trainings of all variants on all categories; all options are checked.

    A variant's options are applied over the `category_options`. Raises UsageError.
    """
    runs = []
    for path in data:
        category = category_arrays.category_of(path)
        of_category = options.of_category(config, category)
        for variant in variants or [""]:
            name, _, overrides = (x.strip() for x in variant.partition(":"))
            if variant and not re.fullmatch(r"[\w.+-]+", name):
                raise UsageError(
                    f"--variant={variant!r} must be 'NAME: KEY=VALUE ...', the name of letters, "
                    "digits and _ . + -"
                )
            changes = [f"--config.{x.removeprefix('config.')}" for x in shlex.split(overrides)]
            if wrong := [x for x in changes if "=" not in x]:
                raise UsageError(f"--variant={variant!r}: {wrong[0][9:]!r} must be KEY=VALUE")
            try:
                of_run = parse_options(changes, of_category)
                options.check(of_run)
            except UsageError as error:
                raise UsageError(f"--variant={variant!r}: {error}") from error
            name = "_".join([category] * (len(data) > 1 or not variant) + [name] * bool(name))
            given = any(x.startswith("--config.num_steps=") for x in (*tokens, *changes))
            runs.append(Run(name, path, of_run, overrides, fill=not given))
    names = [run.name for run in runs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"there are several runs of the name {', '.join(sorted(repeated))}")
    return runs


def make_begin() -> Begin:
    """Returns `begin` of `training_curve.prepare`; equal configs and images share one state."""
    states: dict[tuple[str, str], Any] = {}

    def begin(config: ConfigDict, arrays: dict[str, np.ndarray], sha256: str) -> Any:
        schedule = {"num_steps": 0, "warmup_steps": 0, "learning_rate": 0.0}
        key = options.changed(config, schedule).to_json(), sha256
        if key not in states:
            state, _ = train.starting_point(config, arrays, sha256, None)
            states[key] = jax.device_get(state)
        return states[key]

    return begin


def describe_machine() -> dict[str, Any]:
    """Returns the device and the versions that the numbers depend on."""
    device, packages = jax.local_devices()[0], versions.versions()
    if importlib.util.find_spec("torch") is not None:
        packages["torch"] = importlib.metadata.version("torch")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.local_device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": packages,
    }


def make_reader() -> Callable[[Run], category_arrays.Images]:
    """Returns a function that reads the images of a run; runs of equal images read them once."""
    images: dict[tuple[str, tuple[int, ...]], category_arrays.Images] = {}

    def read(run: Run) -> category_arrays.Images:
        key = run.data, tuple(run.config.image_size)
        if key not in images:
            with progress.waiting(f"reading {run.data}", "once"):
                images[key] = category_arrays.read(run.data, run.config)
            print(category_arrays.describe(images[key]), flush=True)
        return images[key]

    return read


def announce(curve: Iterator[Any], num_steps: int) -> Iterator[Any]:
    """Yields the rows of a curve and says what it waits for."""
    for step in training_curve.evaluation_steps(num_steps):
        with progress.waiting(f"training to step {step:,} of {num_steps:,}", "then evaluating"):
            row = next(curve, None)
        if row is None:
            return
        yield row


def train_run(
    run: Run,
    images: category_arrays.Images,
    begin: Begin,
    deadline: float,
    record: dict[str, Any],
    write: Callable[[str], None],
) -> Any:
    """Trains and evaluates; returns the last state. `record` gets each row before it is written."""
    training = training_curve.prepare(run.config, images, begin)
    with progress.waiting("evaluating", "compiles first"):
        before = training_curve.test_metrics(run.config, training.state, images.test)
    if run.fill:
        steps = training_curve.fill_steps(training, images.test, deadline)
        with run.config.unlocked():
            run.config.num_steps = steps
    record |= {
        "num_steps": run.config.num_steps,
        "chosen": "fills the minutes" if run.fill else "given",
        "compile_seconds": training.compile_seconds,
        "step_ms": 1e3 * training.step_seconds,
        "config": json.loads(run.config.to_json()),
    }
    rows = [({"step": 0, "seconds": 0.0, **before, "metrics_of_steps": {}}, training.state)]
    curve = training_curve.train_along(training, images.test, deadline)
    for row, of_row in itertools.chain(rows, announce(curve, run.config.num_steps)):
        if len(record["rows"]) == 1:
            print(*curve_tables.header(sorted(row["metrics_of_steps"])), sep="\n")
        record["rows"].append(row | {"elapsed": time.monotonic() - BEGAN})
        write(curve_tables.curve_line(row))
        state = of_row
    return state


def write_maps(path: epath.Path, config: ConfigDict, state: Any, test: Any) -> None:
    """Writes the logits of the test images, see `training_curve.test_logits`."""
    data = io.BytesIO()
    np.savez_compressed(data, **training_curve.test_logits(config, state, test))
    files.write_bytes(path, data.getvalue())


def run_all(arguments: argparse.Namespace, of_timing: Run, runs: Sequence[Run]) -> bool:
    """Times and trains, writing the tables; returns whether every run took all its steps."""
    out, budget = epath.Path(arguments.out), 60 * arguments.minutes
    out.mkdir(parents=True, exist_ok=True)
    table = {"machine": describe_machine(), "options": arguments.options, "timing": [], "runs": []}
    read, begin = make_reader(), make_begin()

    def write(line: str) -> None:
        files.write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
        files.write_text(out / "table.md", curve_tables.to_markdown(table))
        print(line, flush=True)  # last: what is shown is in the files

    write(curve_tables.machine_line(table["machine"]))
    if arguments.timing:
        images = read(of_timing)
        arrays, _ = train.split_images(of_timing.config, images.train, images.validation)
        sha256 = train.images_sha256(images.train, images.validation)
        rows = step_times.measure(
            of_timing.config,
            images.train,
            begin(of_timing.config, arrays, sha256),
            deadline=BEGAN + budget * (TIMING_SHARE if arguments.training else 1),
            with_torch=arguments.torch,
        )
        for row in rows:
            table["timing"].append(row)
            write(curve_tables.timing_line(row))
    for index, run in enumerate(runs):
        # Each has its share of what is left; a run of given steps may take all of it.
        shares = len(runs) - index if run.fill else 1
        left = BEGAN + budget - time.monotonic()
        record = {"name": run.name, "data": run.data, "overrides": run.overrides, "rows": []}
        table["runs"].append(record)
        write(f"{run.name}: {run.overrides or 'the options of the command'}")
        deadline = time.monotonic() + left / shares
        state = train_run(run, read(run), begin, deadline, record, write)
        if arguments.maps:
            write_maps(out / f"{run.name}.npz", run.config, state, read(run).test)
    return not any("ended" in record["rows"][-1] for record in table["runs"])


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags; `options` are --config=FILE and --config.KEY=VALUE, not yet parsed."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **how)
    parser.add_argument("--data", nargs="+", default=[], help="category folders, npz files")
    parser.add_argument("--out", help="folder for table.md, table.json and maps")
    parser.add_argument("--minutes", type=float, default=8.0, help="from the start; default: 8")
    parser.add_argument("--variant", action="append", default=[], help="'NAME: KEY=VALUE ...'")
    parser.add_argument("--maps", action="store_true", help="write the last logits, NAME.npz")
    parser.add_argument("--no-timing", dest="timing", action="store_false")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--no-training", dest="training", action="store_false")
    parser.add_argument("--write-npz", nargs=2, metavar=("FOLDER", "NPZ"), help="and nothing else")
    arguments, arguments.options = parser.parse_known_args(argv)
    if unknown := [x for x in arguments.options if not re.match(r"--config[.=]", x)]:
        parser.error(f"unknown: {' '.join(unknown)}; options are --config.KEY=VALUE")
    if not arguments.write_npz and not (arguments.data and arguments.out):
        parser.error("needs --data and --out, or --write-npz")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        config = parse_options(arguments.options)
        options.use_compilation_cache(config.compilation_cache)
        if arguments.write_npz:
            folder, path = arguments.write_npz
            images = category_arrays.read_folder(folder, config)
            category_arrays.write_npz(images, path)
            print(f"{path}: {category_arrays.describe(images)}")
            return 0
        (of_timing,) = list_runs(config, arguments.options, arguments.data[:1], [])
        runs = list_runs(config, arguments.options, arguments.data, arguments.variant)
        complete = run_all(arguments, of_timing, runs if arguments.training else [])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

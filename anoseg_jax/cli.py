"""The command line: its flags, one function for each mode, exit codes.

Each mode imports what it needs. `--help` imports neither JAX nor TensorFlow; only modes that read
a data set (train, evaluate, check, export_replay) always import TensorFlow.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags
from etils.epath import Path
from ml_collections import config_flags

from anoseg_jax import UsageError

FLAGS = flags.FLAGS
PROCESSES = ("distributed", "coordinator", "num_processes", "process_id")
MODEL = ("category", "image_threshold", "pixel_threshold")


def train() -> int:
    """Trains, or resumes, and evaluates."""
    return _run(training=True)


def evaluate() -> int:
    """Evaluates the newest checkpoints, or the maps of another method."""
    return _run(training=False)


def _run(*, training: bool) -> int:
    from anoseg_jax import experiment

    failures = experiment.run(
        FLAGS.config,
        Path(FLAGS.workdir),
        _open_splits(training=training),
        training=training,
        command=shlex.join(["python", *sys.argv]),
    )
    return int(bool(failures))


def _open_splits(*, training: bool) -> dict:
    """Returns the splits of each category, after the options are checked."""
    from anoseg_jax import options
    from anoseg_jax.images import layout
    from data import sources

    config = FLAGS.config
    options.check(config, training=training)
    return sources.open_splits(
        config.dataset,
        config.categories,
        data_dir=config.data_dir,
        tfds_dir=config.tfds_dir,
        read=layout.ReadOptions.of(config),
        image_size=tuple(config.image_size),
        training=training,
    )


def export_replay() -> int:
    """Writes weights, batches and losses of each step, to compare another implementation with."""
    from anoseg_jax import experiment

    experiment.export_replay(FLAGS.config, Path(FLAGS.workdir), _open_splits(training=True))
    return 0


def check() -> int:
    """Reports on images and masks, without training; reads no --workdir."""
    from anoseg_jax.images import layout

    config = FLAGS.config
    read = layout.ReadOptions.of(config)
    categories = layout.scan_categories(config.data_dir, config.categories, read)
    image_size = tuple(config.image_size)
    print("\n\n".join(layout.report(category, image_size) for category in categories))
    return int(any(category.errors for category in categories))


def merge() -> int:
    """Merges the results of all runs with config.shard=i/n in one --workdir."""
    from anoseg_jax import experiment

    missing = experiment.merge(Path(FLAGS.workdir))
    print(f"merged the results that exist: {FLAGS.workdir}")
    return complain("\n".join(missing), int(bool(missing)))


def dry_run() -> int:
    """Prints memory, FLOPs, time and files of a run; reads and writes no file."""
    from anoseg_jax import dry_run

    print(dry_run.report(FLAGS.config, FLAGS.workdir, FLAGS.devices))
    return 0


def report() -> int:
    """Writes report.html again from the result files."""
    from anoseg_jax.report import pages

    pages.write_run(Path(FLAGS.workdir))
    return 0


def compare(runs: Sequence[str]) -> int:
    """Compares finished runs: launch.py --mode=compare --workdir=W RUN RUN ..."""
    from anoseg_jax.report import compare, compare_page

    comparison = compare.compare(runs)
    compare.write(comparison, Path(FLAGS.workdir))
    compare_page.write(comparison, Path(FLAGS.workdir))
    print(compare.as_markdown(comparison))
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Predicts photographs: launch.py --mode=predict --workdir=W --out=DIR FILE_OR_FOLDER ..."""
    from anoseg_jax.deploy import photographs, predictions

    listed = photographs.Photographs(arguments, exclude=FLAGS.out)  # wrong paths are named at once
    is_complete = predictions.predict(
        _load_predictor(), listed, Path(FLAGS.out), maps=FLAGS.maps, follow=FLAGS.follow
    )
    return int(not is_complete)


def export(arguments: Sequence[str] = ()) -> int:
    """Exports the model to ONNX, StableHLO or SavedModel, and checks what the export computes."""
    from anoseg_jax.deploy import export, photographs

    listed = photographs.Photographs(arguments).list()
    export.export(_load_predictor(), FLAGS.format, Path(FLAGS.out), listed)
    return 0


def serve() -> int:
    """Serves the model over HTTP: POST /predict, and a page where one drops a photograph."""
    try:
        from anoseg_jax.deploy import serve
    except ImportError as error:
        if error.name != "fastapi":
            raise
        raise UsageError(
            '--mode=serve needs the extra [serve]: pip install -e ".[serve]"'
        ) from None
    limits = serve.Limits(megabytes=FLAGS.max_megabytes, megapixels=FLAGS.max_megapixels)
    serve.serve(_load_predictor(), FLAGS.host, FLAGS.port, limits)
    return 0


def _load_predictor() -> Any:
    """Returns the model in --workdir with the thresholds of the flags."""
    from anoseg_jax.deploy import predictor

    return predictor.Predictor(
        FLAGS.workdir,
        category=FLAGS.category,
        image_threshold=FLAGS.image_threshold,
        pixel_threshold=FLAGS.pixel_threshold,
    )


class Mode(NamedTuple):
    """A mode: its function, the flags that it needs, and other flags that it takes."""

    function: Callable[..., int]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


MODES = {
    "train": Mode(train, ("config", "workdir"), PROCESSES),
    "evaluate": Mode(evaluate, ("config", "workdir"), PROCESSES),
    "export_replay": Mode(export_replay, ("config", "workdir")),
    "check": Mode(check, ("config",), ("workdir",)),
    "dry_run": Mode(dry_run, ("config",), ("workdir", "devices")),
    "merge": Mode(merge, ("workdir",)),
    "report": Mode(report, ("workdir",)),
    "compare": Mode(compare, ("workdir", "runs")),
    "predict": Mode(predict, ("workdir", "out", "photographs"), (*MODEL, "maps", "follow")),
    "export": Mode(export, ("workdir", "out", "format"), (*MODEL, "photographs")),
    "serve": Mode(serve, ("workdir",), (*MODEL, "host", "port", "max_megabytes", "max_megapixels")),
}
POSITIONAL = ("runs", "photographs")
HINTS = {
    "config": "needs --config=FILE; options are set as --config.KEY=VALUE",
    "workdir": "needs --workdir=DIR",
    "out": "needs --out=DIR, the folder to write to",
    "photographs": "needs photographs: --mode=predict --workdir=W --out=DIR FILE_OR_FOLDER ...",
    "format": "needs --format=onnx, stablehlo or saved_model",
    "runs": "needs the folders of finished runs: --mode=compare --workdir=W RUN RUN ...",
}


def define_flags() -> None:
    """Defines the flags; `--help` prints them."""
    config_flags.DEFINE_config_file(
        "config", None, "Options: configs/NAME.py or NAME.py:CATEGORIES."
    )
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs, results and pictures.")
    modes = "\n".join(f"{name}: {mode.function.__doc__}" for name, mode in MODES.items())
    flags.DEFINE_enum("mode", "train", MODES, modes)
    flags.DEFINE_integer("devices", None, "For dry_run: so many virtual CPU devices.", 1)
    flags.DEFINE_bool(
        "distributed", False, "One of several processes that JAX detects (Slurm, TPU)."
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if JAX does not detect it.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "From 0, with --coordinator.")
    flags.DEFINE_string("out", None, "Folder for predictions or an export.")
    flags.DEFINE_string("category", None, "Which model of a --workdir that holds several.")
    flags.DEFINE_float("image_threshold", None, "Instead of the model's: of scores, from 0 up.")
    flags.DEFINE_float("pixel_threshold", None, "Instead of the model's: of maps, from 0 to 1.")
    flags.DEFINE_enum(
        "maps", "all", ("all", "defective", "none"), "Photographs that get a map and an overlay."
    )
    flags.DEFINE_enum("format", None, ("onnx", "stablehlo", "saved_model"), "What export writes.")
    flags.DEFINE_bool("follow", False, "Go on with photographs as they arrive, until Ctrl-C.")
    flags.DEFINE_string("host", "127.0.0.1", "Address that serve listens at.")
    flags.DEFINE_integer("port", 8000, "Port that serve listens at.", 0, 65535)
    flags.DEFINE_float("max_megabytes", 50, "Largest file that serve takes.", 0)
    flags.DEFINE_float("max_megapixels", 50, "Largest image that serve takes.", 0)
    for flag in FLAGS.get_flags_for_module(__name__):  # absl's --help shows those of the script
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def parse(argv: Sequence[str]) -> tuple[Mode, list[str]]:
    """Parses the flags; returns the mode, and the arguments that are no flags.

    Raises UsageError for a flag or option that does not exist, has a value that it cannot have,
    does not belong to the mode, or is missing.
    """
    try:
        arguments = FLAGS(argv)[1:]
        if FLAGS.config is not None:
            FLAGS.config.keys()  # raises what went wrong when the file was loaded
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        raise UsageError(
            f"the config has no option {name!r}; configs/default.py has them all"
        ) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()  # of a traceback, the last one says what is wrong
        text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        raise UsageError(text) from error
    mode = MODES[FLAGS.mode]
    known = {name for each in MODES.values() for name in each.needs + each.takes}
    given = [name for name in sorted(known - {*POSITIONAL}) if FLAGS[name].present]
    # What stands without a flag; for a mode that takes nothing of the kind, the first kind.
    positional = next((name for name in POSITIONAL if name in mode.needs + mode.takes), "runs")
    given += [positional] * bool(arguments)
    for name in given:
        if name not in mode.needs + mode.takes:
            what = f"{arguments[0]!r}" if name == positional else f"--{name}"
            names = POSITIONAL if name == positional else (name,)
            modes = [key for key in MODES if {*names} & {*MODES[key].needs, *MODES[key].takes}]
            raise UsageError(
                f"{what} does not belong to --mode={FLAGS.mode}, but to --mode={' or '.join(modes)}"
            )
    for name in mode.needs:
        if name not in given:
            raise UsageError(HINTS[name])
    if FLAGS.config is not None:
        from anoseg_jax import options

        FLAGS.config = options.normalize(FLAGS.config)
    for name in ("workdir", "out"):
        if FLAGS[name].value is not None:
            FLAGS[name].value = os.path.expanduser(FLAGS[name].value)
    return mode, [os.path.expanduser(argument) for argument in arguments]


def complain(error: object, code: int = 2) -> int:
    """Prints an error of use, each line of it complete in itself, and returns the exit code."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def main(argv: Sequence[str]) -> int:
    """Parses the flags, runs a mode, returns the exit code; errors of use are no tracebacks."""
    # TensorFlow only reads data here: without its greetings, and its oneDNN is not needed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    app.define_help_flags()
    define_flags()
    try:
        mode, arguments = parse(argv)
    except UsageError as error:
        return complain(error)
    from anoseg_jax.running import distributed

    try:
        if mode.takes == PROCESSES:
            at = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
            if FLAGS.distributed or at != (None, None, None):
                distributed.start(*at)
                if not distributed.is_main_process():
                    sys.stdout = Path(os.devnull).open("w")  # only the main process prints
            distributed.stop_on_signals()
        code = mode.function(*[arguments] * bool(arguments))
    except distributed.Stopped as stopped:
        resume = "Checkpoints are kept. Run the same command again to resume."
        print(f"{stopped}. {resume}", file=sys.stderr)
        code = distributed.STOPPED
    except UsageError as error:
        code = complain(error)
    except OSError as error:
        kept = f". Checkpoints in {FLAGS.workdir} are kept: run again to resume"
        code = complain(f"{error}{kept if FLAGS.mode == 'train' else ''}")
    except Exception as error:
        if not distributed.is_distributed():
            raise
        code = complain(distributed.peer_failed(error), distributed.PEER_FAILED)
    distributed.leave(code)

"""The command line: its flags, one function for each mode, exit codes.

Each mode imports what it needs, after it has refused what cannot work: an error of use comes before
JAX and TensorFlow are imported, but for those that only these can know. Only modes that read a data
set (train, evaluate, export_replay) always import TensorFlow.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags
from etils.epath import Path
from ml_collections import config_flags

from anoseg_jax import UsageError, config_files, options
from anoseg_jax.running import allocator

FLAGS = flags.FLAGS
PROCESSES = ("distributed", "coordinator", "num_processes", "process_id")
MODEL = ("category", "image_threshold", "pixel_threshold")
# What the small installation, requirements-predict.txt, leaves out.
LEFT_OUT = ("tensorflow", "tensorflow_datasets", "tensorboard", "clu", "sklearn", "matplotlib")


def train() -> int:
    """Trains, or resumes, and evaluates."""
    return _run(training=True)


def evaluate() -> int:
    """Evaluates the newest checkpoints, or the maps of another method."""
    return _run(training=False)


def _run(*, training: bool) -> int:
    open_splits, names = _check_data(training=training)
    _start()
    if training:
        options.check_run_devices(FLAGS.config, names)
    from anoseg_jax import experiment

    failures = experiment.run(
        FLAGS.config,
        Path(FLAGS.workdir),
        open_splits(),
        training=training,
        command=_command(),
    )
    return int(bool(failures))


def _command() -> str:
    """Returns the command line of this process."""
    program, *arguments = sys.argv
    is_script = Path(program).name == "anoseg"
    return shlex.join(["anoseg", *arguments] if is_script else [_python(), *sys.argv])


def _python() -> str:
    """Returns this Python as one calls it from here: by its path if that is below this folder."""
    here = os.path.join(os.getcwd(), "")
    return sys.executable.removeprefix(here) if sys.executable.startswith(here) else "python"


def _check_data(*, training: bool) -> tuple[Callable[[], dict], Sequence[str]]:
    """Checks options, images and --workdir.

    Returns what opens the splits of each category, and the names of the categories. Imports neither
    JAX nor TensorFlow.
    """
    from anoseg_jax.images import layout
    from anoseg_jax.running import files
    from data import sources

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a traceback
    config, read = FLAGS.config, layout.ReadOptions.of(FLAGS.config)
    options.check(config, training=training)
    names, open_splits = sources.check(
        config.dataset,
        config.categories,
        data_dir=config.data_dir,
        tfds_dir=config.tfds_dir,
        read=read,
        image_size=tuple(config.image_size),
        training=training,
    )
    options.check_run(config, names, training=training)
    if training:
        options.check_resume(config, names, Path(FLAGS.workdir))
    files.require_writable(Path(FLAGS.workdir), "--workdir")
    return open_splits, names


def _start() -> None:
    """Imports JAX, connects the processes of a run, and makes sure that there are devices."""
    from anoseg_jax.running import distributed

    at = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.distributed or at != (None, None, None):
        distributed.start(*at)
        if not distributed.is_main_process():
            sys.stdout = Path(os.devnull).open("w")  # only the main process prints
    distributed.require_devices()
    distributed.stop_on_signals()


def export_replay() -> int:
    """Writes weights, batches and losses of each step, to compare another implementation with."""
    open_splits, _ = _check_data(training=True)
    _start()
    from anoseg_jax import experiment

    experiment.export_replay(FLAGS.config, Path(FLAGS.workdir), open_splits())
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
    from anoseg_jax import shards

    missing = shards.merge(Path(FLAGS.workdir))
    print(f"merged the results that exist: {FLAGS.workdir}")
    return complain("\n".join(missing), int(bool(missing)))


def dry_run() -> int:
    """Prints memory, FLOPs, time and files of a run; reads and writes no file."""
    options.check(FLAGS.config)
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
    from anoseg_jax.deploy import photographs

    if FLAGS.follow and any("://" in argument for argument in arguments):
        raise UsageError("--follow needs photographs in local folders")
    listed = photographs.Photographs(arguments, exclude=FLAGS.out)
    _check_model(writes_to=FLAGS.out)
    from anoseg_jax.deploy import predictions

    is_complete = predictions.predict(
        _load_predictor(), listed, Path(FLAGS.out), maps=FLAGS.maps, follow=FLAGS.follow
    )
    return int(not is_complete)


def export(arguments: Sequence[str] = ()) -> int:
    """Exports the model to ONNX, StableHLO or SavedModel, and checks what the export computes."""
    from anoseg_jax.deploy import photographs

    listed = photographs.Photographs(arguments).list()
    _check_model(writes_to=FLAGS.out)
    from anoseg_jax.deploy import export

    export.export(_load_predictor(), FLAGS.format, Path(FLAGS.out), listed)
    return 0


def serve() -> int:
    """Serves the model over HTTP: POST /predict, and a page where one drops a photograph."""
    _check_model()
    try:
        from anoseg_jax.deploy import serve
    except ImportError as error:
        if error.name != "fastapi":
            raise
        raise UsageError(
            f"--mode=serve needs fastapi and uvicorn: {_python()} -m pip install fastapi uvicorn"
        ) from None
    limits = serve.Limits(megabytes=FLAGS.max_megabytes, megapixels=FLAGS.max_megapixels)
    serve.serve(_load_predictor(), FLAGS.host, FLAGS.port, limits)
    return 0


def _check_model(writes_to: str | None = None) -> None:
    """Raises UsageError if there is no model in --workdir, or --out is no folder to write to."""
    from anoseg_jax.deploy import model_folder
    from anoseg_jax.running import files

    model_folder.find_model(FLAGS.workdir, FLAGS.category)
    if writes_to is not None:
        if "://" in writes_to:
            raise UsageError(f"--out={writes_to}: must be a local folder: copy it from there")
        files.require_writable(Path(writes_to), "--out")
    from anoseg_jax.running import distributed

    distributed.require_devices()


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
    "config": "needs --config=FILE, or a name such as cpu; options are set as --config.KEY=VALUE",
    "workdir": "needs --workdir=DIR",
    "out": "needs --out=DIR, the folder to write to",
    "photographs": "needs photographs: --mode=predict --workdir=W --out=DIR FILE_OR_FOLDER ...",
    "format": "needs --format=onnx, stablehlo or saved_model",
    "runs": "needs the folders of finished runs: --mode=compare --workdir=W RUN RUN ...",
}


def define_flags(argv: Sequence[str]) -> None:
    """Defines the flags; `--help` prints them. `argv` is what `parse` gets."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Options: a file, or a name such as cpu, then maybe :CATEGORIES.",
        sys_argv=argv,
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
    flags.DEFINE_float("pixel_threshold", None, "Instead of the model's: of maps.", 0, 1)
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


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the file that --config names (config_files.find)."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    for index, argument in enumerate(argv[:end]):
        match = re.fullmatch(r"(--?config)(?:=(.*))?", argument)
        if match and match.group(2) is not None:
            argv[index] = f"{match.group(1)}={config_files.find(match.group(2))}"
        elif match and index + 1 < end:
            argv[index + 1] = config_files.find(argv[index + 1])
    return argv


def _flag_error(error: Exception) -> str:
    """Returns what absl or a config says, in one line."""
    lines = str(error).strip().splitlines()  # of a traceback, the last one says what is wrong
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    text = re.sub(r"^\w+Error: ", "", text)
    for pattern, instead in (
        (r"^flag (--[^=]+=.*?): invalid literal for int.*", r"\1: must be a whole number"),
        (r"^flag (--[^=]+=.*?): could not convert string to.*", r"\1: must be a number"),
        (r"^flag (--[^=]+=.*?): \W*Non-boolean argument.*", r"\1: must be True or False"),
        (r"^flag --", "--"),
        (r"^Unknown command line flag '(.+?)'\.?", r"--\1: there is no such flag."),
        (r"no such flag\. Did you mean: (\w+).*", r"no such flag; did you mean --\1?"),
    ):
        text = re.sub(pattern, instead, text)
    return text


def parse(argv: Sequence[str]) -> tuple[Mode, list[str]]:
    """Parses the flags; returns the mode, and the arguments that are no flags.

    Raises UsageError for a flag or option that does not exist, has a value that it cannot have,
    does not belong to the mode, or is missing.
    """
    argv[:] = _with_config_file(argv)
    try:
        arguments = FLAGS(argv)[1:]
        if FLAGS.config is not None:
            FLAGS.config.keys()  # raises what went wrong when the file was loaded
    except (AttributeError, KeyError) as error:
        names = [argument.partition("=")[0] for argument in argv]
        paths = [name for name in names if name.lstrip("-").startswith("config.")]
        raise UsageError(options.unknown_option(error, paths)) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UsageError(_flag_error(error)) from error
    except (ImportError, NameError, SyntaxError) as error:
        where = next(argument for argument in argv if argument.startswith(("--config", "-config")))
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error
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
        overrides = config_flags.get_override_values(FLAGS["config"])
        FLAGS.config = options.keep_overrides(options.normalize(FLAGS.config), overrides)
    for name in ("workdir", "out"):
        if FLAGS[name].value is not None:
            FLAGS[name].value = os.path.expanduser(FLAGS[name].value)
    return mode, [os.path.expanduser(argument) for argument in arguments]


def complain(error: object, code: int = 2) -> int:
    """Prints an error of use, each line of it complete in itself, and returns the exit code."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def unexpected(error: Exception) -> int:
    """Returns the exit code after a stop, or an error of storage or of other processes.

    Raises any other error: a bug.
    """
    # epath's, before anything is run: jax is not imported for it.
    if isinstance(error, KeyError) and str(error).endswith("://'"):
        return complain(
            f"paths that begin with {error.args[0]} cannot be read or written: give a local path, "
            "gs:// or s3://"
        )
    from anoseg_jax.running import distributed

    if isinstance(error, distributed.Stopped):
        resume = "Checkpoints are kept. Run the same command again to resume."
        print(f"{error}. {resume}", file=sys.stderr)
        return distributed.STOPPED
    if distributed.is_distributed():
        return complain(distributed.peer_failed(error), distributed.PEER_FAILED)
    if type(error).__module__.startswith("tensorflow") and "://" in str(error):
        return complain(" ".join(str(error).split()))  # a bucket that cannot be reached
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags, runs a mode, returns the exit code; errors of use are no tracebacks."""
    allocator.keep_freed_memory()  # before other libraries start threads
    # TensorFlow only reads data here: without its greetings, and its oneDNN is not needed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    argv = list(sys.argv if argv is None else argv)
    config_files.make_importable()
    app.define_help_flags()
    define_flags(argv)
    try:
        mode, arguments = parse(argv)
        code = mode.function(*[arguments] * bool(arguments))
    except UsageError as error:
        code = complain(error)
    except OSError as error:
        kept = f". Checkpoints in {FLAGS.workdir} are kept: run again to resume"
        code = complain(f"{error}{kept if FLAGS.mode == 'train' else ''}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in LEFT_OUT:
            raise
        code = complain(
            f"--mode={FLAGS.mode} needs {error.name}, which the installation for predicting alone "
            "leaves out: pip install . in a checkout of anoseg_jax"
        )
    except Exception as error:
        code = unexpected(error)
    if "anoseg_jax.running.distributed" in sys.modules:
        from anoseg_jax.running import distributed

        distributed.leave(code)
    return code

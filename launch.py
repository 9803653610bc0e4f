"""Trains and evaluates AnoSeg: `python launch.py --config=configs/mvtec.py --workdir=W`."""

import os
import shlex
import sys

from absl import app, flags
from etils.epath import Path
from ml_collections import config_flags

# TensorFlow only reads data here: without its greetings, and its oneDNN is not needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
FLAGS = flags.FLAGS
MODES = {
    "train": "trains, or goes on training, and evaluates",
    "evaluate": "evaluates the newest checkpoints",
    "export_replay": "writes weights, batches, losses of each step for another implementation",
    "check": "reports on images and masks, without training (needs no --workdir)",
    "merge": "puts the results of jobs with config.shard=i/n together (needs no --config)",
    "dry_run": "prints memory, FLOPs, time and files of a run; reads and writes no file",
    "report": "writes report.html again from the result files (needs no --config)",
    "compare": "compares finished runs: launch.py --mode=compare --workdir=W RUN RUN ...",
}
config_flags.DEFINE_config_file("config", None, "Options: configs/NAME.py or NAME.py:CATEGORIES.")
flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs, results and pictures.")
flags.DEFINE_integer("devices", None, "For dry_run: so many virtual CPU devices.", lower_bound=1)
flags.DEFINE_enum("mode", "train", MODES, "; ".join(f"{k}: {v}" for k, v in MODES.items()))
flags.DEFINE_bool("distributed", False, "One of several processes that jax finds: Slurm, TPU ...")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where jax does not find it.")
flags.DEFINE_integer("num_processes", None, "Processes of the job, with --coordinator.")
flags.DEFINE_integer("process_id", None, "From 0, with --coordinator.")


def run(mode, config, workdir, runs):
    """Runs one mode; returns the exit code."""
    if mode == "report":
        from anoseg_jax.report import pages

        pages.write_run(workdir)
        return 0
    if mode == "compare":
        from anoseg_jax.report import compare, compare_page

        comparison = compare.compare(runs)
        compare.write(comparison, workdir)
        compare_page.write(comparison, workdir)
        print(compare.as_markdown(comparison))
        return 0
    if mode == "merge":
        from anoseg_jax import shards

        missing = shards.merge(workdir)
        print(f"merged what is there: {workdir}")
        return complain("\n".join(missing), int(bool(missing)))
    if mode == "dry_run":
        from anoseg_jax import dry_run

        print(dry_run.report(config, FLAGS.workdir, FLAGS.devices))
        return 0
    from anoseg_jax.images import layout

    if mode == "check":
        categories = layout.scan_categories(config.data_dir, config.categories)
        print("\n\n".join(map(layout.report, categories)))
        return int(any(category.errors for category in categories))
    from anoseg_jax import experiment, options
    from data import sources

    options.check(config, training=mode in ("train", "export_replay"))
    splits = sources.open_splits(
        config.dataset, config.categories, data_dir=config.data_dir, tfds_dir=config.tfds_dir
    )
    if mode == "export_replay":
        experiment.export_replay(config, workdir, splits)
        return 0
    command = shlex.join(["python", *sys.argv])
    training = mode == "train"
    failures = experiment.run(config, workdir, splits, training=training, command=command)
    return int(bool(failures))


def complain(error, code=2):
    """Prints an error of use, each line of it complete in itself, and returns the exit code."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def main(argv):
    """Parses the flags, runs, and returns the exit code; errors of use are no tracebacks."""
    try:
        runs = FLAGS(argv)[1:]
        if FLAGS.mode not in ("merge", "report", "compare"):
            if runs or FLAGS.config is None:
                raise flags.Error("needs --config=FILE; options are set as --config.KEY=VALUE")
            FLAGS.config.keys()  # raises what went wrong when the file was loaded
        if FLAGS.workdir is None and FLAGS.mode not in ("check", "dry_run"):
            raise flags.Error("needs --workdir=DIR")
        if FLAGS.devices and FLAGS.mode != "dry_run":
            raise flags.Error("--devices is for --mode=dry_run: a run takes the devices there are")
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        return complain(f"the config has no option {name!r}; configs/default.py has them all")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()  # of a traceback, the last one says what is wrong
        return complain(lines[-1] if "Traceback" in str(error) else " ".join(lines))
    from anoseg_jax import UsageError
    from anoseg_jax.running import distributed

    try:
        if FLAGS.mode in ("train", "evaluate"):
            at = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
            if FLAGS.distributed or at != (None, None, None):
                distributed.start(*at)
                if not distributed.is_main_process():
                    sys.stdout = Path(os.devnull).open("w")  # one of them speaks
            distributed.stop_on_signals()
        code = run(FLAGS.mode, FLAGS.config, Path(FLAGS.workdir or "."), runs)
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


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(main(sys.argv))

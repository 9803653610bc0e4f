"""Trains and evaluates AnoSeg: `python launch.py --config=configs/mvtec.py --workdir=W`."""

import os
import sys
from functools import partial
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

# TensorFlow only reads data here: without its greetings, and its oneDNN is not needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Options: configs/NAME.py or NAME.py:CATEGORIES.")
flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs, results and pictures.")
flags.DEFINE_enum("mode", "train", ("train", "evaluate", "check"),
    "train (or go on training) and evaluate; evaluate the newest checkpoints; or check the images "
    "and masks, without training.")  # fmt: skip


def run_category(config, category_dir, train_set, test_set):
    """Trains (unless --mode=evaluate) and evaluates one category; returns its results."""
    from anoseg_jax import evaluate, input_pipeline, pictures, predict, train

    category_dir.mkdir(parents=True, exist_ok=True)
    if FLAGS.mode == "train":
        images = input_pipeline.load_arrays(train_set, config.image_size)["image"]
        order = {"batch_size": config.batch_size, "seed": config.seed}
        batches = partial(input_pipeline.train_batches, images, **order)
        train.fit(config, batches, category_dir, writer=train.create_writer(category_dir))
    predictor = predict.Predictor(category_dir, top_fraction=config.evaluate.top_fraction)
    arrays = input_pipeline.load_arrays(test_set, predictor.image_size)
    batches = input_pipeline.test_batches(arrays, config.evaluate.batch_size)
    evaluation = evaluate.evaluate(predictor, batches)
    evaluate.write_evaluation(category_dir, evaluation, arrays)
    pictures.write_pictures(category_dir / "pictures", evaluation, arrays, config.evaluate.pictures)
    return evaluation.results


def run(config, mode, workdir):
    """Runs one mode over all categories of the config; returns the exit code."""
    from data import layout

    if mode == "check":
        categories = layout.scan_categories(config.data_dir, config.categories)
        print("\n\n".join(map(layout.report, categories)))
        return int(any(category.errors for category in categories))
    from anoseg_jax import evaluate, options, train

    options.check(config)
    from data import sources

    splits = sources.open_splits(
        config.dataset, config.categories, data_dir=config.data_dir, tfds_dir=config.tfds_dir
    )
    of_category = {name: options.of_category(config, name) for name in splits}
    options.use_compilation_cache(config.compilation_cache)
    exit_code = 0
    for name, (train_set, test_set) in splits.items():
        print(f"== {name}", flush=True)
        try:
            results = run_category(of_category[name], workdir / name, train_set, test_set)
            evaluate.write_results(workdir, name, results, config.to_json())
            print(evaluate.summary(name, results), flush=True)
        except (train.TrainingError, FileNotFoundError) as error:
            exit_code = complain(f"{name}: {error}", code=1)
    print(f"results: {workdir}/results.md, results.json; pictures: {workdir}/*/pictures/")
    return exit_code


def complain(error, code=2):
    """Prints an error of use, each line of it complete in itself, and returns the exit code."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def main(argv):
    """Parses the flags, runs, and returns the exit code; errors of use are no tracebacks."""
    try:
        rest = FLAGS(argv)[1:]
        if rest or FLAGS.config is None or (FLAGS.workdir is None and FLAGS.mode != "check"):
            raise flags.Error("needs --config=FILE --workdir=DIR; options are --config.KEY=VALUE")
        FLAGS.config.keys()  # raises what went wrong when the file was loaded
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        return complain(f"the config has no option {name!r}; configs/default.py has them all")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()  # of a traceback, the last one says what is wrong
        return complain(lines[-1] if "Traceback" in str(error) else " ".join(lines))
    from anoseg_jax.options import OptionError
    from data.layout import LayoutError

    try:
        return run(FLAGS.config, FLAGS.mode, Path(FLAGS.workdir or "."))
    except (OptionError, LayoutError) as error:
        return complain(error)


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(main(sys.argv))

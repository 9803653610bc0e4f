"""An experiment: trains, evaluates and writes every category, for each variant and each seed.

A run is a list of units (variant, seed, category), each in a folder of its own; see `shards`.
"""

import contextlib
import dataclasses
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError, first_line, options, shards
from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.evaluation import evaluate, external_maps, results
from anoseg_jax.images import batches, input_pipeline
from anoseg_jax.interop import replay
from anoseg_jax.method import detector, train
from anoseg_jax.report import ablation, only_good, pages, pictures
from anoseg_jax.running import distributed, files, loop, progress, train_log
from anoseg_jax.running.checkpoint import Saved

Splits = Any  # data.sources.Splits


def load_good(split: Any, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns a split of good images, sorted by name: TFDS has an order of its own."""
    arrays = input_pipeline.load_arrays(split, image_size)
    order = np.argsort(arrays["name"], kind="stable")
    return {name: values[order] for name, values in arrays.items()}


def fit(
    config: ConfigDict, folder: Path, images: np.ndarray, validation: np.ndarray | None
) -> tuple[Saved, Saved | None]:
    """Trains the generator, and the image-level detector where it is enabled, or resumes.

    Returns the newest checkpoint of each; None without a detector.
    """
    main = distributed.is_main_process()
    how = {"validation": validation, "make_batches": input_pipeline.train_batches}
    writer = train_log.create_writer(folder) if main else None
    generator = train.fit(config, images, folder, writer=writer, **how)
    distributed.stop_if_asked("after training")
    if not config.detector.enabled:
        return generator, None
    writer = train_log.create_writer(folder / "detector") if main else None
    saved = detector.fit(config, images, folder, generator=generator, writer=writer, **how)
    distributed.stop_if_asked("after training the detector")
    return generator, saved


def stoppable(test: Iterable[evaluate.Batch], where: str) -> Iterator[evaluate.Batch]:
    """Yields the batches; raises distributed.Stopped before one if a signal asks for it."""
    for batch in test:
        distributed.stop_if_asked(where)
        yield batch


def hold_out(images: np.ndarray, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of images to train on and of held-out ones, with these options."""
    ids = batches.assign_image_ids(images)
    return batches.hold_out(ids, fraction=options["held_out"], seed=options["seed"])


def load_held_out(splits: Splits, model: TrainedModel) -> dict[str, np.ndarray]:
    """Returns the good images that a model's thresholds are made from (input_pipeline.load_arrays).

    None of them if the images of `splits` are not those that the model was trained on.
    """
    arrays, validation = load_good(splits.train, model.image_size), None
    images, chosen = arrays["image"], slice(None)
    if splits.validation is not None:
        arrays = load_good(splits.validation, model.image_size)
        validation = arrays["image"]
    elif len(images):
        _, chosen = hold_out(images, model.config)
    if train.images_sha256(images, validation) != model.record["images_sha256"]:
        chosen = slice(0)
    return {name: values[chosen] for name, values in arrays.items()}


def show_held_out(
    evaluation: evaluate.Evaluation,
    model: TrainedModel,
    arrays: dict[str, np.ndarray],
    *,
    batch_size: int,
    **how: Any,
) -> evaluate.Evaluation:
    """Returns the evaluation of no test image with the maps of held-out good images to show.

    Their own figures are left out: they would be those of the images that made the thresholds.
    """
    good = evaluate.evaluate(model, input_pipeline.test_batches(arrays, batch_size), **how)
    results_without = evaluation.results | {"held_out_images": len(good.images)}
    return dataclasses.replace(good, results=results_without, curves={})


def run_category(
    config: ConfigDict, folder: Path, splits: Splits, *, training: bool
) -> tuple[evaluate.Evaluation, dict[str, np.ndarray]]:
    """Trains (if `training`) and evaluates one category in `folder`.

    Returns the evaluation, with baselines on the main process only, and the arrays of its images
    (input_pipeline.load_arrays). These are the test images; without any, the good images that are
    held out, `held_out_images` of the results.

    With `config.maps_dir`, evaluates the maps of another method instead of a model's. Raises
    external_maps.MapsError if these are missing or cannot be used, or `folder` is a model's.
    """
    images = None
    if config.maps_dir and (folder / "checkpoints").exists():
        raise external_maps.MapsError(
            f"{folder} is a model's: give the results of maps_dir another --workdir"
        )
    model, model_detector = folder, config.detector.enabled
    if training:
        images, validation = load_good(splits.train, config.image_size)["image"], None
        if splits.validation is not None:
            validation = load_good(splits.validation, config.image_size)["image"]
        model, model_detector = fit(config, folder, images, validation)
    with progress.waiting(f"evaluating {folder.name}", "usually under half a minute"):
        return evaluate_category(config, folder, splits, images, model, model_detector)


def evaluate_category(
    config: ConfigDict,
    folder: Path,
    splits: Splits,
    images: np.ndarray | None,
    model: Any,
    model_detector: Any,
) -> tuple[evaluate.Evaluation, dict[str, np.ndarray]]:
    """Evaluates what `run_category` has trained, or what is in `folder`; returns what it returns.

    `images` are the good training images, uint8 [n, h, w, 3]; None reads them if they are needed.
    `model` and `model_detector` are for `TrainedModel`.
    """
    settings = config.evaluate
    # What the maps come from. A model's options are those that it was trained with.
    if config.maps_dir:
        trained_with = {key: config[key] for key in ("image_size", "held_out", "seed")}
    else:
        predictor = TrainedModel(
            model,
            top_fraction=settings.top_fraction,
            batch_size=settings.batch_size,
            detector=model_detector,
        )
        trained_with = predictor.config
        bit_depth = trained_with.get("bit_depth", "auto")  # "auto": trained on arrays
        if bit_depth != "auto":
            splits = splits.at_bit_depth(int(bit_depth))
    image_size = tuple(trained_with["image_size"])

    # Maps to metrics.
    where = f"in the evaluation of {folder.name}"
    arrays = input_pipeline.load_arrays(splits.test, image_size)
    test = list(input_pipeline.test_batches(arrays, settings.batch_size))
    native = {}
    if settings.native_size:
        native["native_masks"] = input_pipeline.load_masks(splits.test)
        native["native_ignored"] = input_pipeline.load_masks(splits.test, "ignore")
    how = native | {
        "pixel_threshold": settings.pixel_threshold,
        "image_threshold": settings.image_threshold,
    }
    if config.maps_dir:
        maps_dir, names = Path(config.maps_dir) / config.categories[0], arrays["name"].tolist()
        evaluation = evaluate.evaluate_maps(
            external_maps.read_maps(maps_dir, names),
            test,
            scores=external_maps.read_scores(maps_dir, names),
            maps_dir=config.maps_dir,
            image_size=image_size,
            top_fraction=settings.top_fraction,
            **how,
        )
    else:
        how |= {"detector": predictor.detector, "image_score": settings.image_score}
        evaluation = evaluate.evaluate(predictor, stoppable(test, where), **how)
        if not test:
            arrays = load_held_out(splits, predictor)
            how |= dict.fromkeys(native) | {"batch_size": settings.batch_size}
            evaluation = show_held_out(evaluation, predictor, arrays, **how)
    distributed.stop_if_asked(where)
    has_baselines = settings.baselines and test and int(splits.train.cardinality())
    if has_baselines and distributed.is_main_process():
        if images is None or tuple(config.image_size) != image_size:
            images = load_good(splits.train, image_size)["image"]
        if splits.validation is None:  # else the model was trained on all of them
            images = images[hold_out(images, trained_with)[0]]
        evaluation.results["baselines"] = evaluate.evaluate_baselines(
            images, test, top_fraction=settings.top_fraction, **native
        )
    return evaluation, arrays


def export_replay(config: ConfigDict, workdir: Path, splits: Mapping[str, Splits]) -> None:
    """Trains `config.num_steps` steps a category and writes them (replay.export) to its replay/."""
    options.use_compilation_cache(config.compilation_cache)
    for name, of_category in splits.items():
        category_config = options.of_category(config, name)
        images = load_good(of_category.train, category_config.image_size)["image"]
        folder = workdir / name / "replay"
        replay.export(category_config, images, folder)
        print(f"{name}: {category_config.num_steps} steps in {folder}")


def with_seed(config: ConfigDict, seed: int | None) -> ConfigDict:
    """Returns the options of one of `config.seeds`; None is for a run without these."""
    one = config.copy_and_resolve_references()
    one.shard = ""  # of the command, not of the results: it is in no file and no hash
    if seed is not None:
        one.seed, one.seeds = seed, ()
    return one


@contextlib.contextmanager
def collect_failure(failures: list[str], label: str, folder: Path) -> Iterator[None]:
    """Turns an exception into a line of `failures`, also on stderr, so that the run goes on.

    The traceback of an error that is not the user's is written to `folder`/error.txt.
    """
    try:
        yield
    except distributed.Stopped:
        raise
    except Exception as error:
        # Of several processes the others may have gone on: only training fails in all alike.
        if jax.process_count() > 1 and not isinstance(error, loop.TrainingError):
            raise
        line = f"{label}: {error}"
        if not isinstance(error, UsageError | OSError):
            line = f"{label}: {type(error).__name__}: {first_line(error)}"
            with contextlib.suppress(OSError):
                files.write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
                line += f" (the traceback is in {folder}/error.txt)"
        failures.append(line)
        print(f"error: {line}", file=sys.stderr)


def run(
    config: ConfigDict, workdir: Path, splits: Mapping[str, Splits], *, training: bool, command: str
) -> list[str]:
    """Runs all units of the config, or those of `config.shard`, while `workdir` is locked.

    Result files and pages are written after every category, the mean over seeds and the table of
    variants as soon as they can be: nothing that is finished is lost. A command that has only a
    share of the units writes the categories' own folders, nothing above them.

    Returns one line for each failure. Raises UsageError if options cannot work or another run is
    using `workdir`, and distributed.Stopped if a signal asks for it.
    """
    # Refuses what cannot work, before the first is trained.
    variants = options.check_run(config, splits, training=training) or {"": config}
    shard, whole = options.shard_of(config.shard), not config.shard
    plan = shards.plan_of(config, list(splits), re.sub(r" --config\.shard[= ]\S+", "", command))
    units, failures = shards.units_of(plan, shard), []
    options.use_compilation_cache(config.compilation_cache)
    writing = distributed.is_main_process()

    with distributed.lock(workdir, shared=not whole):
        if writing and not whole:
            shards.write_plan(workdir, plan, shard)
        for variant, variant_config in variants.items():
            for seed in plan["seeds"] or [None]:
                folder = shards.folder_of(workdir, variant, seed)
                unit_config, written = with_seed(variant_config, seed), False
                names = [unit[2] for unit in units if unit[:2] == (variant, seed)]
                waiting = dict.fromkeys(names, "not done yet")
                for name in names:
                    label = "/".join((*folder.parts[len(workdir.parts) :], name))
                    print(f"== {label}", flush=True)
                    distributed.stop_if_asked(f"before {label}")
                    with collect_failure(failures, label, folder / name):
                        run_unit(
                            unit_config,
                            folder / name,
                            splits[name],
                            training=training,
                            command=plan["command"],
                            store_maps=config.evaluate.store_all_maps
                            or (not variant and seed in (None, *plan["seeds"][:1])),
                        )
                        waiting.pop(name)
                    if name in waiting:
                        waiting[name] = f"failed: {failures[-1].removeprefix(f'{label}: ')}"
                    if writing and whole:  # also of a category whose pictures have failed
                        with collect_failure(failures, label, folder / name):
                            written |= bool(results.assemble(folder, [name]))
                    if written:
                        with collect_failure(failures, "report.html", folder):
                            pages.write_run(folder, categories=[name], waiting=waiting)
                if written:
                    print(
                        f"results: {folder}/results.md; pictures and curves: {folder}/report.html"
                    )
            if writing and whole and plan["seeds"] and shards.write_mean(workdir, plan, variant):
                print(
                    f"mean and spread over seeds: {shards.folder_of(workdir, variant)}/results.md"
                )
            if writing and whole and variant:
                done = plan["variants"][: plan["variants"].index(variant) + 1]
                table = shards.write_table(workdir, plan | {"variants": done}, failures)
                print(
                    f"{ablation.as_markdown(table)}\nthe table: {workdir}/ablation.md", flush=True
                )
    if not whole:
        total, done = len(shards.units_of(plan)), len(units) - len(failures)
        print(
            f"done: {done} of {len(units)} units (variant, seed, category) of this shard; all "
            f"shards together have {total}. When all are done, run --mode=merge"
        )
    return failures


def run_unit(
    config: ConfigDict,
    folder: Path,
    splits: Splits,
    *,
    training: bool,
    command: str,
    store_maps: bool,
) -> None:
    """Runs one category and writes its files while `folder`, named after it, is locked.

    The results first, pictures last: what fails there costs no figure.
    """
    category_config = options.of_category(config, folder.name, training=training)
    with category_config.unlocked():
        category_config.bit_depth = str(splits.bit_depth)  # "auto" until here
    with distributed.lock(folder):
        if distributed.is_main_process():
            (folder / "error.txt").unlink(missing_ok=True)
        evaluation, arrays = run_category(category_config, folder, splits, training=training)
        if distributed.is_main_process():
            results.write_category(
                folder, evaluation.results, config=config.to_json(), command=command
            )
            if config.maps_dir:  # of a model, training has written it
                files.write_text(folder / "config.json", category_config.to_json(indent=2) + "\n")
            with progress.waiting(f"drawing {folder.name}", "usually a few seconds"):
                results.write_evaluation(folder, evaluation, arrays, store_maps=store_maps)
                count = category_config.evaluate.pictures
                pictures.write_pictures(folder / "pictures", evaluation, arrays, count)
        summary = results.summary(folder.name, evaluation.results)
        if only_good.is_only_good(evaluation.results):
            summary = only_good.summary(folder.name, evaluation.results, command)
        print(summary, flush=True)

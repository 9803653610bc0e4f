"""An experiment: every category of a config trained, evaluated, written; over seeds, variants."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import options, shards
from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.evaluation import evaluate, external_maps
from anoseg_jax.evaluation.results import summary, write_category, write_evaluation, write_results
from anoseg_jax.images import batches, input_pipeline
from anoseg_jax.interop import replay
from anoseg_jax.method import detector, train
from anoseg_jax.report import ablation, pages, pictures
from anoseg_jax.running import checkpoint, distributed, files, loop, train_log

Splits = tuple[Any, Any]  # (train, test): tf.data sets, see input_pipeline.load_arrays


def load_train_images(train_split: Any, image_size: tuple[int, int]) -> np.ndarray:
    """Returns all good images, uint8 [n, h, w, 3], sorted by name: TFDS has an order of its own."""
    arrays = input_pipeline.load_arrays(train_split, image_size)
    return arrays["image"][np.argsort(arrays["name"], kind="stable")]


def trained_on(config: Mapping[str, Any], train_split: Any) -> np.ndarray:
    """Returns the good images that a model with these options is trained on, uint8 [n, h, w, 3]."""
    images = load_train_images(train_split, config["image_size"])
    image_ids = batches.assign_image_ids(images)
    kept, _ = batches.hold_out(image_ids, fraction=config["held_out"], seed=config["seed"])
    return images[kept]


def run_maps(config: ConfigDict, folder: Path, splits: Splits) -> dict:
    """Evaluates the maps of another method (`config.maps_dir`) in `folder`; returns the results.

    Raises external_maps.MapsError if maps are missing or cannot be used, or `folder` is a model's.
    """
    if (folder / "checkpoints").exists():
        raise external_maps.MapsError(
            f"{folder} is a model's: give the results of maps_dir a --workdir of their own"
        )
    arrays = input_pipeline.load_arrays(splits[1], config.image_size)
    names = arrays["name"].tolist()
    maps_dir = Path(config.maps_dir) / config.categories[0]
    maps, scores = (
        external_maps.read_maps(maps_dir, names),
        external_maps.read_scores(maps_dir, names),
    )
    test = list(input_pipeline.test_batches(arrays, config.evaluate.batch_size))
    masks = input_pipeline.load_masks(splits[1]) if config.evaluate.native_size else None
    evaluation = evaluate.evaluate_maps(
        maps,
        test,
        scores=scores,
        maps_dir=config.maps_dir,
        image_size=tuple(config.image_size),
        top_fraction=config.evaluate.top_fraction,
        native_masks=masks,
        pixel_threshold=config.evaluate.pixel_threshold,
        image_threshold=config.evaluate.image_threshold,
    )
    if config.evaluate.baselines:
        evaluation.results["baselines"] = evaluate.evaluate_baselines(
            trained_on(config, splits[0]),
            test,
            top_fraction=config.evaluate.top_fraction,
            native_masks=masks,
        )
    if distributed.is_main_process():
        files.write_text(folder / "config.json", config.to_json(indent=2) + "\n")
        write_evaluation(folder, evaluation, arrays)
        pictures.write_pictures(folder / "pictures", evaluation, arrays, config.evaluate.pictures)
    return evaluation.results


def run_category(config: ConfigDict, folder: Path, splits: Splits, *, training: bool) -> dict:
    """Trains (if `training`) and evaluates one category in `folder`; returns its results."""
    if config.maps_dir:
        return run_maps(config, folder, splits)
    first = distributed.is_main_process()
    if training:
        images = load_train_images(splits[0], config.image_size)
        how = {"make_batches": input_pipeline.train_batches}
        writer = train_log.create_writer(folder) if first else None
        train.fit(config, images, folder, writer=writer, **how)
        distributed.stop_if_asked("after training")
        if config.detector.enabled:
            writer = train_log.create_writer(folder / "detector") if first else None
            detector.fit(config, images, folder, writer=writer, **how)
            distributed.stop_if_asked("after training the detector")
    predictor = Predictor(
        folder,
        top_fraction=config.evaluate.top_fraction,
        batch_size=config.evaluate.batch_size,
        detector=config.detector.enabled,
    )
    arrays = input_pipeline.load_arrays(splits[1], predictor.image_size)
    test = list(input_pipeline.test_batches(arrays, config.evaluate.batch_size))
    masks = input_pipeline.load_masks(splits[1]) if config.evaluate.native_size else None
    evaluation = evaluate.evaluate(
        predictor,
        test,
        native_masks=masks,
        pixel_threshold=config.evaluate.pixel_threshold,
        image_threshold=config.evaluate.image_threshold,
        detector=predictor.detector,
        image_score=config.evaluate.image_score,
    )
    if not first:
        return evaluation.results
    if config.evaluate.baselines:
        evaluation.results["baselines"] = evaluate.evaluate_baselines(
            trained_on(predictor.config, splits[0]),
            test,
            top_fraction=config.evaluate.top_fraction,
            native_masks=masks,
        )
    write_evaluation(folder, evaluation, arrays)
    pictures.write_pictures(folder / "pictures", evaluation, arrays, config.evaluate.pictures)
    return evaluation.results


def export_replay(config: ConfigDict, workdir: Path, splits: Mapping[str, Splits]) -> None:
    """Trains `config.num_steps` steps a category and writes them (replay.export) to its replay/."""
    options.use_compilation_cache(config.compilation_cache)
    for name, (train_split, _) in splits.items():
        of_category = options.of_category(config, name)
        images = load_train_images(train_split, of_category.image_size)
        folder = workdir / name / "replay"
        replay.export(of_category, images, folder)
        print(f"{name}: {of_category.num_steps} steps in {folder}")


def run_seed(
    config: ConfigDict,
    workdir: Path,
    splits: Mapping[str, Splits],
    *,
    training: bool,
    command: str,
    alone: bool = True,
) -> list[str]:
    """Runs all categories with `config.seed`; returns a line for each that failed.

    Results are written after every category: what is finished is not lost with what follows. If
    other jobs write into `workdir`, too, (not `alone`) only into the category's own folder.
    """
    failures = []
    for name, of_category in splits.items():
        print(f"== {name}", flush=True)
        distributed.stop_if_asked(f"before {name}")
        own, folder = options.of_category(config, name), workdir / name
        try:
            with distributed.lock(folder):
                results = run_category(own, folder, of_category, training=training)
        except (
            checkpoint.CheckpointError,
            loop.TrainingError,
            detector.DetectorError,
            external_maps.MapsError,
            FileNotFoundError,
        ) as error:
            # Of several processes the others may have gone on: only training fails in all alike.
            if jax.process_count() > 1 and not isinstance(error, loop.TrainingError):
                raise
            failures.append(f"{name}: {error}")
            print(f"error: {failures[-1]}", file=sys.stderr)
            continue
        made = {"config": config.to_json(), "command": command}
        if distributed.is_main_process() and alone:
            write_results(workdir, name, results, **made)
        elif distributed.is_main_process():
            write_category(folder, results, **made)
        print(summary(name, results), flush=True)
    if distributed.is_main_process() and alone and len(failures) < len(splits):
        pages.write_run(workdir)
        print(f"results: {workdir}/results.md; pictures and curves: {workdir}/report.html")
    return failures


def with_seed(config: ConfigDict, seed: int | None) -> ConfigDict:
    """Returns the options of one of `config.seeds`; None is for a run without these."""
    one = config.copy_and_resolve_references()
    one.shard = ""  # of the job, not of the run: it is in no file and no hash
    if seed is not None:
        one.seed, one.seeds = seed, ()
    return one


def run_seeds(
    config: ConfigDict, workdir: Path, splits: Mapping[str, Splits], *, training: bool, command: str
) -> list[str]:
    """Runs `config.seed`, or each of `config.seeds` in `workdir`/seed_N and then their mean.

    Returns a line for each category that failed.
    """
    if not config.seeds:
        return run_seed(config, workdir, splits, training=training, command=command)
    failures = []
    for seed in config.seeds:
        print(f"==== seed {seed}", flush=True)
        one, folder = with_seed(config, seed), shards.folder_of(workdir, seed=seed)
        failed = run_seed(one, folder, splits, training=training, command=command)
        failures += [f"seed {seed}: {line}" for line in failed]
    if distributed.is_main_process() and shards.write_mean(workdir, config.seeds):
        print(f"mean and spread over seeds: {workdir}/results.md")
    return failures


def run_shard(
    config: ConfigDict, workdir: Path, splits: Mapping[str, Splits], *, training: bool, command: str
) -> list[str]:
    """Runs this job's share of what `run` does; `shards.merge` puts the results of all together.

    Returns a line for each category that failed.
    """
    shard = options.shard_of(config.shard)
    command = re.sub(r" --config\.shard[= ]\S+", "", command)
    plan = shards.plan_of(config, list(splits), command)
    if distributed.is_main_process():
        shards.write_plan(workdir, plan, shard)
    variants = options.of_variants(config, splits) or {"": config}
    failures = []
    units = shards.units_of(plan, shard)
    for variant, seed, category in units:
        one, folder = with_seed(variants[variant], seed), shards.folder_of(workdir, variant, seed)
        print(f"==== {folder}", flush=True)
        share = {category: splits[category]}
        failed = run_seed(one, folder, share, training=training, command=command, alone=False)
        failures += [f"{folder}: {line}" for line in failed]
    done = f"{len(units) - len(failures)} of {len(units)}"
    print(f"done: {done}, of {len(shards.units_of(plan))} of all jobs; then --mode=merge")
    return failures


def run_variants(
    config: ConfigDict,
    variants: Mapping[str, ConfigDict],
    workdir: Path,
    splits: Mapping[str, Splits],
    *,
    training: bool,
    command: str,
) -> list[str]:
    """Runs each of `variants` (options.of_variants) in a folder of its own, and writes their table.

    The table is written after every variant: of those that this command is done with. Returns a
    line for each category that failed.
    """
    failures, done = [], []
    for name, variant in variants.items():
        print(f"====== {name}", flush=True)
        failed = run_seeds(variant, workdir / name, splits, training=training, command=command)
        failures += [f"{name}: {line}" for line in failed]
        done.append(name)
        if distributed.is_main_process():
            plan = shards.plan_of(config, list(splits), command) | {"variants": done}
            table = shards.write_table(workdir, plan, failures)
            print(f"{ablation.as_markdown(table)}\nthe table: {workdir}/ablation.md", flush=True)
    return failures


def run(
    config: ConfigDict, workdir: Path, splits: Mapping[str, Splits], *, training: bool, command: str
) -> list[str]:
    """Runs the config, its variants, or a share of both, while `workdir` is locked.

    Returns a line for each category that failed. Raises UsageError if another job is at work in
    `workdir`, and distributed.Stopped if a signal asks for it.
    """
    for name in splits:
        options.of_category(config, name)  # refuses what cannot work, before the first is trained
    variants = options.of_variants(config, splits)
    options.use_compilation_cache(config.compilation_cache)
    how = {"training": training, "command": command}
    with distributed.lock(workdir, shared=bool(config.shard)):
        if config.shard:
            return run_shard(config, workdir, splits, **how)
        if variants:
            return run_variants(config, variants, workdir, splits, **how)
        return run_seeds(config, workdir, splits, **how)

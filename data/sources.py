"""Opens what `config.dataset` names: folders of images, or a TFDS builder of this package."""

import importlib

import tensorflow as tf
import tensorflow_datasets as tfds
from etils.epath import Path

from anoseg_jax.images import input_pipeline, layout

Split = tf.data.Dataset


def open_folders(data_dir: str, names: tuple[str, ...]) -> dict[str, tuple[Split, Split]]:
    """Returns (train, test) of each category folder, after every file was opened and decoded.

    Prints the warnings. Raises LayoutError naming every file and folder that cannot be used.
    """
    categories = layout.scan_categories(data_dir, names)
    layout.require_usable(categories)
    for warning in (warning for category in categories for warning in category.warnings):
        print(f"warning: {warning}")
    return {
        category.name: tuple(
            input_pipeline.from_files(examples, layout.load)
            for examples in (category.train, category.test)
        )
        for category in categories
    }


def open_prepared(
    dataset: str, names: tuple[str, ...], *, data_dir: str, tfds_dir: str
) -> dict[str, tuple[Split, Split]]:
    """Returns (train, test) of each builder config, prepared if they are not yet.

    Args:
      dataset: a folder of this package with a TFDS builder.
      names: builder configs, or ("all",).
      data_dir: TFDS's manual folder, for builders that need one.
      tfds_dir: where TFDS keeps what it prepares; "" is its default.

    Raises:
      LayoutError: there is no such builder config, or its files cannot be used.
    """
    module = importlib.import_module(f"data.{dataset}.{dataset}_dataset_builder")
    known = tuple(module.Builder.builder_configs)
    unknown = [name for name in names if name not in known and names != ("all",)]
    if unknown:
        raise layout.LayoutError(
            f"{dataset}: no category {', '.join(unknown)}; it has {', '.join(known)}"
        )
    tfds.disable_progress_bar()
    splits = {}
    for name in known if names == ("all",) else names:
        builder = module.Builder(config=name, data_dir=tfds_dir or None)
        by_hand = module.Builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not builder.is_prepared()
        if by_hand and not (data_dir and Path(data_dir).is_dir()):
            raise layout.LayoutError(
                f"{dataset}/{name}: is not prepared yet, and data_dir={data_dir!r} is no folder: "
                "give the one that holds the category folders, --config.data_dir=DIR"
            )
        manual = tfds.download.DownloadConfig(manual_dir=data_dir or None)
        try:
            builder.download_and_prepare(download_config=manual)
        except FileExistsError:  # Another job was faster; TFDS renames what is whole.
            builder = module.Builder(config=name, data_dir=tfds_dir or None)
        splits[name] = (builder.as_dataset("train"), builder.as_dataset("test"))
    return splits


def open_splits(
    dataset: str, names: tuple[str, ...], *, data_dir: str, tfds_dir: str
) -> dict[str, tuple[Split, Split]]:
    """Returns (train, test) of each category: "folder" for folders, else the name of a builder."""
    if dataset == "folder":
        return open_folders(data_dir, names)
    return open_prepared(dataset, names, data_dir=data_dir, tfds_dir=tfds_dir)

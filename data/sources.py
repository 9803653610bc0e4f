"""Opens what `config.dataset` names: folders of images, or a TFDS builder of this package.

TensorFlow is imported when a data set is opened, after everything was checked that can be.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from etils.epath import Path

from anoseg_jax.images import layout

Split = Any  # tf.data.Dataset


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data sets of a category (see input_pipeline.load_arrays).

    `validation` are good images that the layout sets apart for thresholds; None if it has none.
    `bit_depth` is that of the images (images.decode.read_image); a model keeps that of its training
    images, and reads all others with `at_bit_depth`.
    """

    train: Split
    test: Split
    validation: Split | None = None
    bit_depth: int = 8
    reopen: Callable[[int], "Splits"] | None = None

    def at_bit_depth(self, bit_depth: int) -> "Splits":
        """Returns the same images read at another bit depth; LayoutError if that is fixed."""
        if bit_depth == self.bit_depth:
            return self
        if self.reopen is None:
            raise layout.LayoutError(
                f"the prepared data set has bit_depth={self.bit_depth}, the model {bit_depth}: use "
                "the data set that the model was trained on, or dataset=folder"
            )
        return self.reopen(bit_depth)


def _open_category(category: layout.Category, max_megapixels: float, bit_depth: int) -> Splits:
    """Returns the splits of a scanned folder, read when they are iterated."""
    from anoseg_jax.images import input_pipeline

    load = functools.partial(layout.load, bit_depth=bit_depth, max_megapixels=max_megapixels)

    def open_split(examples: tuple[layout.Example, ...]) -> Split:
        with_ignore = any(example.ignore for example in examples)
        return input_pipeline.from_files(examples, load, with_ignore=with_ignore)

    return Splits(
        train=open_split(category.train),
        test=open_split(category.test),
        validation=open_split(category.validation) if category.validation else None,
        bit_depth=bit_depth,
        reopen=functools.partial(_open_category, category, max_megapixels),
    )


def check(
    dataset: str,
    names: Sequence[str],
    *,
    data_dir: str,
    tfds_dir: str = "",
    read: layout.ReadOptions | None = None,
    image_size: tuple[int, int] | None = None,
    training: bool = True,
) -> tuple[list[str], Callable[[], dict[str, Splits]]]:
    """Checks a data set; returns its categories, and a function that opens the splits of each.

    The files of folders are all opened and decoded. The function prints warnings about them, also
    of images that `image_size` squeezes, and of defects that it makes too small. It prepares the
    data set of a builder that is not prepared yet.

    Args:
      dataset: "folder" for category folders, else a folder of this package with a TFDS builder.
      names: categories, or ("all",).
      data_dir: holds the category folders; TFDS's manual folder, for builders that need one.
      tfds_dir: where TFDS keeps what it prepares; "" is its default.
      read: how folders and files are read.
      image_size: height and width that images are resized to.
      training: a category without images to train on cannot be used.

    Raises LayoutError naming every file and folder that cannot be used. Imports no TensorFlow.
    """
    if dataset == "folder":
        read = read or layout.ReadOptions()
        categories = layout.scan_categories(data_dir, names, read)
        layout.require_usable(categories, training=training)
        open_all = functools.partial(_open_folders, categories, read.max_megapixels, image_size)
        return [category.name for category in categories], open_all
    known = importlib.import_module(f"data.{dataset}").CATEGORIES
    names = list(known if tuple(names) == ("all",) else names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise layout.LayoutError(
            f"{dataset}: no category {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return names, functools.partial(_open_prepared, dataset, names, data_dir, tfds_dir)


def open_splits(*arguments: Any, **options: Any) -> dict[str, Splits]:
    """Returns the splits of each category of a data set; for the arguments see `check`."""
    _, open_all = check(*arguments, **options)
    return open_all()


def _open_folders(
    categories: Sequence[layout.Category],
    max_megapixels: float,
    image_size: tuple[int, int] | None,
) -> dict[str, Splits]:
    for category in categories:
        sizes = layout.size_warnings(category, image_size) if image_size else []
        for warning in (*category.warnings, *sizes):
            print(f"warning: {warning}")
    return {
        category.name: _open_category(category, max_megapixels, category.bit_depth)
        for category in categories
    }


def _open_prepared(
    dataset: str, names: Sequence[str], data_dir: str, tfds_dir: str
) -> dict[str, Splits]:
    """Raises LayoutError if a builder's files are missing or cannot be used."""
    import tensorflow_datasets as tfds

    module = importlib.import_module(f"data.{dataset}.{dataset}_dataset_builder")
    tfds.disable_progress_bar()
    splits = {}
    for name in names:
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
        bit_depth = (builder.info.metadata or {}).get("bit_depth", 8)
        splits[name] = Splits(
            builder.as_dataset("train"), builder.as_dataset("test"), bit_depth=bit_depth
        )
    return splits

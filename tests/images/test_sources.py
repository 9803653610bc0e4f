"""data/sources.py: the splits of folders, at the bit depth of their images or of a model."""

import numpy as np
import pytest
from drawings import disc, photo, save

from anoseg_jax.images import input_pipeline, layout
from data import sources


def open_part(folder, *, training=True, **options):
    read = layout.ReadOptions(**options)
    return sources.open_splits(
        "folder", ("part",), data_dir=folder.parent, read=read, training=training
    )["part"]


def test_splits_hold_the_images_of_a_folder(folder):
    splits = open_part(folder)
    train = input_pipeline.load_arrays(splits.train, (12, 16))
    test = input_pipeline.load_arrays(splits.test, (12, 16))
    assert splits.validation is None and splits.bit_depth == 8
    np.testing.assert_array_equal(train["image"][1, ..., 2], photo(1))
    np.testing.assert_array_equal(test["mask"][3], disc(1))
    assert "ignore" not in test


def test_good_images_that_a_layout_sets_apart_are_a_split_of_their_own(folder):
    save(photo(7), folder / "validation/good/000.png")
    splits = open_part(folder, layout="mvtec_loco")
    arrays = input_pipeline.load_arrays(splits.validation, (12, 16))
    assert arrays["name"].tolist() == ["validation/good/000.png"]
    np.testing.assert_array_equal(arrays["image"][0, ..., 0], photo(7))


def test_images_are_read_at_the_bit_depth_of_a_model(folder):
    for path in folder.glob("t*/*/*.png"):
        save(photo(3).astype(np.uint16) * 16, path)
    splits = open_part(folder)
    assert splits.bit_depth == 12
    for bit_depth in (12, 14):
        splits = splits.at_bit_depth(bit_depth)
        assert splits.bit_depth == bit_depth
        image = input_pipeline.load_arrays(splits.test, (12, 16))["image"][0, ..., 0]
        scaled = np.round(photo(3) * 16.0 * (255 / (2**bit_depth - 1)))
        np.testing.assert_array_equal(image, scaled)
    with pytest.raises(layout.LayoutError, match=r"bit_depth=10 .* ends at 1023"):
        input_pipeline.load_arrays(splits.at_bit_depth(10).test, (12, 16))


def test_pixels_to_ignore_are_in_the_arrays_of_their_split_alone(folder):
    save(np.uint8(255) * disc(3), folder / "ground_truth/scratch/001_ignore.png")
    splits = open_part(folder)
    assert "ignore" not in input_pipeline.load_arrays(splits.train, (12, 16))
    arrays = input_pipeline.load_arrays(splits.test, (12, 16))
    np.testing.assert_array_equal(arrays["ignore"][3], disc(3))


def test_warnings_are_printed_also_of_the_size(folder, capsys):
    sources.open_splits("folder", ("all",), data_dir=folder.parent, image_size=(32, 128))
    assert "warning: " + str(folder) + ": image_size=128x32" in capsys.readouterr().out


def test_a_test_folder_alone_is_opened_for_evaluation(folder):
    (folder / "train").rename(folder.parent / "elsewhere")
    with pytest.raises(layout.LayoutError, match="train/good: is missing"):
        open_part(folder)
    splits = open_part(folder, training=False)
    assert len(input_pipeline.load_arrays(splits.test, (12, 16))["label"]) == 4
    assert len(input_pipeline.load_arrays(splits.train, (12, 16))["label"]) == 0

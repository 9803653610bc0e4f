"""Tests of the MVTec AD builder, on small drawings in dummy_data/."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from anoseg_jax.images import input_pipeline, layout
from data import sources
from data.mvtec_ad import mvtec_ad_dataset_builder

DUMMY_DATA = Path(__file__).parent / "dummy_data"


class MvtecAdTest(tfds.testing.DatasetBuilderTestCase):
    """What TFDS asks of every builder."""

    DATASET_CLASS = mvtec_ad_dataset_builder.Builder
    BUILDER_CONFIG_NAMES_TO_TEST = ["screw", "tile"]
    SPLITS = {"train": 3, "test": 3}


def prepare(tmp_path, manual_dir, config):
    builder = mvtec_ad_dataset_builder.Builder(data_dir=tmp_path / "tfds", config=config)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    return builder


def test_all_15_categories_have_a_config():
    names = set(mvtec_ad_dataset_builder.Builder.builder_configs)
    objects = "bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor zipper"
    textures = "carpet grid leather tile wood"
    assert names == set(f"{objects} {textures}".split())


def test_examples_are_what_the_files_hold(tmp_path):
    builder = prepare(tmp_path, DUMMY_DATA, "tile")
    examples = {e["name"].decode(): e for e in tfds.as_numpy(builder.as_dataset(split="test"))}
    files = {e.name: layout.load(e) for e in layout.scan(DUMMY_DATA / "tile").test}
    assert examples.keys() == files.keys()
    for name, example in examples.items():
        np.testing.assert_array_equal(example["image"], files[name]["image"])
        np.testing.assert_array_equal(example["mask"][..., 0], files[name]["mask"])
        assert example["image"].shape == (14, 20, 3)
        assert example["has_mask"]
        assert example["label"] == (name != "test/good/000.png")
        assert example["defect_type"].decode() == name.split("/")[1]


def test_a_defect_without_ground_truth_is_told_apart(tmp_path):
    shutil.copytree(DUMMY_DATA / "tile", tmp_path / "manual" / "tile")
    shutil.rmtree(tmp_path / "manual" / "tile" / "ground_truth")
    builder = prepare(tmp_path, tmp_path / "manual", "tile")
    for example in tfds.as_numpy(builder.as_dataset(split="test")):
        assert example["has_mask"] == (example["label"] == 0)
        assert not example["mask"].any()


@pytest.mark.parametrize("unpacked", ["mvtec_ad", "mvtec_anomaly_detection"])
def test_the_folder_of_the_archive_is_found_in_the_manual_dir(tmp_path, unpacked):
    shutil.copytree(DUMMY_DATA / "screw", tmp_path / "manual" / unpacked / "screw")
    builder = prepare(tmp_path, tmp_path / "manual", "screw")
    assert builder.info.splits["train"].num_examples == 3


def test_a_missing_category_is_an_error_that_lists_what_is_there(tmp_path):
    with pytest.raises(layout.LayoutError, match="no category wood.*screw, tile") as error:
        prepare(tmp_path, DUMMY_DATA, "wood")
    assert "\n" not in str(error.value)


def test_a_damaged_image_is_an_error_that_names_it(tmp_path):
    shutil.copytree(DUMMY_DATA / "tile", tmp_path / "manual" / "tile")
    (tmp_path / "manual" / "tile" / "train" / "good" / "001.png").write_bytes(b"")
    with pytest.raises(layout.LayoutError, match="train/good/001.png: is empty"):
        prepare(tmp_path, tmp_path / "manual", "tile")


def test_the_bit_depth_of_the_files_is_fixed_and_kept_when_the_data_set_is_built(tmp_path):
    tile = tmp_path / "manual" / "tile"
    shutil.copytree(DUMMY_DATA / "tile", tile)
    deep = np.random.default_rng(0).integers(0, 4096, (14, 20), np.uint16)
    for path in (*tile.glob("train/*/*.png"), *tile.glob("test/*/*.png")):
        Image.fromarray(deep).save(path)
    prepare(tmp_path, tmp_path / "manual", "tile")
    shutil.rmtree(tmp_path / "manual")
    splits = sources.open_splits(
        "mvtec_ad", ("tile",), data_dir="", tfds_dir=str(tmp_path / "tfds")
    )["tile"]
    assert splits.bit_depth == 12
    arrays = input_pipeline.load_arrays(splits.train, (14, 20))
    np.testing.assert_array_equal(arrays["image"][0, ..., 0], np.round(deep * (255 / 4095)))
    assert splits.at_bit_depth(12) is splits
    with pytest.raises(layout.LayoutError, match="has bit_depth=12, the model 16"):
        splits.at_bit_depth(16)


def test_pixels_to_ignore_are_refused_with_what_to_do(tmp_path):
    shutil.copytree(DUMMY_DATA / "tile", tmp_path / "manual" / "tile")
    masks = sorted((tmp_path / "manual" / "tile" / "ground_truth").glob("*/*.png"))
    shutil.copy(masks[0], tmp_path / "manual" / "tile" / "ignore.png")
    with pytest.raises(layout.LayoutError, match="tile: has masks of pixels to ignore.*folder"):
        prepare(tmp_path, tmp_path / "manual", "tile")

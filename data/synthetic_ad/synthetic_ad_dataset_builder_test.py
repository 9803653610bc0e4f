"""Tests of the generated data set and its builder."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.metrics import average_precision_score

from anoseg_jax.evaluation import baselines
from anoseg_jax.images import layout
from data.synthetic_ad import drawing, synthetic_ad_dataset_builder

CATEGORIES = ("weave", "grain", "washer", "capsule", "sheet", "blister")
PATTERNS = ("sheet", "blister")


class SyntheticAdTest(tfds.testing.DatasetBuilderTestCase):
    """What TFDS asks of every builder."""

    DATASET_CLASS = synthetic_ad_dataset_builder.Builder
    # Nothing is read: any folder that exists will do.
    EXAMPLE_DIR = str(Path(__file__).parent)
    BUILDER_CONFIG_NAMES_TO_TEST = ["capsule"]
    SPLITS = {"train": 64, "test": 36}


@pytest.fixture(scope="module", params=CATEGORIES)
def test_split(request):
    return request.param, list(drawing.examples(request.param, "test"))


def test_every_category_has_a_config():
    assert tuple(synthetic_ad_dataset_builder.Builder.builder_configs) == CATEGORIES


def test_masks_are_exactly_where_the_image_differs_from_its_good_twin(test_split):
    _, examples = test_split
    for example in examples:
        changed = (example["image"] != example["twin"]).any(axis=-1)
        np.testing.assert_array_equal(example["mask"], changed)


def test_masks_hold_what_a_person_sees(test_split):
    _, examples = test_split
    for example in (example for example in examples if example["label"]):
        difference = np.abs(example["image"].astype(int) - example["twin"]).max(axis=-1)
        assert np.mean(difference[example["mask"]] > 10) > 0.85, example["name"]


def test_defects_are_neither_tiny_nor_huge(test_split):
    _, examples = test_split
    shares = [example["mask"].mean() for example in examples if example["label"]]
    assert len(shares) == 24
    assert 0.005 <= min(shares) and max(shares) <= 0.06


def test_good_examples_are_their_own_twins_with_empty_masks(test_split):
    _, examples = test_split
    good = [example for example in examples if example["defect_type"] == "good"]
    assert len(good) == 12
    for example in good:
        assert example["label"] == 0 and not example["mask"].any()
        np.testing.assert_array_equal(example["image"], example["twin"])


def test_every_defect_type_of_a_category_occurs_equally_often(test_split):
    category, examples = test_split
    types = [example["defect_type"] for example in examples if example["label"]]
    assert {name: types.count(name) for name in types} == dict.fromkeys(
        drawing.CATEGORIES[category][1], 8
    )


def test_no_two_images_are_the_same(test_split):
    category, examples = test_split
    images = examples + [drawing.draw(category, "train", index) for index in range(8)]
    hashes = {hashlib.sha256(example["image"].tobytes()).hexdigest() for example in images}
    assert len(hashes) == len(images)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_example_depends_on_its_place_in_the_data_set_alone(category):
    first = drawing.draw(category, "test", 13)
    np.random.default_rng(0).standard_normal(3)
    drawing.draw(category, "train", 5)
    second = drawing.draw(category, "test", 13)
    np.testing.assert_array_equal(first["image"], second["image"])
    np.testing.assert_array_equal(first["mask"], second["mask"])


@pytest.mark.parametrize("category", CATEGORIES)
def test_good_parts_vary(category):
    images = [drawing.draw(category, "train", index)["image"] / 255 for index in range(4)]
    for other in images[1:]:
        # Above what the camera's noise alone, 0.008, would give.
        assert np.abs(images[0] - other).mean() > 0.02


def test_the_written_folders_are_read_as_they_were_drawn(tmp_path):
    drawing.write(tmp_path, "washer")
    category = layout.scan(tmp_path / "washer")
    assert not category.errors and not category.warnings
    assert (len(category.train), len(category.test)) == (64, 36)
    drawn = {example["name"]: example for example in drawing.examples("washer", "test")}
    for example in category.test:
        read = layout.load(example)
        np.testing.assert_array_equal(read["image"], drawn[example.name]["image"])
        np.testing.assert_array_equal(read["mask"], drawn[example.name]["mask"])


@pytest.mark.parametrize("category", PATTERNS)
def test_the_defects_of_patterns_are_hidden_from_trivial_baselines(category):
    def small(array):
        image = Image.fromarray(array).resize((64, 64), Image.Resampling.BILINEAR)
        return np.asarray(image)

    good = [drawing.draw(category, "train", index)["image"] for index in range(24)]
    test = [example for example in drawing.examples(category, "test") if example["label"]]
    groups = good, [example["image"] for example in test]
    images = [np.stack([small(image) for image in group]) for group in groups]
    masks = np.stack([small(np.uint8(255) * example["mask"]) for example in test]) > 127
    for baseline in baselines.BASELINES.values():
        maps = baseline(*images)
        assert average_precision_score(masks.ravel(), maps.ravel()) < 0.15


def test_new_parts_are_drawn_beside_the_data_set(tmp_path):
    drawing.write_new(tmp_path, "sheet")
    paths = sorted((tmp_path / "sheet").iterdir())
    kinds = ["good", "good", "good", "extra_hole", "missing_hole", "moved_hole"]
    assert [path.name for path in paths] == [f"{i}_{kind}.png" for i, kind in enumerate(kinds)]
    known = [
        drawing.draw("sheet", split, index) for split in ("train", "test") for index in range(6)
    ]
    for path in paths:
        assert not any(
            np.array_equal(np.asarray(Image.open(path)), part["image"]) for part in known
        )


def test_nothing_is_said_about_a_download(tmp_path, capsys):
    builder = synthetic_ad_dataset_builder.Builder(config="sheet", data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == 64
    assert "ownload" not in "".join(capsys.readouterr())

"""Pixels to ignore: where their masks are found, and how they are delivered."""

import numpy as np
import pytest
from drawings import HEIGHT, WIDTH, disc, save, save_mask

from anoseg_jax.images import input_pipeline, layout

LABEL = np.zeros((HEIGHT, WIDTH), bool)
LABEL[8:12, 1:6] = True
# Where a mask lies -> the images that it is for.
PLACES = {
    "ignore.png": {
        *(f"train/good/{i:03}.png" for i in range(3)),
        *(f"test/{kind}/{i:03}.png" for kind in ("good", "scratch") for i in range(2)),
    },
    "ground_truth/scratch/001_ignore.png": {"test/scratch/001.png"},
    "ground_truth/good/000_ignore.png": {"test/good/000.png"},
    "ground_truth/ignore/scratch/001.png": {"test/scratch/001.png"},
    "ignore/train/good/002.png": {"train/good/002.png"},
    "ignore/test/scratch/000_mask.png": {"test/scratch/000.png"},
    "ignore/test/good/001_ignore.png": {"test/good/001.png"},
    "train/good/001_ignore.png": {"train/good/001.png"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_mask_is_found_by_its_name(folder, place):
    save_mask(LABEL, folder / place)
    category = layout.scan(folder)
    assert category.errors == () and category.warnings == () and category.ignored == ()
    examples = (*category.train, *category.test)
    assert len(examples) == 7
    assert {x.name for x in examples if x.ignore} == PLACES[place]
    for example in examples:
        ignore = layout.load(example)["ignore"]
        if example.name in PLACES[place]:
            np.testing.assert_array_equal(ignore, LABEL)
        else:
            assert ignore is None
    assert f"{len(PLACES[place])} images have pixels that count neither way" in layout.report(
        category
    )


def test_the_mask_of_all_images_and_that_of_one_are_joined(folder):
    save_mask(LABEL, folder / "ignore.png")
    save_mask(disc(3), folder / "ground_truth/scratch/001_ignore.png")
    category = layout.scan(folder)
    np.testing.assert_array_equal(layout.load(category.test[3])["ignore"], LABEL | disc(3))
    # What is a defect is said by the mask alone.
    np.testing.assert_array_equal(layout.load(category.test[3])["mask"], disc(1))


def test_the_name_is_an_option_and_empty_reads_none(folder):
    save_mask(LABEL, folder / "ground_truth/scratch/001_dontcare.png")
    options = layout.ReadOptions(ignore_name="dontcare")
    assert [bool(x.ignore) for x in layout.scan(folder, options).test] == [False] * 3 + [True]
    category = layout.scan(folder, layout.ReadOptions(ignore_name=""))
    assert not any(x.ignore for x in category.test)
    assert "001_dontcare.png: is ignored: no image" in category.warnings[0]


def test_a_mask_that_is_for_no_image_is_named(folder):
    save_mask(LABEL, folder / "ground_truth/ignore/001.png")
    (warning,) = layout.scan(folder).warnings
    assert warning.startswith(f"{folder / 'ground_truth/ignore'}: 1 masks are ignored")


def test_a_mask_of_another_size_is_an_error(folder):
    save_mask(LABEL[:6], folder / "ignore.png")
    errors = layout.scan(folder).errors
    assert len(errors) == 7 and all(f"{folder / 'ignore.png'}: is 16x6" in e for e in errors)


def load_arrays(examples, size, **options):
    dataset = input_pipeline.from_files(examples, layout.load, **options)
    return input_pipeline.load_arrays(dataset, size), input_pipeline.load_masks(dataset, "ignore")


def test_arrays_hold_them_at_the_size_of_images_and_of_files(folder):
    save(np.uint8(255) * LABEL, folder / "ground_truth/scratch/001_ignore.png")
    test = layout.scan(folder).test
    arrays, native = load_arrays(test, (2 * HEIGHT, 2 * WIDTH), with_ignore=True)
    assert arrays["ignore"].dtype == bool and arrays["ignore"].shape == (4, 2 * HEIGHT, 2 * WIDTH)
    assert not arrays["ignore"][:3].any()
    np.testing.assert_array_equal(arrays["ignore"][3], np.kron(LABEL, np.ones((2, 2), bool)))
    np.testing.assert_array_equal(native[3], LABEL)
    batches = list(input_pipeline.test_batches(arrays, 3))
    np.testing.assert_array_equal(batches[1]["ignore"][0], arrays["ignore"][3])


def test_without_any_there_is_no_array_of_them(folder):
    arrays, native = load_arrays(layout.scan(folder).test, (HEIGHT, WIDTH))
    assert "ignore" not in arrays and native is None


def test_what_is_ignored_has_the_mean_colour_of_the_rest(folder):
    save_mask(LABEL, folder / "ignore.png")
    before = layout.load(layout.scan(folder).train[0])["image"]
    arrays, _ = load_arrays(layout.scan(folder).train, (HEIGHT, WIDTH), with_ignore=True)
    image = arrays["image"][0]
    np.testing.assert_array_equal(image[~LABEL], before[~LABEL])
    mean = before[~LABEL].mean(axis=0).round()
    np.testing.assert_array_equal(image[LABEL], np.broadcast_to(mean, (LABEL.sum(), 3)))

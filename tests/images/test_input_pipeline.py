"""From files to batches: sizes, order, and no image is lost."""

import time

import numpy as np
import pytest
from drawings import photo, save

from anoseg_jax.images import batches, decode, input_pipeline, layout


def example(index, *, size=(8, 8), mask=None):
    image = np.full((*size, 3), index, np.uint8)
    name = f"test/x/{index}.png"
    return {"image": image, "mask": mask, "label": 1, "defect_type": "x", "name": name}


def load_all(examples, size):
    dataset = input_pipeline.from_files(examples, load=lambda x: x)
    return input_pipeline.load_arrays(dataset, size)


def test_images_of_several_sizes_come_in_order_at_one_size():
    examples = [example(3, size=(8, 8)), example(7, size=(5, 9)), example(200, size=(16, 32))]
    arrays = load_all(examples, (4, 6))
    assert arrays["image"].shape == (3, 4, 6, 3) and arrays["image"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["image"][:, 0, 0, 0], [3, 7, 200])
    assert arrays["name"].tolist() == ["test/x/3.png", "test/x/7.png", "test/x/200.png"]


def test_an_example_without_ground_truth_is_told_from_one_with_an_empty_mask():
    arrays = load_all([example(0), example(1, mask=np.zeros((8, 8), bool))], (8, 8))
    assert arrays["has_mask"].tolist() == [False, True]


def test_no_examples_make_empty_arrays_of_the_same_keys():
    some, none = load_all([example(1)], (8, 8)), load_all([], (8, 8))
    assert none.keys() == some.keys()
    for key, values in none.items():
        assert values.shape == (0, *some[key].shape[1:])


def test_enlarged_and_reduced_images_are_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    reduced = decode.resize_image(stripes, (16, 16))
    assert np.all(np.abs(reduced[:, 1:-1].astype(int) - 127) <= 3)  # not all black or white


def test_masks_are_resized_by_nearest_neighbour():
    mask = np.zeros((8, 8), bool)
    mask[:4, 4:] = True
    resized = decode.resize_mask(mask, (4, 4))
    np.testing.assert_array_equal(resized, mask[::2, ::2])
    np.testing.assert_array_equal(decode.resize_mask(resized, (8, 8)), mask)


@pytest.mark.parametrize("pixel", [(0, 0), (50, 31), (99, 99), (13, 78)])
def test_a_defect_of_one_pixel_never_vanishes(pixel):
    mask = np.zeros((100, 100), bool)
    mask[pixel] = True
    resized = decode.resize_mask(mask, (9, 7))
    assert 1 <= resized.sum() <= 4
    assert resized[pixel[0] * 9 // 100, pixel[1] * 7 // 100]


def test_the_pipeline_yields_the_batches_of_numpy_also_when_it_resumes():
    arrays = {
        "image": np.arange(7 * 3, dtype=np.uint8).reshape(7, 1, 1, 3),
        "image_id": np.arange(7, dtype=np.int32),
    }
    options = {"batch_size": 4, "seed": 5, "rows": slice(1, 3)}
    for start in (0, 4):
        pipeline = input_pipeline.train_batches(arrays, start, **options)
        expected = batches.train_batches(arrays, start, **options)
        for one, other, _ in zip(pipeline, expected, range(5), strict=False):
            assert one.keys() == arrays.keys()
            for name in arrays:
                assert one[name].dtype == arrays[name].dtype
                np.testing.assert_array_equal(one[name], other[name])


def test_closed_batches_leave_no_thread_in_python(monkeypatch):
    """TensorFlow would wait for it for up to a minute."""
    drawing, order = [], batches.batch_order

    def slow_order(**options):
        drawing.append(1)
        time.sleep(0.05)
        drawing.pop()
        return order(**options)

    monkeypatch.setattr(input_pipeline, "batch_order", slow_order)
    arrays = {"image": np.zeros((5, 4, 4, 3), np.uint8)}
    pipeline = input_pipeline.train_batches(arrays, 0, batch_size=2, seed=0)
    next(pipeline)
    pipeline.close()
    assert not drawing and not list(pipeline)


def test_test_batches_hold_every_image_once():
    arrays = load_all([example(i) for i in range(5)], (4, 4))
    test_batches = list(input_pipeline.test_batches(arrays, 2))
    assert [len(batch["label"]) for batch in test_batches] == [2, 2, 1]
    names = np.concatenate([batch["name"] for batch in test_batches])
    np.testing.assert_array_equal(names, arrays["name"])


# Files that change between the check and the reading.


def split_of(folder):
    category = layout.scan(folder)
    layout.require_usable([category])
    return input_pipeline.from_files(category.test, layout.load)


@pytest.mark.parametrize("name", ["test/scratch/001.png", "ground_truth/scratch/001_mask.png"])
@pytest.mark.parametrize("load", [lambda x: input_pipeline.load_arrays(x, (8, 8)), "load_masks"])
def test_a_file_that_disappears_after_the_check_is_one_error_that_names_it(folder, name, load):
    split = split_of(folder)
    (folder / name).unlink()
    with pytest.raises(layout.LayoutError) as error:
        (getattr(input_pipeline, load) if isinstance(load, str) else load)(split)
    assert str(error.value).startswith(f"{folder / name}: cannot be opened (No such file")
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_after_the_check_is_named_and_can_be_mended(folder):
    split, path = split_of(folder), folder / "test/good/000.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(layout.LayoutError, match="000.png: is damaged or cut short"):
        input_pipeline.load_arrays(split, (8, 8))
    path.write_bytes(whole)
    assert len(input_pipeline.load_arrays(split, (8, 8))["label"]) == 4
    (folder / "test/scratch/001.png").unlink()
    with pytest.raises(layout.LayoutError, match="scratch/001.png: cannot be opened"):
        input_pipeline.load_arrays(split, (8, 8))


def test_an_image_that_has_another_size_than_at_the_check_is_named(folder):
    split, path = split_of(folder), folder / "test/scratch/000.png"
    save(photo(0, (5, 7)), path)
    with pytest.raises(layout.LayoutError, match="000_mask.png: is 16x12 pixels, its image .* 7x5"):
        input_pipeline.load_arrays(split, (8, 8))


def test_any_other_error_of_reading_comes_out_as_it_is():
    def load(example):
        raise ZeroDivisionError(f"example {example}")

    with pytest.raises(ZeroDivisionError, match="example 3"):
        input_pipeline.load_arrays(input_pipeline.from_files([3], load), (8, 8))

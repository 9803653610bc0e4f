"""Batches of training images: held-out images, and the order as a function of seed and step."""

import numpy as np
import pytest

from anoseg_jax.images import batches


def train_batches(arrays, start, **options):
    return batches.train_batches(arrays, start, **{"batch_size": 3, "seed": 5} | options)


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own():
    order = [batches.batch_order(count=5, batch_size=4, seed=1, step=step) for step in range(15)]
    epochs = np.concatenate(order).reshape(12, 5)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6


def test_the_order_is_a_function_of_seed_and_step():
    def order(**options):
        return batches.batch_order(**{"count": 20, "batch_size": 8, **options}).tolist()

    assert order(seed=1, step=3) == order(seed=1, step=3)
    assert order(seed=1, step=3) != order(seed=2, step=3)
    assert order(seed=1, step=3) != order(seed=1, step=4)


def test_a_resumed_run_sees_the_batches_that_an_uninterrupted_run_sees():
    arrays = {"image": np.arange(7 * 3, dtype=np.uint8).reshape(7, 1, 1, 3)}
    uninterrupted = train_batches(arrays, 0)
    expected = [next(uninterrupted)["image"] for _ in range(6)]
    for one, batch in zip(expected[4:], train_batches(arrays, 4), strict=False):
        assert batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"], one)


def test_an_image_keeps_its_id_and_processes_share_a_batch():
    ids = np.arange(7, dtype=np.int32)
    arrays = {"image": 10 * ids.astype(np.uint8), "image_id": ids}
    complete = next(train_batches(arrays, 2, batch_size=4))
    np.testing.assert_array_equal(complete["image"], 10 * complete["image_id"])
    halves = [
        next(train_batches(arrays, 2, batch_size=4, rows=rows))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for name in arrays:
        np.testing.assert_array_equal(np.concatenate([x[name] for x in halves]), complete[name])


def test_held_out_images_are_not_trained_on_and_depend_on_seed_and_number_alone():
    kept, held_out = batches.hold_out(np.arange(25), fraction=0.2, seed=3)
    assert len(held_out) == 5
    assert sorted([*kept, *held_out]) == list(range(25))
    assert sorted(kept) == list(kept) and sorted(held_out) == list(held_out)
    np.testing.assert_array_equal(
        held_out, batches.hold_out(np.arange(25), fraction=0.2, seed=3)[1]
    )
    assert not np.array_equal(held_out, batches.hold_out(np.arange(25), fraction=0.2, seed=4)[1])


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.9), (3, 0.1), (5, 0.0)])
def test_with_too_few_images_none_is_held_out(count, fraction):
    kept, held_out = batches.hold_out(np.arange(count), fraction=fraction, seed=0)
    assert kept.tolist() == list(range(count)) and not held_out.size


@pytest.mark.parametrize(("count", "number"), [(4, 1), (9, 1), (10, 1), (25, 2)])
def test_of_four_or_more_images_at_least_one_is_held_out(count, number):
    _, held_out = batches.hold_out(np.arange(count), fraction=0.1, seed=0)
    assert len(held_out) == number


def test_a_single_image_fills_a_batch():
    images = np.full((1, 2, 2, 3), 9, np.uint8)
    (batch,) = next(train_batches({"image": images}, 0, batch_size=4)).values()
    assert batch.shape == (4, 2, 2, 3) and (batch == 9).all()


def test_equal_images_are_held_out_together():
    image_ids = np.array([0, 1, 2, 3, 4, 2, 0, 4])
    for seed in range(20):
        kept, held_out = batches.hold_out(image_ids, fraction=0.5, seed=seed)
        assert len(held_out) and not set(image_ids[kept]) & set(image_ids[held_out])

"""Augmentation of good images."""

import jax
import jax.numpy as jnp
import numpy as np

from anoseg_jax.method import augment

IMAGE = jax.random.uniform(jax.random.key(0), (9, 9, 3))
KEYS = jax.random.split(jax.random.key(1), 256)


def options(**values):
    """Options as the training step takes them: arrays, not Python values."""
    defaults = dict.fromkeys(["flip_horizontal", "flip_vertical", "rotation", "shift"], 0.0)
    return {k: np.float32(v) for k, v in (defaults | {"light": 0.0} | values).items()}


@jax.jit
def draw(arrays, keys, image):
    return jax.vmap(lambda key: augment.augment(key, image, **arrays))(keys)


def test_nothing_is_changed_when_all_is_off():
    assert all(np.array_equal(image, IMAGE) for image in draw(options(), KEYS, IMAGE))


def test_warp_without_angle_and_offset_is_the_identity():
    same = augment.warp(IMAGE, jnp.zeros(()), jnp.zeros(2))
    np.testing.assert_allclose(same, IMAGE, atol=1e-6)


def test_warp_by_a_quarter_turn_is_rot90():
    turned = augment.warp(IMAGE, jnp.deg2rad(90.0), jnp.zeros(2))
    quarter_turns = [np.rot90(IMAGE, k) for k in (1, 3)]
    assert min(np.max(np.abs(turned - expected)) for expected in quarter_turns) < 1e-4


def test_warp_shifts_down_and_right_and_repeats_the_edge():
    shifted = augment.warp(IMAGE, jnp.zeros(()), jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(shifted[2:, 1:], IMAGE[:-2, :-1], atol=1e-6)
    np.testing.assert_allclose(shifted[0, 1:], IMAGE[0, :-1], atol=1e-6)


def test_flips_give_the_four_mirror_images_equally_often_and_no_other():
    images = np.asarray(draw(options(flip_horizontal=1, flip_vertical=1), KEYS, IMAGE))
    mirrored = [IMAGE, IMAGE[::-1], IMAGE[:, ::-1], IMAGE[::-1, ::-1]]
    counts = [sum(np.array_equal(image, expected) for image in images) for expected in mirrored]
    assert sum(counts) == len(KEYS)
    assert 0.15 < min(counts) / len(KEYS) and max(counts) / len(KEYS) < 0.35
    # Each flip alone happens in half of the draws.
    for name, expected in [("flip_horizontal", IMAGE[:, ::-1]), ("flip_vertical", IMAGE[::-1])]:
        images = np.asarray(draw(options(**{name: 1}), KEYS, IMAGE))
        assert 0.4 < np.mean([np.array_equal(image, expected) for image in images]) < 0.6


def test_light_changes_what_it_is_named_for_and_stays_in_range():
    grey = jnp.broadcast_to(jnp.linspace(0.25, 0.75, 9)[:, None, None], (9, 9, 3))
    change = lambda index, size: jnp.zeros(3).at[index].set(size)  # noqa: E731
    np.testing.assert_array_equal(augment.relight(change(0, 0.0), grey), grey)
    np.testing.assert_allclose(augment.relight(change(0, np.log(2)), grey), grey**2, rtol=1e-5)
    np.testing.assert_allclose(
        augment.relight(change(1, 0.2), grey), 0.5 + 1.2 * (grey - 0.5), rtol=1e-5
    )
    np.testing.assert_allclose(augment.relight(change(2, 0.2), grey), grey + 0.1, rtol=1e-5)
    images = np.asarray(draw(options(light=0.5), KEYS, IMAGE))
    assert images.min() >= 0 and images.max() <= 1 and len(np.unique(images[:, 4, 4, 0])) > 200


def test_rotation_and_shift_are_drawn_from_both_directions_up_to_their_bounds():
    rows, columns = np.mgrid[:33, :33] / 32
    image = jnp.asarray(np.stack([rows, columns, rows], -1), jnp.float32)
    shifted = np.asarray(draw(options(shift=0.25), KEYS, image))[:, 16, 16, :2]
    offsets = (0.5 - shifted) * 32 / 33  # as fractions of the image's size
    assert np.all(np.abs(offsets) <= 0.25 + 1e-4)
    assert np.all(offsets.min(axis=0) < -0.22) and np.all(offsets.max(axis=0) > 0.22)
    turned = np.asarray(draw(options(rotation=30.0), KEYS, image))
    slopes = (turned[:, 16, 20, 0] - turned[:, 16, 16, 0]) * 32 / 4  # sine of the angle
    angles = np.rad2deg(np.arcsin(slopes))
    assert np.all(np.abs(angles) <= 30.01) and angles.min() < -27 and angles.max() > 27


def test_one_image_alone_and_among_others_is_augmented_alike():
    arrays = options(flip_horizontal=1, rotation=10, shift=0.1, light=0.2)
    many = draw(arrays, KEYS, IMAGE)
    for index in range(3):
        alone = augment.augment(KEYS[index], IMAGE, **arrays)
        np.testing.assert_allclose(alone, many[index], atol=1e-5)


def test_other_values_of_the_options_do_not_trace_again():
    traces = []

    @jax.jit
    def counted(arrays, keys):
        traces.append(1)
        return jax.vmap(lambda key: augment.augment(key, IMAGE, **arrays))(keys)

    counted(options(), KEYS[:2])
    counted(options(flip_horizontal=1, rotation=5.0, shift=0.1, light=0.1), KEYS[:2])
    assert len(traces) == 1


def test_images_are_warped_only_if_an_option_asks_for_it(monkeypatch):
    """Also in a batch: otherwise the images of every category would be warped."""
    warp, calls = augment.warp, []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return warp(*args)

    monkeypatch.setattr(augment, "warp", counted)
    batch = jax.jit(lambda arrays: jax.vmap(lambda k: augment.augment(k, IMAGE, **arrays))(KEYS))
    for arrays, is_warped in ((options(light=0.1), False), (options(shift=0.1), True)):
        calls.clear()
        jax.block_until_ready(batch(arrays))
        jax.effects_barrier()
        assert bool(calls) == is_warped

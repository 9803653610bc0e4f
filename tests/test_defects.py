"""Synthetic defects: masks are exactly where the image changed; nothing but the key decides."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anoseg_jax.method import defects
from configs import default

OPTIONS = {kind: default.get_config().defects[kind].to_dict() for kind in defects.DEFECTS}
SIZES = [(32, 32), (17, 33)]


def photo(size, seed=0, grey=False):
    """A smooth coloured image with texture, so that moved pieces differ from what they cover."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([np.sin(rows / 5), np.cos(columns / 4), np.sin((rows + columns) / 7)], -1)
    image = np.clip(0.5 + 0.3 * image + 0.1 * rng.standard_normal(image.shape), 0, 1)
    image = image.mean(-1, keepdims=True).repeat(3, -1) if grey else image
    return jnp.asarray(image, jnp.float32)


@pytest.fixture(scope="module", params=[(kind, size) for kind in defects.DEFECTS for size in SIZES])
def operator(request):
    kind, size = request.param
    plain = partial(defects.DEFECTS[kind], **OPTIONS[kind])
    return jax.jit(plain), jax.jit(jax.vmap(plain, in_axes=(0, None))), size, OPTIONS[kind]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), grey=st.booleans())
def test_the_mask_is_exactly_where_the_image_changed(operator, seed, grey):
    jitted, _, size, options = operator
    image = photo(size, grey=grey)
    defective, mask = jitted(jax.random.key(seed), image)
    change = np.max(np.abs(np.asarray(defective) - np.asarray(image)), axis=-1)
    assert set(np.unique(mask)) <= {0.0, 1.0}
    np.testing.assert_array_equal(np.asarray(mask) == 1, change > 0)
    least = options["min_change"] * max(np.std(image), 0.02)
    assert np.all(change[np.asarray(mask) == 1] >= least - 1e-5)
    assert np.min(defective) >= 0 and np.max(defective) <= 1
    assert defective.shape == image.shape and defective.dtype == image.dtype


def test_one_image_alone_and_among_others_gets_the_same_defect(operator):
    jitted, mapped, size, _ = operator
    keys = jax.random.split(jax.random.key(3), 32)
    many = mapped(keys, photo(size))
    for index, key in enumerate(keys[:4]):
        image, mask = jitted(key, photo(size))
        # Rounding differs, and may put a pixel on the other side of min_change.
        same = np.asarray(mask == many[1][index])
        assert same.mean() > 0.998
        np.testing.assert_allclose(image[same], many[0][index][same], atol=1e-4)


def test_most_draws_leave_a_defect_and_no_two_are_alike(operator):
    _, mapped, size, _ = operator
    _, masks = mapped(jax.random.split(jax.random.key(0), 32), photo(size))
    shares = np.asarray(masks).mean(axis=(1, 2))
    assert np.mean(shares > 0) > 0.8
    assert len({mask.tobytes() for mask in np.asarray(masks)}) > 24
    assert np.median(shares) < 0.3


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_rotation_is_by_quarter_turns_where_the_image_is_square_else_by_half(size):
    image = photo(size)
    turns = range(1, 4) if size[0] == size[1] else [2]
    expected = {np.rot90(image, k).tobytes() for k in turns}
    keys = jax.random.split(jax.random.key(0), 20)
    assert {np.asarray(defects.rotate(key, image)).tobytes() for key in keys} == expected


@pytest.mark.parametrize(("size", "grid"), [((12, 12), 4), ((13, 18), 4), ((9, 6), 3)])
def test_permutation_moves_whole_patches_and_leaves_the_rest_in_place(size, grid):
    image = np.asarray(photo(size))
    shuffled = np.asarray(defects.permute(jax.random.key(1), jnp.asarray(image), grid=grid))
    h, w = size[0] // grid, size[1] // grid

    def patches(x):
        return [
            x[i * h : (i + 1) * h, j * w : (j + 1) * w].tobytes()
            for i in range(grid)
            for j in range(grid)
        ]

    assert patches(shuffled) != patches(image)
    assert sorted(patches(shuffled)) == sorted(patches(image))
    np.testing.assert_array_equal(shuffled[grid * h :], image[grid * h :])
    np.testing.assert_array_equal(shuffled[:, grid * w :], image[:, grid * w :])


def test_colour_jitter_keeps_grey_grey_and_changes_colours():
    jitter = partial(defects.jitter_color, brightness=0.3, contrast=0.3, saturation=0.5, hue=120.0)
    grey = jitter(jax.random.key(0), photo((8, 8), grey=True))
    np.testing.assert_allclose(grey, np.repeat(np.asarray(grey)[..., :1], 3, axis=-1), atol=1e-6)
    turned = defects.jitter_color(
        jax.random.key(2), photo((8, 8)), brightness=0.0, contrast=0.0, saturation=0.0, hue=120.0
    )
    assert np.max(np.abs(turned - photo((8, 8)))) > 0.05
    # A turn about the grey axis keeps the grey value, where nothing was clipped.
    inside = np.all((np.asarray(turned) > 0) & (np.asarray(turned) < 1), axis=-1)
    np.testing.assert_allclose(
        np.asarray(turned).mean(-1)[inside], np.asarray(photo((8, 8))).mean(-1)[inside], atol=1e-5
    )


def test_no_jitter_leaves_the_image_as_it_is():
    same = defects.jitter_color(
        jax.random.key(0), photo((8, 8)), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
    )
    np.testing.assert_allclose(same, photo((8, 8)), atol=1e-6)


def test_rectangles_have_the_areas_that_were_asked_for():
    part = jnp.ones((96, 128), bool)
    draw = jax.vmap(partial(defects.rectangle, part=part, area=(0.01, 0.04), aspect=4.0))
    regions = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    # Those that the edge does not cut.
    edges = regions[:, [0, -1]].any(axis=(1, 2)) | regions[:, :, [0, -1]].any(axis=(1, 2))
    areas = regions[~edges].mean(axis=(1, 2))
    assert len(areas) > 50
    assert 0.009 < areas.min() < 0.012 and 0.035 < areas.max() < 0.042


@pytest.mark.parametrize("preset", defects.PRESETS)
def test_the_asked_for_fraction_is_left_normal_and_equal_to_the_bit(preset):
    draw = partial(
        defects.synthesize, preset=preset, normal_fraction=0.5, on_object=True, options=OPTIONS
    )
    image = photo((32, 32))
    images, masks = jax.jit(jax.vmap(draw, in_axes=(0, None)))(
        jax.random.split(jax.random.key(0), 400), image
    )
    normal = ~np.asarray(masks).any(axis=(1, 2))
    assert 0.4 < normal.mean() < 0.65
    assert all(np.array_equal(x, image) for x in np.asarray(images)[normal])


def on_plain(size=(48, 48)):
    """A textured square in the middle of a plain grey image, and where it is."""
    inside = np.zeros(size, bool)
    inside[16:32, 16:32] = True
    image = np.where(inside[..., None], np.asarray(photo(size)) / 2, 0.8)
    return jnp.asarray(image, jnp.float32), inside


def test_the_object_is_found_on_a_plain_background_and_not_guessed_elsewhere():
    image, inside = on_plain()
    found = np.asarray(defects.find_object(image))
    assert np.all(found[inside]) and found.mean() < 2.5 * inside.mean()
    assert np.all(defects.find_object(photo((48, 48))))  # no background
    assert np.all(defects.find_object(jnp.full((48, 48, 3), 0.5)))  # nothing else


@pytest.mark.parametrize("kind", ["foreign_texture", "local_change"])
def test_random_shapes_keep_to_the_part(kind):
    image, inside = on_plain()
    draw = partial(defects.DEFECTS[kind], other=photo((48, 48), seed=1), **OPTIONS[kind])
    keys = jax.random.split(jax.random.key(0), 32)
    _, masks = jax.vmap(lambda key: draw(key, image, part=jnp.asarray(inside)))(keys)
    masks = np.asarray(masks) == 1
    assert masks.any() and not masks[:, ~inside].any()


def test_lines_and_rectangles_begin_in_the_part():
    _, inside = on_plain()
    part = jnp.asarray(inside)
    keys = jax.random.split(jax.random.key(0), 64)
    picks = np.asarray(jax.vmap(lambda key: defects.pick(key, part))(keys))
    rows, columns = np.floor(picks).astype(int).T
    assert inside[rows, columns].all() and len({*zip(rows, columns, strict=True)}) > 32
    short = partial(defects.curve, part=part, length=(0.01, 0.02), thickness=(0.02, 0.03))
    lines = np.asarray(jax.vmap(short)(keys)) > 0.5
    near = np.zeros_like(inside)
    near[13:35, 13:35] = True
    assert lines.any(axis=(1, 2)).all() and not lines[:, ~near].any()


def test_a_blob_is_as_small_as_its_depth():
    part = jnp.ones((64, 64), bool)
    keys = jax.random.split(jax.random.key(0), 64)
    shares = [
        np.median(
            jax.vmap(partial(defects.blob, part=part, depth=(depth, depth), softness=0.0))(
                keys
            ).mean(axis=(1, 2))
        )
        for depth in (0.1, 0.5, 2.0)
    ]
    assert 1 / 64**2 <= shares[0] < shares[1] < shares[2] < 0.6
    assert shares[0] < 0.01


def test_the_texture_is_the_other_images():
    other = jnp.zeros((48, 48, 3)).at[..., 0].set(1.0)  # red, wherever it is shifted to
    options = OPTIONS["foreign_texture"] | {"opacity": (1.0, 1.0), "softness": 0.0}
    draw = partial(defects.foreign_texture, **options | {"brightness": 0.0})
    image = jnp.full((48, 48, 3), 0.5)
    defective, mask = draw(jax.random.key(1), image, other=other)
    assert np.asarray(mask).any()
    red = np.asarray(defective)[np.asarray(mask) == 1]
    assert np.mean(red[:, 0] > red[:, 1:].max(axis=1)) > 0.9

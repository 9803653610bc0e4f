"""Synthetic defects: masks are exactly where the image changed; nothing but the key decides."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anoseg_jax.method import defects, shapes
from configs import default

CONFIG = default.get_config().defects.to_dict()
OPTIONS = {kind: CONFIG[kind] for kind in defects.DEFECTS}
SIZES = [(32, 32), (17, 33)]


def photo(size, seed=0, grey=False):
    """A smooth coloured image with texture, so that moved pieces differ from what they cover."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([np.sin(rows / 5), np.cos(columns / 4), np.sin((rows + columns) / 7)], -1)
    image = np.clip(0.5 + 0.3 * image + 0.1 * rng.standard_normal(image.shape), 0, 1)
    image = image.mean(-1, keepdims=True).repeat(3, -1) if grey else image
    return jnp.asarray(image, jnp.float32)


def local_contrast(image):
    """The standard deviation around each pixel, over 5x5 pixels (the images here are small)."""
    window = partial(ndimage.uniform_filter, size=(5, 5, 0), mode="nearest")
    return np.sqrt(window((image - window(image)) ** 2).max(axis=-1))


def uniforms(count, *shape, seed=0):
    """Random numbers in [0, 1), as the helpers take them: `count` times `shape`."""
    return jax.random.uniform(jax.random.key(seed), (count, *shape))


def apply(kind, key, image, **options):
    """Draws a defect: by default from the image itself, anywhere."""
    defaults = {"other": image, "allowed_region": jnp.ones(image.shape[:2], bool)}
    return defects.DEFECTS[kind](key, image, **OPTIONS[kind] | defaults | options)


@pytest.fixture(scope="module", params=[(kind, size) for kind in defects.DEFECTS for size in SIZES])
def operator(request):
    kind, size = request.param
    plain = partial(apply, kind)
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
    least = options["min_change"] * np.maximum(local_contrast(image), 0.06)
    assert np.all((change >= least - 1e-5)[np.asarray(mask) == 1])
    assert np.min(defective) >= 0 and np.max(defective) <= 1
    assert defective.shape == image.shape and defective.dtype == image.dtype


def test_one_image_alone_and_among_others_gets_the_same_defect(operator):
    jitted, mapped, size, _ = operator
    keys = jax.random.split(jax.random.key(3), 32)
    many = mapped(keys, photo(size))
    for index, key in enumerate(keys[:4]):
        image, mask = jitted(key, photo(size))
        # Rounding differs, and may put a pixel on the other side of min_change or of an edge.
        same = np.asarray(mask == many[1][index])
        assert np.mean(same & np.all(np.isclose(image, many[0][index], atol=1e-4), -1)) > 0.995


def test_most_draws_leave_a_defect_and_no_two_are_alike(operator):
    _, mapped, size, _ = operator
    _, masks = mapped(jax.random.split(jax.random.key(0), 32), photo(size))
    shares = np.asarray(masks).mean(axis=(1, 2))
    assert np.mean(shares > 0) > 0.8
    assert len({mask.tobytes() for mask in np.asarray(masks)}) > 24
    assert 0.003 < np.mean(shares) < 0.15 and np.median(shares) < 0.3


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_rotation_is_by_quarter_turns_where_the_image_is_square_else_by_half(size):
    image = photo(size)
    turns = range(1, 4) if size[0] == size[1] else [2]
    expected = {np.rot90(image, k).tobytes() for k in turns}
    rotated = jax.jit(jax.vmap(shapes.rotate, in_axes=(0, None)))(uniforms(64), image)
    counts = Counter(np.asarray(x).tobytes() for x in rotated)
    assert set(counts) == expected
    assert min(counts.values()) > 64 / len(expected) / 2


@pytest.mark.parametrize(("size", "grid"), [((12, 12), 4), ((13, 18), 4), ((9, 6), 3)])
def test_permutation_moves_whole_patches_and_leaves_the_rest_in_place(size, grid):
    image = np.asarray(photo(size))
    shuffled = np.asarray(shapes.permute(uniforms(grid**2), jnp.asarray(image), grid=grid))
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
    grey = shapes.jitter_color(uniforms(4), photo((8, 8), grey=True), (0.3, 0.3, 0.5, 120.0))
    np.testing.assert_allclose(grey, np.repeat(np.asarray(grey)[..., :1], 3, axis=-1), atol=1e-6)
    turned = shapes.jitter_color(jnp.full(4, 0.9), photo((8, 8)), (0.0, 0.0, 0.0, 120.0))
    assert np.max(np.abs(turned - photo((8, 8)))) > 0.05
    # A turn about the grey axis keeps the grey value, where nothing was clipped.
    inside = np.all((np.asarray(turned) > 0) & (np.asarray(turned) < 1), axis=-1)
    np.testing.assert_allclose(
        np.asarray(turned).mean(-1)[inside], np.asarray(photo((8, 8))).mean(-1)[inside], atol=1e-5
    )


def test_a_hue_of_120_degrees_permutes_the_channels():
    turned = shapes.jitter_color(jnp.ones(4), photo((8, 8)), (0.0, 0.0, 0.0, 120.0))
    np.testing.assert_allclose(turned, np.roll(photo((8, 8)), 1, axis=-1), atol=1e-5)


def test_brightness_contrast_and_saturation_change_what_they_are_named_for():
    image = 0.4 + 0.2 * photo((8, 8))  # nothing is clipped
    largest = jnp.ones(4)
    brighter = shapes.jitter_color(largest, image, (0.3, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(brighter, 1.3 * image, atol=1e-5)
    contrast = shapes.jitter_color(largest, image, (0.0, 0.5, 0.0, 0.0))
    np.testing.assert_allclose(contrast - image.mean(), 1.5 * (image - image.mean()), atol=1e-5)
    colorful = shapes.jitter_color(largest, image, (0.0, 0.0, 0.5, 0.0))
    grey = image.mean(-1, keepdims=True)
    np.testing.assert_allclose(colorful - grey, 1.5 * (image - grey), atol=1e-5)


def test_no_jitter_leaves_the_image_as_it_is():
    same = shapes.jitter_color(uniforms(4), photo((8, 8)), (0.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(same, photo((8, 8)), atol=1e-6)


def test_rectangles_have_the_areas_that_were_asked_for():
    whole = jnp.ones((96, 128), bool)
    draw = partial(shapes.rectangle, allowed_region=whole, area=(0.01, 0.04), aspect=4.0)
    regions = np.asarray(jax.jit(jax.vmap(draw))(uniforms(200, 4)))
    # Those that the edge does not cut.
    edges = regions[:, [0, -1]].any(axis=(1, 2)) | regions[:, :, [0, -1]].any(axis=(1, 2))
    areas = regions[~edges].mean(axis=(1, 2))
    assert len(areas) > 50
    assert 0.009 < areas.min() < 0.012 and 0.035 < areas.max() < 0.042


def synthesize(preset="default", **options):
    """A jitted, mapped `synthesize` of a preset and the arrays that it takes."""
    static, arrays = defects.split_options(CONFIG | {"preset": preset} | options)
    return partial(mapped_synthesize, static), arrays


@partial(jax.jit, static_argnums=0)
def mapped_synthesize(static, arrays, keys, image):
    """`synthesize` of one image with many keys; presets of the same kinds share one program."""
    draw = partial(defects.synthesize, other=image, static=static, arrays=arrays)
    return jax.vmap(draw, in_axes=(0, None))(keys, image)


@pytest.mark.parametrize("preset", ["default", "paper", "plain"])
def test_the_asked_for_fraction_is_left_normal_and_equal_to_the_bit(preset):
    draw, arrays = synthesize(preset, normal_fraction=0.5)
    image, keys = photo((32, 32)), jax.random.split(jax.random.key(0), 200)
    images, masks = draw(arrays, keys, image)
    normal = ~np.asarray(masks).any(axis=(1, 2))
    assert 0.4 < normal.mean() < 0.65
    assert all(np.array_equal(x, image) for x in np.asarray(images)[normal])
    _, masks = draw(arrays | {"normal_fraction": np.float32(1)}, keys, image)
    assert not np.asarray(masks).any()
    _, masks = draw(arrays | {"normal_fraction": np.float32(0)}, keys, image)
    assert np.asarray(masks).any(axis=(1, 2)).mean() > 0.85


def test_other_values_of_array_options_do_not_trace_again():
    static, arrays = defects.split_options(CONFIG)
    other = CONFIG | {"normal_fraction": 0.5, "on_object": False}
    other["local_change"] = CONFIG["local_change"] | {"amount": (1.0, 2.0), "min_change": 0.1}
    other_static, other_arrays = defects.split_options(other)
    assert static == other_static and hash(static) == hash(other_static)
    assert list(static) == list(other_static)
    traces = []

    @partial(jax.jit, static_argnames="static")
    def counted(key, arrays, static):
        traces.append(1)
        image = photo((16, 16))
        return defects.synthesize(key, image, other=image, static=static, arrays=arrays)

    counted(jax.random.key(0), arrays, static)
    counted(jax.random.key(0), other_arrays, other_static)
    assert len(traces) == 1


@pytest.mark.parametrize("preset", defects.PRESETS)
def test_options_are_split_by_what_shapes_the_program(preset):
    static, arrays = defects.split_options(CONFIG | {"preset": preset})
    kinds = list(defects.PRESETS[preset])
    assert list(static) == list(arrays["options"]) == kinds
    assert arrays["on_object"] == (preset == "default")
    for kind in kinds:
        assert set(static[kind]) == set(OPTIONS[kind]) & set(defects.STATIC_OPTIONS)
        assert set(static[kind]) | set(arrays["options"][kind]) == set(OPTIONS[kind])
    leaves = jax.tree.leaves(arrays)
    assert leaves and all(leaf.dtype == np.float32 for leaf in leaves)


def test_all_kinds_are_drawn_equally_often():
    draw, arrays = synthesize(normal_fraction=0.0, on_object=False)
    kinds = list(arrays["options"])
    image, keys = photo((32, 32)), jax.random.split(jax.random.key(0), 200)
    # A kind whose changes are never large enough leaves the image as it is: how often is it drawn?
    for kind in kinds:
        options = {
            name: values | {"min_change": np.float32(99.0 if name == kind else 1e-3)}
            for name, values in arrays["options"].items()
        }
        _, masks = draw(arrays | {"options": options}, keys, image)
        assert abs(np.mean(~np.asarray(masks).any(axis=(1, 2))) - 1 / len(kinds)) < 0.08


def test_defects_keep_to_the_object_only_if_asked_for_and_not_always():
    image, inside = on_plain()
    near = np.zeros_like(inside)
    near[12:36, 12:36] = True
    keys, outside = jax.random.split(jax.random.key(0), 200), {}
    static, arrays = defects.split_options(CONFIG | {"normal_fraction": 0.0})
    # Random shapes alone: the others start on the object and may leave it.
    only = FrozenDict({"foreign_texture": static["foreign_texture"]})
    for on_object in (0, 1):
        options = arrays | {"on_object": np.float32(on_object)}
        _, masks = mapped_synthesize(only, options, keys, image)
        outside[on_object] = (np.asarray(masks)[:, ~near] == 1).any(axis=1).mean()
    assert 0.01 < outside[1] < 0.2 and outside[0] > 0.4


def on_plain(size=(48, 48)):
    """A textured square in the middle of a plain grey image, and where it is."""
    inside = np.zeros(size, bool)
    inside[16:32, 16:32] = True
    image = np.where(inside[..., None], np.asarray(photo(size)) / 2, 0.8)
    return jnp.asarray(image, jnp.float32), inside


def test_the_object_is_found_on_a_plain_background_and_not_guessed_elsewhere():
    image, inside = on_plain()
    find_object = jax.jit(shapes.find_object)
    region = np.asarray(find_object(image))
    assert np.all(region[inside]) and region.mean() < 2.5 * inside.mean()
    assert np.all(find_object(photo((48, 48))))  # no background
    assert np.all(find_object(jnp.full((48, 48, 3), 0.5)))  # nothing else


@pytest.mark.parametrize("kind", ["foreign_texture", "local_change"])
def test_random_shapes_keep_to_the_allowed_region(kind):
    image, inside = on_plain()
    draw = partial(apply, kind, other=photo((48, 48), seed=1), allowed_region=jnp.asarray(inside))
    keys = jax.random.split(jax.random.key(0), 32)
    _, masks = jax.jit(jax.vmap(draw, in_axes=(0, None)))(keys, image)
    masks = np.asarray(masks) == 1
    assert masks.any() and not masks[:, ~inside].any()


def test_rectangles_start_in_the_allowed_region():
    _, inside = on_plain()
    region = jnp.asarray(inside)
    pick = jax.jit(jax.vmap(lambda uniform: shapes.pick(uniform, region)))
    picks = np.asarray(pick(uniforms(1024)))
    rows, columns = np.floor(picks).astype(int).T
    # All of the 256 pixels are equally likely.
    assert inside[rows, columns].all() and len({*zip(rows, columns, strict=True)}) > 240
    assert abs(rows.mean() - 23.5) < 0.5 and abs(columns.mean() - 23.5) < 0.5
    ends = pick(jnp.array([0.0, 1 - 2**-23]))
    np.testing.assert_array_equal(ends, [[16.5, 16.5], [31.5, 31.5]])


def test_a_blob_is_as_small_as_its_depth():
    draw = partial(shapes.blob, allowed_region=jnp.ones((64, 64), bool), softness=0.0)
    numbers = uniforms(64, shapes.BLOB_NUMBERS)
    blobs = jax.jit(lambda depth: jax.vmap(partial(draw, depth=(depth, depth)))(numbers))
    shares = [np.median(blobs(depth).mean(axis=(1, 2))) for depth in (0.1, 0.5, 2.0)]
    assert 1 / 64**2 <= shares[0] < shares[1] < shares[2] < 0.6
    assert shares[0] < 0.01


@pytest.mark.parametrize("size", [(48, 48), (20, 36)])
def test_smooth_noise_is_normalised_and_as_smooth_as_bicubic_enlargement(size):
    draw = partial(shapes.smooth_noise, size=size)
    fields = np.asarray(jax.jit(jax.vmap(draw))(uniforms(64, shapes.NOISE_NUMBERS)))
    np.testing.assert_allclose(fields.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(fields.std(axis=(1, 2)), 1, atol=1e-4)
    assert abs(np.mean(fields**3)) < 0.2  # symmetric
    for cells in shapes.OCTAVES:
        grid = np.random.default_rng(0).standard_normal((cells, 1)).astype(np.float32)
        expected = jax.image.resize(grid, (size[0], 1), "cubic", antialias=False)
        np.testing.assert_allclose(shapes.cubic_weights(size[0], cells) @ grid, expected, atol=1e-5)


@pytest.mark.parametrize("radius", [1, 3])
def test_box_blur_is_the_mean_over_a_square_with_the_edge_repeated(radius):
    image = np.asarray(photo((9, 12)))
    padded = np.pad(image, [(radius, radius)] * 2 + [(0, 0)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2, (0, 1))
    np.testing.assert_allclose(
        shapes.box_blur(jnp.asarray(image), radius=radius), windows.mean((-2, -1)), atol=1e-5
    )


def test_the_texture_is_the_other_images():
    other = jnp.zeros((48, 48, 3)).at[..., 0].set(1.0)  # red, wherever it is shifted to
    options = {"opacity": (1.0, 1.0), "softness": 0.0, "brightness": 0.0}
    image = jnp.full((48, 48, 3), 0.5)
    draw = jax.jit(partial(apply, "foreign_texture", other=other, **options))
    defective, mask = draw(jax.random.key(1), image)
    assert np.asarray(mask).any()
    red = np.asarray(defective)[np.asarray(mask) == 1]
    assert np.mean(red[:, 0] > red[:, 1:].max(axis=1)) > 0.9

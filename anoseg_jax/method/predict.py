"""From images to anomaly maps and image-level scores, on all devices."""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anoseg_jax.method import memory_bank, models
from anoseg_jax.method.memory_bank import MemoryBank, PatchGrid


class BankOptions(NamedTuple):
    """How the distances to the memory bank are measured and weighted; hashable.

    `distance_weights` are those of the fine and of the coarse distances in the map's logits.
    """

    grid: PatchGrid
    distance_weights: tuple[float, float]


def bank_options(options: Mapping[str, Any]) -> BankOptions:
    """Returns what prediction needs of `config.memory_bank`."""
    grid = PatchGrid(options["patch"], options["stride"])
    return BankOptions(grid, tuple(map(float, options["distance_weights"])))


def variables_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the generator's `params` and `memory_bank` from a checkpoint's state.

    `params` are the averaged weights; `memory_bank` is None if there is no bank.
    """
    return {"params": state["ema"], "memory_bank": memory_bank.from_dicts(state["memory_bank"])}


def image_scores(maps: Array, top_fraction: float) -> Array:
    """Returns the mean of each map's highest pixels, [b]: `top_fraction` of them, at least one.

    A defect is small: the mean of the whole map would hide it, and the single highest pixel is
    noise.
    """
    pixels = jnp.sort(maps.reshape(maps.shape[0], -1), axis=1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    return jnp.mean(pixels[:, -count:], axis=1)


def peak_over_median(logits: Array, top_fraction: float) -> Array:
    """Returns how far each map's highest pixels are above its median, in logits, [b].

    The median removes what raises a whole map, such as the light.
    """
    pixels = jnp.sort(logits.reshape(logits.shape[0], -1), axis=1)  # one sort for both
    count, half = max(1, round(top_fraction * pixels.shape[1])), pixels.shape[1] // 2
    # The number of pixels is even: height and width are.
    median = (pixels[:, half - 1] + pixels[:, half]) / 2
    return jnp.mean(pixels[:, -count:], axis=1) - median


def add_bank_distances(logits: Array, distances: Array, weights: Sequence[float]) -> Array:
    """Returns the logits [b, h, w] plus the weighted distances [b, rows, columns, 2], enlarged.

    Only prediction adds them. The head learns without, so that what it learns from synthetic
    defects cannot cancel the evidence of the memory bank.
    """
    weighted = weights[0] * distances[..., 0] + weights[1] * distances[..., 1]
    return logits + jax.image.resize(weighted, logits.shape, "bilinear")


def generator_logits(
    params: Any,
    bank: MemoryBank | None,
    images: Array,
    image_ids: Array | None = None,
    *,
    generator: nn.Module,
    options: BankOptions,
) -> tuple[Array, Array]:
    """Returns the logits of the anomaly maps [b, h, w] and the reconstructions [b, h, w, 3].

    `images` are float [b, h, w, 3] in [0, 1], of the bank's brightness (`memory_bank.to_float`). If
    they may be in the bank, give their `image_ids` int32 [b]: distances are then leave-one-out.
    """
    if bank is None:
        return generator.apply({"params": params}, images)
    distances = memory_bank.bank_distances(bank, images, image_ids, grid=options.grid)
    logits, reconstructions = generator.apply({"params": params}, images, distances)
    return add_bank_distances(logits, distances, options.distance_weights), reconstructions


def predict_fn(
    variables: Mapping[str, Any],
    images: Array,
    image_ids: Array | None = None,
    *,
    generator: nn.Module,
    options: BankOptions,
    top_fraction: float,
) -> tuple[Array, Array, Array]:
    """Returns anomaly maps [b, h, w], image-level scores [b] and reconstructions [b, h, w, 3].

    `images` are uint8 [b, h, w, 3]; for `variables` see `variables_of`, for `image_ids`
    `generator_logits`. All results are float32. Maps and reconstructions are in [0, 1], the latter
    clipped to it. Scores (`peak_over_median`) are at least 0.
    """
    params, bank = variables["params"], variables["memory_bank"]
    images = memory_bank.to_float(images, bank and bank.brightness)
    logits, reconstructions = generator_logits(
        params, bank, images, image_ids, generator=generator, options=options
    )
    scores = peak_over_median(logits, top_fraction)
    return nn.sigmoid(logits), scores, jnp.clip(reconstructions, 0, 1)


def feature_distance(observed: Sequence[Array], reconstructed: Sequence[Array]) -> Array:
    """Returns the distance of two pairs in the discriminator's features, [b]; 0 if equal.

    Both arguments have one array [b, h, w, c] per level. The distance is the root mean square
    difference of each level, averaged over the levels: squares keep the small errors of everything
    else from hiding a small defect.
    """
    differences = [
        a.astype(jnp.float32) - b.astype(jnp.float32)
        for a, b in zip(observed, reconstructed, strict=True)
    ]
    levels = [jnp.sqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3))) for x in differences]
    return jnp.mean(jnp.stack(levels), axis=0)


def detect_fn(
    params: Mapping[str, Any],
    images: Array,
    maps: Array,
    *,
    detector: nn.Module,
    discriminator: nn.Module,
) -> Array:
    """Returns the image-level detector's scores [b], float32, at least 0.

    `params` are those of the "detector" and of its "discriminator", and the "brightness" of the
    generator's memory bank, or None; `images` are uint8 [b, h, w, 3], `maps` the generator's.
    """
    images = memory_bank.to_float(images, params["brightness"])
    reconstructed = detector.apply({"params": params["detector"]}, images, maps)
    features = partial(discriminator.apply, {"params": params["discriminator"]}, features=True)
    return feature_distance(features(images, maps)[1], features(*reconstructed)[1])


def _put(array: Any, sharding: NamedSharding) -> Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(variables: Any) -> Any:
    """Returns variables as arrays on all devices of all processes, for `shard_over_devices`."""
    sharding = NamedSharding(Mesh(jax.devices(), ("batch",)), PartitionSpec())
    return jax.tree.map(lambda array: _put(array, sharding), variables)


@functools.cache
def shard_over_devices(
    function: Callable, batch_size: int | None = None, **options: Any
) -> Callable[..., Any]:
    """Returns a function of variables and arrays [b, ...], with the arrays split over all devices.

    The variables are those of `replicate`; arrays and results are numpy arrays. With `outputs=n`
    only the first n results are fetched. Batches are padded with copies of the last example: to
    `batch_size`, so that one program serves all batches up to it, or with None to a multiple of the
    devices. Every process must call it with the same arguments, and gets all results.

    `options` are passed on to `function`. Equal arguments share one compiled program.
    """
    mesh = Mesh(jax.devices(), ("batch",))
    replicated, sharded = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("batch"))
    )
    jitted = jax.jit(partial(function, **options), out_shardings=replicated)

    def call(variables: Any, *arrays: np.ndarray, outputs: int | None = None) -> Any:
        count = len(arrays[0])
        size = max(count, batch_size or 0)
        size += -size % mesh.size
        padded = [np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)]) for x in arrays]
        results = jitted(variables, *(_put(array, sharded) for array in padded))
        results = results if outputs is None else results[:outputs]
        return jax.tree.map(lambda result: np.asarray(result)[:count], results)

    return call


def sharded_predict_fn(
    config: Mapping[str, Any], *, batch_size: int | None = None, top_fraction: float | None = None
) -> Callable[..., Any]:
    """Returns the `predict_fn` of a config on all devices, see `shard_over_devices`.

    batch_size and top_fraction are those of `config["evaluate"]` unless given.
    """
    options = config["evaluate"]
    return shard_over_devices(
        predict_fn,
        batch_size or options["batch_size"],
        generator=models.create(config["model"], config["loss"])[0],
        options=bank_options(config["memory_bank"]),
        top_fraction=options["top_fraction"] if top_fraction is None else top_fraction,
    )


def sharded_detect_fn(
    config: Mapping[str, Any], *, batch_size: int | None = None
) -> Callable[..., Any]:
    """Returns the `detect_fn` of a config on all devices, see `sharded_predict_fn`."""
    detector, discriminator = models.create_detector(config["model"], config["detector"])
    size = batch_size or config["evaluate"]["batch_size"]
    return shard_over_devices(detect_fn, size, detector=detector, discriminator=discriminator)


def flops_per_image(variables: Any, config: Mapping[str, Any]) -> float:
    """Returns the floating-point operations of one image's map, as `models.count_flops` counts.

    `variables` are arrays or shapes, see `variables_of`.
    """
    generator, _ = models.create(config["model"], config["loss"])
    images = jax.ShapeDtypeStruct((1, *config["image_size"], 3), jnp.float32)
    options = bank_options(config["memory_bank"])
    function = partial(generator_logits, generator=generator, options=options)
    return models.count_flops(function, variables["params"], variables["memory_bank"], images)

"""Exports a trained model to ONNX, StableHLO or SavedModel, and checks it against the original.

An export takes uint8 images [b, h, w, 3] of the model's size, b is free, and gives the anomaly maps
[b, h, w] and the scores [b]. Weights, memory bank, preprocessing and scoring are inside; everything
is computed in float32.
"""

import importlib.resources
import io
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax import Array

from anoseg_jax import UsageError
from anoseg_jax.deploy import exported_predict
from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.evaluation import METRICS
from anoseg_jax.method import models, predict
from anoseg_jax.running import checkpoint, progress, versions
from anoseg_jax.running.files import write_bytes, write_text

MAX_DIFFERENCE = 1e-4
MAX_CHECKED = 32  # images of the parity check
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")

ExportFn = Callable[[Array], tuple[Array, Array]]


class ExportError(UsageError):
    """A model cannot be exported, or its export computes something else; one line."""


def export_fn(folder: Path) -> ExportFn:
    """Returns the model of a category folder as a pure function, with its weights inside.

    It maps uint8 images [b, h, w, 3] to maps [b, h, w] and scores [b], in float32.
    """
    saved = checkpoint.restore_newest(folder / "checkpoints")
    config = saved.config | {"model": saved.config["model"] | {"dtype": "float32"}}
    variables = predict.variables_of(saved.state)
    generator, _ = models.create(config["model"], config["loss"])
    how = {"generator": generator, "options": predict.bank_options(config["memory_bank"])}
    top_fraction = config["evaluate"]["top_fraction"]

    def maps_and_scores(images: Array) -> tuple[Array, Array]:
        return predict.predict_fn(variables, images, top_fraction=top_fraction, **how)[:2]

    if config["evaluate"]["image_score"] != "detector":
        return maps_and_scores
    saved = checkpoint.restore_newest(folder / "detector" / "checkpoints")
    bank = variables["memory_bank"]
    params = {
        "detector": saved.state["ema"],
        "discriminator": saved.state["discriminator"],
        "brightness": bank and bank.brightness,
    }
    detector, discriminator = models.create_detector(config["model"], config["detector"])

    def maps_and_detector_scores(images: Array) -> tuple[Array, Array]:
        maps, _ = maps_and_scores(images)
        networks = {"detector": detector, "discriminator": discriminator}
        return maps, predict.detect_fn(params, images, maps, **networks)

    return maps_and_detector_scores


def images_of_any_number(size: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """Returns the shape uint8 [b, h, w, 3] with a symbolic b."""
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {size[0]}, {size[1]}, 3"), jnp.uint8)


def write_stablehlo(function: ExportFn, size: tuple[int, int], path: Path) -> None:
    """Writes what `jax.export.deserialize` reads, for CPU, CUDA and TPU."""
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(images_of_any_number(size))
    write_bytes(path, bytes(exported.serialize()))


def write_onnx(function: ExportFn, size: tuple[int, int], path: Path) -> None:
    """Writes an ONNX file; needs jax2onnx."""
    import jax2onnx

    images = images_of_any_number(size)
    logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)  # types that it does not need
    # Traced before jax2onnx patches functions of jax: its patches do not know a symbolic size.
    traced = jax.make_jaxpr(function)(images)
    model = jax2onnx.to_onnx(
        lambda x: jax.core.eval_jaxpr(traced.jaxpr, traced.consts, x),
        [images],
        model_name="anoseg_jax",
        opset=18,
        input_names=["images"],
        output_names=["maps", "scores"],
    )
    # The shapes that jax2onnx notes behind a loop over images are wrong; runtimes infer their own.
    del model.graph.value_info[:]
    for graph in _subgraphs(model.graph):
        used = {output.name for output in graph.output} | _used_names(graph)
        kept = [constant for constant in graph.initializer if constant.name in used]
        del graph.initializer[:]  # ONNX Runtime warns of each that nothing uses
        graph.initializer.extend(kept)
    write_bytes(path, model.SerializeToString())


def _subgraphs(graph: Any) -> list[Any]:
    """Returns the bodies of the loops and branches of an ONNX graph."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return [attribute.g for attribute in attributes if attribute.HasField("g")]


def _used_names(graph: Any) -> set[str]:
    """Returns the names that the nodes of an ONNX graph take, also those in its subgraphs."""
    used = {name for node in graph.node for name in node.input}
    return used.union(*map(_used_names, _subgraphs(graph)))


def write_saved_model(function: ExportFn, size: tuple[int, int], path: Path) -> None:
    """Writes the folder of a TensorFlow SavedModel; needs TensorFlow."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    height, width = size
    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[f"b, {height}, {width}, 3"],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),
    )
    module = tf.Module()
    module.serve = tf.function(
        lambda images: dict(zip(("maps", "scores"), converted(images), strict=True)),
        input_signature=[tf.TensorSpec((None, height, width, 3), tf.uint8, "images")],
        autograph=False,
    )
    tf.saved_model.save(module, os.fspath(path), signatures={"serving_default": module.serve})


FORMATS = {"onnx": write_onnx, "stablehlo": write_stablehlo, "saved_model": write_saved_model}
# What a format needs beside the package.
NEEDS = {
    "onnx": 'ONNX needs the extra [onnx]: pip install -e ".[onnx]"',
    "saved_model": "a SavedModel needs TensorFlow: pip install tensorflow",
}


def photographs_to_check(predictor: Predictor, photographs: list[str]) -> np.ndarray:
    """Returns up to MAX_CHECKED images of the model's size, uint8 [n, h, w, 3].

    They are the given photographs; without any, those of the last evaluation. Raises ExportError if
    there are none.
    """
    if photographs:
        step = -(-len(photographs) // MAX_CHECKED)
        return np.stack([predictor.load(path).image for path in photographs[::step]])
    path = predictor.folder / "evaluation.npz"
    if path.exists():
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            images = arrays["image"]
        if len(images) and images.shape[1:3] == predictor.image_size:
            return images[:: -(-len(images) // MAX_CHECKED)]
    raise ExportError(
        "the parity check needs photographs, and there is no evaluation of the model to take them "
        "from: --mode=export ... FILE_OR_FOLDER ..."
    )


def differences(function: ExportFn, exported: Callable, images: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute differences of maps and of scores, one image or all at once."""
    reference = jax.jit(function)
    largest = np.zeros(2)
    for batch in (images[:1], images):
        pairs = zip(reference(batch), exported(batch), strict=True)
        largest = np.maximum(largest, [np.abs(np.asarray(a) - b).max() for a, b in pairs])
    return float(largest[0]), float(largest[1])


def export(predictor: Predictor, format_name: str, out: Path, photographs: list[str]) -> None:
    """Writes the model, model.json and predict.py to a folder, and compares their results.

    Args:
      predictor: the model.
      format_name: one of FORMATS.
      out: the folder.
      photographs: for the comparison; if empty, those of the last evaluation.

    Raises:
      ExportError: a package is missing, or maps or scores differ by more than MAX_DIFFERENCE.
    """
    images = photographs_to_check(predictor, photographs)
    out.mkdir(parents=True, exist_ok=True)
    path = out / exported_predict.LOADERS[format_name][0]
    with jax.default_matmul_precision("highest"):
        function = export_fn(predictor.folder)
        try:
            with progress.waiting(f"converting to {format_name}", "usually under half a minute"):
                FORMATS[format_name](function, predictor.image_size, path)
        except ImportError as error:
            raise ExportError(f"{NEEDS[format_name]} ({error})") from None
        exported = exported_predict.load_model(str(out), format_name)
        of_maps, of_scores = differences(function, exported, images)
    print(
        f"parity with JAX in float32 on {len(images)} images: maps differ by at most "
        f"{of_maps:.1e}, scores by {of_scores:.1e}"
    )
    if not max(of_maps, of_scores) <= MAX_DIFFERENCE:  # also of nan
        path.rmtree() if path.is_dir() else path.unlink()
        raise ExportError(f"{path}: differs by more than {MAX_DIFFERENCE:g}, so it was removed")
    parity = {"images": len(images), "maps": of_maps, "scores": of_scores}
    metadata = {"format": format_name} | describe(predictor) | {"parity": parity}
    write_text(out / "model.json", json.dumps(metadata, indent=2, allow_nan=False) + "\n")
    script = importlib.resources.files("anoseg_jax.deploy").joinpath("exported_predict.py")
    write_text(out / "predict.py", script.read_text())
    print(f"{path}, model.json and predict.py beside it")
    if metadata["contains_training_patches"]:
        print(
            "the model holds patches of its training photographs, which can be read out of it: "
            "pass it on only to those who may have these photographs"
        )


def describe(predictor: Predictor) -> dict[str, Any]:
    """Returns what is known of a model, as model.json has it."""
    config, metrics = predictor.model.config, {}
    if (predictor.folder / "results.json").exists():
        results = json.loads((predictor.folder / "results.json").read_text())["results"]
        metrics = {name: results.get(name) for name in METRICS}
    return {
        "category": predictor.folder.name,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "layout": "NHWC, RGB, any number of images",
            "size": list(predictor.image_size),
            "resize": "Pillow's bilinear (antialiased), after EXIF orientation",
        },
        "outputs": {
            "maps": "float32 [b, h, w] from 0 to 1, 1 is anomalous",
            "scores": "float32 [b] from 0 up; score / (score + thresholds.image) is from 0 to 1",
        },
        "bit_depth": predictor.reading.bit_depth,
        "image_score": config["evaluate"]["image_score"],
        "thresholds": predictor.thresholds._asdict(),
        "threshold_sources": predictor.threshold_sources,
        "contains_training_patches": bool(config["memory_bank"]["size"]),
        "weights_sha256": predictor.model.weights_sha256,
        "steps": predictor.model.step,
        "metrics": metrics,
        "versions": versions.versions(PACKAGES),
    }

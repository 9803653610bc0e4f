"""Predicts photographs with an exported model: python predict.py PHOTO ... [--out=DIR]

Needs numpy, pillow and the runtime of the model: onnxruntime for ONNX, jax and flatbuffers for
StableHLO, tensorflow for SavedModel. A model with a memory bank holds patches of its training
photographs: whoever has it can read them out of it.
"""

import argparse
import json
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

FOLDER = os.path.dirname(os.path.abspath(__file__))


def load_onnx(path: str) -> Callable:
    """Returns the model as a function, computed by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["maps", "scores"], {"images": images})


def load_stablehlo(path: str) -> Callable:
    """Returns the model as a function, computed by JAX."""
    import jax.export

    with open(path, "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    call = jax.jit(exported.call)
    return lambda images: tuple(map(np.asarray, call(images)))


def load_saved_model(path: str) -> Callable:
    """Returns the model as a function, computed by TensorFlow."""
    import tensorflow as tf

    call = tf.saved_model.load(path).signatures["serving_default"]

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = call(tf.constant(images))
        return outputs["maps"].numpy(), outputs["scores"].numpy()

    return run


LOADERS = {
    "onnx": ("model.onnx", load_onnx),
    "stablehlo": ("model.stablehlo", load_stablehlo),
    "saved_model": ("saved_model", load_saved_model),
}


def load_model(folder: str, name: str) -> Callable:
    """Returns the model: uint8 images [b, h, w, 3] to maps [b, h, w] in [0, 1] and scores [b]."""
    file, load = LOADERS[name]
    return load(os.path.join(folder, file))


def read_photograph(path: str, size: tuple[int, int], bit_depth: int | None) -> np.ndarray:
    """Returns a photograph as training read it: upright, 8 bits, RGB, resized to (height, width).

    `bit_depth` is the one that the model was trained with; None: the whole range of the file.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image).astype(np.float64)
            top = 2 ** (bit_depth or (1 if image.mode == "F" else 16)) - 1
            if not (values.min() >= 0 and values.max() <= top):
                raise ValueError(f"{path}: has values outside of 0 to {top}")
            image = Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))
        image = image.convert("RGB")
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.array(image)


def main() -> None:
    """Prints file, score and verdict of each photograph; with --out also writes its map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="+")
    parser.add_argument("--out", help="folder for the anomaly maps: 16-bit grey PNG, 65535 is 1")
    arguments = parser.parse_args()
    with open(os.path.join(FOLDER, "model.json"), encoding="utf-8") as file:
        metadata = json.load(file)
    threshold = metadata["thresholds"]["image"]
    predict = load_model(FOLDER, metadata["format"])
    for path in arguments.photographs:
        image = read_photograph(path, metadata["input"]["size"], metadata["bit_depth"])
        maps, scores = predict(image[None])
        verdict = "" if threshold is None else "good" if scores[0] < threshold else "defective"
        print(f"{path}\t{scores[0]:.4f}\t{verdict}")
        if arguments.out:
            os.makedirs(arguments.out, exist_ok=True)
            values = np.round(65535 * maps[0]).astype(np.uint16)
            name = os.path.basename(path) + ".png"
            Image.fromarray(values).save(os.path.join(arguments.out, name))


if __name__ == "__main__":
    main()

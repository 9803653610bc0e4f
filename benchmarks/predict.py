"""Measures prediction: seconds to the first one, images a second, latency; JAX and ONNX Runtime.

python benchmarks/predict.py --workdir=W/bolt [--onnx=EXPORT] PHOTO_OR_FOLDER ...

EXPORT is the folder of --mode=export --format=onnx. Prints a table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from anoseg_jax.deploy import exported_predict  # noqa: E402
from anoseg_jax.deploy.photographs import Photographs  # noqa: E402
from anoseg_jax.deploy.predictor import Predictor  # noqa: E402

FIRST = """
import time
began = time.monotonic()
from anoseg_jax.deploy.predictor import Predictor
predictor = Predictor({workdir!r})
predictor({path!r})
first = time.monotonic()
predictor({path!r})
print(first - began, time.monotonic() - first)
"""
FIRST_ONNX = """
import time
began = time.monotonic()
from anoseg_jax.deploy import exported_predict
run = exported_predict.load_model({folder!r}, "onnx")
photograph = lambda: exported_predict.read_photograph({path!r}, {size!r}, None)[None]
run(photograph())
first = time.monotonic()
run(photograph())
print(first - began, time.monotonic() - first)
"""


def measure_first(script: str, cache: str) -> tuple[float, float]:
    """Returns the seconds from the import to the first prediction, and those of the second."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    return first, second


def latency(predict: Callable[[str], object], paths: list[str]) -> str:
    """Returns median and 99th percentile of the milliseconds for one photograph at a time."""
    times = []
    for index in range(200):
        began = time.monotonic()
        predict(paths[index % len(paths)])
        times.append(time.monotonic() - began)
    median, late = 1000 * np.percentile(times[5:], (50, 99))
    return f"{median:.1f} ms, {late:.1f} ms"


def images_a_second(predict: Callable[[list[str]], object], paths: list[str]) -> str:
    """Returns the photographs a second of a call with all of them."""
    began = time.monotonic()
    predict(paths)
    return f"{len(paths) / (time.monotonic() - began):.1f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="+")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--onnx", help="folder of an ONNX export of the same model")
    arguments = parser.parse_args()
    paths = Photographs(arguments.photographs).list()
    print("| what | value |\n|---|---|")

    script = FIRST.format(workdir=arguments.workdir, path=paths[0])
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            first, second = measure_first(script, cache)
            print(
                f"| JAX, {name}: import to first prediction, second call | {first:.1f} s, ", end=""
            )
            print(f"{1000 * second:.0f} ms |")
    for batch_size in (None, 1):
        predictor = Predictor(arguments.workdir, batch_size=batch_size)
        predictor.warm_up()
        name = f"JAX, batch_size={predictor.batch_size}"
        print(f"| {name}: one photograph, median and 99th percentile | ", end="")
        print(f"{latency(predictor, paths)} |")
        print(f"| {name}: photographs a second | {images_a_second(predictor, paths)} |")
    if arguments.onnx:
        size = predictor.image_size
        first, second = measure_first(
            FIRST_ONNX.format(folder=arguments.onnx, path=paths[0], size=size), ""
        )
        print("| ONNX Runtime: import to first prediction, second call | ", end="")
        print(f"{first:.1f} s, {1000 * second:.0f} ms |")
        run = exported_predict.load_model(arguments.onnx, "onnx")

        def predict(path: str) -> object:
            return run(exported_predict.read_photograph(path, size, None)[None])

        print("| ONNX Runtime: one photograph, median and 99th percentile | ", end="")
        print(f"{latency(predict, paths)} |")
        rate = images_a_second(lambda paths: [predict(path) for path in paths], paths)
        print(f"| ONNX Runtime: photographs a second, one at a time | {rate} |")


if __name__ == "__main__":
    main()

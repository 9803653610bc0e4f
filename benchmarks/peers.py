"""A peer that needs nothing but scikit-learn: nearest neighbours of raw patches, as .npy maps.

    python benchmarks/peers.py --data_dir DIR --categories screw --seconds 60 --out MAPS

Remembers random 8x8 patches of the good images, reduced by PCA; how far a test image's patch is
from its nearest ones is its anomaly. `--seconds` is CPU seconds a category, of all threads, for
learning and for all maps: the memory is made as large as that allows. Then, by our rules:

    python launch.py --mode=evaluate --config=configs/cpu.py:screw --config.data_dir=DIR \\
        --config.maps_dir=MAPS --workdir=W
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.images import (
    decode,  # noqa: E402
    layout,  # noqa: E402
)

PATCH, STRIDE, COMPONENTS, NEIGHBOURS, SIGMA = 8, 4, 32, 3, 2.0
SAMPLE = 100_000  # patches that the PCA is made of
LEAST, MOST = 1_000, 1_000_000  # patches in the memory


def cut(image: np.ndarray, stride: int) -> np.ndarray:
    """Returns the patches of an image uint8 [h, w, 3]: float32 [rows, columns, d] in [0, 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH, 3))
    windows = windows[::stride, ::stride, 0]
    return windows.reshape(*windows.shape[:2], -1) / np.float32(255)


def draw_patches(images: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns about `count` patches from everywhere, as many of each image: float32 [n, d]."""
    found = []
    for image in images:
        patches = cut(image, 1)
        patches = patches.reshape(-1, patches.shape[-1])
        share = min(len(patches), -(-count // len(images)))
        found.append(patches[rng.choice(len(patches), share, replace=False)])
    return np.concatenate(found)


def distances(image: np.ndarray, pca: PCA, memory: NearestNeighbors) -> np.ndarray:
    """Returns an image's anomaly map, float32 [h, w]."""
    patches = cut(image, STRIDE)
    reduced = pca.transform(patches.reshape(-1, patches.shape[-1]))
    found, _ = memory.kneighbors(reduced)
    cells = found.mean(axis=1).reshape(patches.shape[:2]).astype(np.float32)
    h, w = image.shape[:2]
    # A cell lies in the middle of its patch; the border has the value of the nearest one.
    inner = (STRIDE * (cells.shape[1] - 1) + 1, STRIDE * (cells.shape[0] - 1) + 1)
    enlarged = np.asarray(Image.fromarray(cells).resize(inner, Image.Resampling.BILINEAR))
    top, left = (h - enlarged.shape[0]) // 2, (w - enlarged.shape[1]) // 2
    around = ((top, h - enlarged.shape[0] - top), (left, w - enlarged.shape[1] - left))
    return ndimage.gaussian_filter(np.pad(enlarged, around, "edge"), SIGMA * h / 128)


def remember(patches: np.ndarray) -> NearestNeighbors:
    """Returns a memory of reduced patches."""
    return NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(patches)


def run(category: layout.Category, size: tuple[int, int], seconds: float, out: Path) -> None:
    """Learns a category and writes its maps within about `seconds` of CPU time."""

    def read(examples: tuple[layout.Example, ...]) -> list[np.ndarray]:
        images = (
            layout.load(example, bit_depth=category.bit_depth)["image"] for example in examples
        )
        return [decode.resize_image(image, size) for image in images]

    train, test = read(category.train), read(category.test)
    rng = np.random.default_rng(0)
    began = time.process_time()
    sample = draw_patches(train, SAMPLE, rng)
    pca = PCA(min(COMPONENTS, *sample.shape), svd_solver="covariance_eigh").fit(sample)
    # What an image costs a remembered patch, from a small memory and one ten times as large.
    costs = []
    for count in (1_000, 10_000):
        memory = remember(pca.transform(sample[rng.permutation(len(sample))[:count]]))
        probe = time.process_time()
        for image in train[:3]:
            distances(image, pca, memory)
        costs.append((time.process_time() - probe) / len(train[:3]))
    fixed, slope = costs[0], max((costs[1] - costs[0]) / 9_000, 1e-9)
    left = 0.9 * (seconds - (time.process_time() - began)) / max(1, len(test)) - fixed
    count = int(np.clip(left / slope, LEAST, MOST))
    memory = remember(pca.transform(draw_patches(train, count, rng)))
    for example, image in zip(category.test, test, strict=True):
        folder = out / category.name / Path(example.name).parent.name
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{Path(example.name).stem}.npy", distances(image, pca, memory))
    spent = time.process_time() - began
    print(
        f"{category.name}: {len(train)} good images, memory of {memory.n_samples_fit_} patches, "
        f"{len(test)} maps in {spent:.1f} CPU seconds of {seconds:g}"
    )


def main() -> None:
    """Reads the arguments and writes the maps of every category."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="holds the category folders")
    parser.add_argument("--categories", default="all", help="names with commas, or all")
    parser.add_argument("--image_size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds a category")
    parser.add_argument("--out", type=Path, required=True, help="where the maps are written")
    arguments = parser.parse_args()
    categories = layout.scan_categories(arguments.data_dir, tuple(arguments.categories.split(",")))
    layout.require_usable(categories)
    for category in categories:
        run(category, 2 * (arguments.image_size,), arguments.seconds, arguments.out)


if __name__ == "__main__":
    main()

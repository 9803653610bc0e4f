"""Measures what the light does to a model: how it differs between the splits, and if it changes.

python benchmarks/light.py --config=configs/cpu.py:screw --config.data_dir=DIR --workdir=W

For a finished run in W with the same config. Prints two tables. The first has AUROCs, for the
image's mean brightness and contrast, the PCA baseline and the model: of defective test images
against good ones (the image AUROC), of defective test images against good images that were held out
of training, and of good test images against those. Where the last is far from 0.5, the first also
measures light. The second has the model's image AUROC and what is flagged at its image threshold if
the light of all test images changes.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax import options  # noqa: E402
from anoseg_jax.deploy.trained_model import TrainedModel  # noqa: E402
from anoseg_jax.evaluation import (
    baselines,  # noqa: E402
    evaluate,
)
from anoseg_jax.images import (
    batches,  # noqa: E402
    input_pipeline,
)
from anoseg_jax.method import predict  # noqa: E402
from data import sources  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Options of the run.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


# Changes of the light: images in [0, 1] and their means to images.
CHANGES = {
    "as they are": lambda images, means: images,
    "gamma 1.1": lambda images, means: images**1.1,
    "gamma 0.9": lambda images, means: images**0.9,
    "10 % more contrast": lambda images, means: means + 1.1 * (images - means),
    "10 % less contrast": lambda images, means: means + 0.9 * (images - means),
    "10 % darker": lambda images, means: 0.9 * images,
    "3 % more red": lambda images, means: images * np.array([1.03, 1, 1]),
}


def auroc(lower: np.ndarray, higher: np.ndarray) -> str:
    """Returns the AUROC of the scores [m] of `higher` against the scores [n] of `lower`."""
    labels = np.repeat([0, 1], [len(lower), len(higher)])
    return f"{roc_auc_score(labels, np.concatenate([lower, higher])):.3f}"


def main(_):
    """Prints a table for each category."""
    config = CONFIG.value
    splits = sources.open_splits(
        config.dataset, config.categories, data_dir=config.data_dir, tfds_dir=config.tfds_dir
    )
    for category, of_category in splits.items():
        config = options.of_category(CONFIG.value, category)
        predictor = TrainedModel(Path(WORKDIR.value) / category)
        images = input_pipeline.load_arrays(of_category.train, config.image_size)["image"]
        kept, held_out = batches.hold_out(
            batches.assign_image_ids(images), fraction=config.held_out, seed=config.seed
        )
        test = input_pipeline.load_arrays(of_category.test, config.image_size)

        def pca_patches(x, train=images[kept], fraction=config.evaluate.top_fraction):
            maps = baselines.pca_patches(train, x)
            return np.asarray(predict.image_scores(jnp.asarray(maps), fraction))

        scores = {
            "mean brightness": lambda images: images.mean(axis=(1, 2, 3)),
            "contrast": lambda images: images.std(axis=(1, 2, 3)),
            "PCA of patches": pca_patches,
            "model": lambda images, predictor=predictor: predictor(images)[1],
        }
        print(f"\n{category}, AUROC of | defective / good | defective / held out | good / held out")
        for name, score in scores.items():
            of_held_out, of_test = score(images[held_out]), score(test["image"])
            good, defective = of_test[test["label"] == 0], of_test[test["label"] == 1]
            pairs = (good, defective), (of_held_out, defective), (of_held_out, good)
            print(name, *(auroc(*pair) for pair in pairs), sep=" | ")

        threshold = predictor.record["thresholds"]["image"]
        if threshold["threshold"] is None:
            print(f"{category}: no image threshold, {threshold['how']}: light not changed")
            continue
        images, labels = test["image"] / 255, test["label"]
        means = images.mean(axis=(1, 2, 3), keepdims=True)
        print(f"\n{category}, if the light changes | image AUROC | false alarms | defective found")
        for name, change in CHANGES.items():
            changed = (255 * change(images, means).clip(0, 1)).round().astype(np.uint8)
            of_test = predictor(changed)[1]
            verdicts = evaluate.image_verdicts(of_test, labels, threshold["threshold"])
            false_alarms = verdicts["false_alarms"] / verdicts["good_images"]
            rates = f"{false_alarms:.3f} | {verdicts['recall']:.3f}"
            print(name, auroc(of_test[labels == 0], of_test[labels == 1]), rates, sep=" | ")


if __name__ == "__main__":
    app.run(main)

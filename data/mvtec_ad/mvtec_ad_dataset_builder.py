"""TFDS builder of MVTec AD, one builder config a category."""

import sys
from pathlib import Path

import tensorflow_datasets as tfds

# `tfds build` imports this file with neither the working directory nor the repository's root on
# the path; `data` lies in the latter.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from anoseg_jax.images import layout  # noqa: E402
from data import features  # noqa: E402
from data.mvtec_ad import CATEGORIES  # noqa: E402


class Builder(tfds.core.GeneratorBasedBuilder):
    """MVTec AD: photographs of industrial parts, good ones to train on, defective ones to find."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    BUILDER_CONFIGS = features.configs(CATEGORIES)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Get mvtec_anomaly_detection.tar.xz from
    https://www.mvtec.com/company/research/datasets/mvtec-ad (fill in the form; licence:
    CC BY-NC-SA 4.0, no commercial use). Its SHA-256 is
    cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d.
    Unpack it into the manual directory, so that this holds the category folders
    (bottle/, cable/, ...) or a folder mvtec_anomaly_detection/ or mvtec_ad/ with them.
    A folder with only some of the categories will do for these.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features.features(),
            # The bit depth of the files, `images.decode.read_image`, is filled in with the images.
            metadata=tfds.core.MetadataDict(bit_depth=8),
            supervised_keys=("image", "label"),
            homepage="https://www.mvtec.com/company/research/datasets/mvtec-ad",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        root = dl_manager.manual_dir
        for name in ("mvtec_anomaly_detection", "mvtec_ad"):
            if (root / name).is_dir():
                root = root / name
        categories = layout.scan_categories(root, (self.builder_config.name,))
        layout.require_usable(categories)
        (category,) = categories
        if any(example.ignore for example in (*category.train, *category.test)):
            raise layout.LayoutError(
                f"{category.root}: has masks of pixels to ignore, which a TFDS data set does not "
                "hold: read the folder itself, --config.dataset=folder"
            )
        self.info.metadata["bit_depth"] = category.bit_depth
        return {
            "train": self._generate_examples(category.train, category.bit_depth),
            "test": self._generate_examples(category.test, category.bit_depth),
        }

    def _generate_examples(self, examples: tuple[layout.Example, ...], bit_depth: int):
        for example in examples:
            yield example.name, features.encode(layout.load(example, bit_depth=bit_depth))

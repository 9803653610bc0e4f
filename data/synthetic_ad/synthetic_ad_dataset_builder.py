"""TFDS builder of generated industrial parts, one builder config a category. Needs no files."""

import contextlib
import io
import sys
from pathlib import Path

import tensorflow_datasets as tfds

# `tfds build` imports this file with neither the working directory nor the repository's root on
# the path; `data` lies in the latter.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from data import features  # noqa: E402
from data.synthetic_ad import drawing  # noqa: E402


class Builder(tfds.core.GeneratorBasedBuilder):
    """Drawn parts and their defects: the same bytes each time, for demos and tests."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    BUILDER_CONFIGS = features.configs(drawing.CATEGORIES)

    def download_and_prepare(self, **kwargs) -> None:
        """Prepares the data set, without TFDS's messages about a download: there is none."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().download_and_prepare(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features.features(), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # Nothing to download.
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str):
        for example in drawing.examples(self.builder_config.name, split):
            del example["twin"]
            yield example["name"], features.encode(example)

"""Everything but checkpoints works on an object store (gs://), and through TensorFlow's files."""

import ast
import csv
import io
import json
from pathlib import Path as LocalPath

import fsspec
import numpy as np
import pytest
import tiny_config
from etils import epath
from etils.epath import backend
from etils.epath.testing import mock_epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tqdm import tqdm

from anoseg_jax import experiment
from anoseg_jax.evaluation import results
from anoseg_jax.images import decode, layout
from anoseg_jax.report import compare
from anoseg_jax.running import train_log
from data import sources

ROOT = LocalPath(__file__).resolve().parents[2]


class Bucket(MemoryFileSystem):
    """An object store in memory; nothing of it is on the disk."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), "objects are read or written, whole"
        return super()._open(path, mode, **options)


fsspec.register_implementation("gcs", Bucket, clobber=True)


def through_tensorflow(name):
    """Returns TensorFlow's function in place of epath's."""
    return lambda original, *args, **options: getattr(backend.tf_backend, name)(*args, **options)


@pytest.fixture(params=["gs://", "tensorflow"])
def root(request, tmp_path):
    """An empty folder of an object store, or one behind TensorFlow's interface to these."""
    if request.param == "gs://":
        Bucket.store.clear()
        Bucket.pseudo_dirs[:] = [""]
        yield epath.Path("gs://bucket")
        return
    names = "copy exists glob isdir listdir makedirs mkdir open remove rename replace rmtree stat"
    with mock_epath(**{name: through_tensorflow(name) for name in names.split()}):
        yield epath.Path(tmp_path)


def write_image(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    path.write_bytes(png.getvalue())


def write_data(root):
    """Writes a category, and a map of each test image."""
    rng = np.random.default_rng(0)
    bolt, maps = root / "data" / "bolt", root / "maps" / "bolt"
    lines = []
    for index in range(3):
        write_image(bolt / f"train/good/{index}.png", rng.integers(90, 160, (32, 32, 3), np.uint8))
        for kind in ("good", "hole"):
            image, mask = rng.integers(90, 160, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
            if kind == "hole":
                mask[8:16, 4:20] = 255
                write_image(bolt / f"ground_truth/hole/{index}_mask.png", mask)
            write_image(bolt / f"test/{kind}/{index}.png", image)
            values = io.BytesIO()
            np.save(values, rng.random((32, 32)) + mask / 255)
            (maps / kind).mkdir(parents=True, exist_ok=True)
            (maps / kind / f"{index}.npy").write_bytes(values.getvalue())
            lines.append(f"test/{kind}/{index}.png,{index}")
    (maps / "scores.csv").write_text("name,score\n" + "\n".join(lines))


def run(root, workdir):
    config = tiny_config.get_config()
    config.update({"data_dir": str(root / "data"), "maps_dir": str(root / "maps")})
    config.evaluate.baselines = False
    splits = sources.open_splits(config.dataset, config.categories, data_dir=config.data_dir)
    return experiment.run(config, workdir, splits, training=False, command="c")


def test_images_are_read_and_results_pages_and_comparisons_written(root):
    write_data(root)
    (category,) = layout.scan_categories(root / "data", ("all",))
    assert not category.errors and not category.ignored and len(category.test) == 6
    for _ in range(2):  # the second time replaces what is there
        assert run(root, root / "run") == []
    folder = root / "run" / "bolt"
    written = json.loads((root / "run" / "results.json").read_text())
    assert written["categories"]["bolt"]["pixel_auroc"] > 0.9
    assert len(list(csv.DictReader(io.StringIO((folder / "images.csv").read_text())))) == 6
    names = {path.name for path in folder.iterdir()}
    assert names >= {"results.json", "evaluation.npz", "pictures", "report.html"}
    pictures = sorted((folder / "pictures").iterdir())
    assert len(pictures) >= 2 and pictures[0].read_bytes().startswith(b"\x89PNG")
    # Six test images: four panels each in the gallery, and a pair each among the highlights.
    assert (folder / "report.html").read_text().count("data:image/jpeg") == 6 * (4 + 2)
    comparison = compare.compare([str(root / "run")] * 2, bootstrap=10)
    (difference,) = comparison["categories"]["bolt"]["differences"].values()
    assert difference["pixel_auroc"]["value"] == 0
    assert difference["pixel_auroc"]["interval"] == [0, 0]
    compare.write(comparison, root / "compared")
    assert "| bolt |" in (root / "compared" / "comparison.md").read_text()
    assert not [path for path in (*folder.iterdir(), *root.iterdir()) if "tmp" in path.name]


def test_a_damaged_or_missing_file_is_named(root):
    write_data(root)
    broken = root / "data" / "bolt" / "train" / "good" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(layout.LayoutError, match=f"{broken}: is damaged or cut short"):
        decode.read_image(broken)
    broken.unlink()
    with pytest.raises(layout.LayoutError, match=f"{broken}: cannot be opened"):
        decode.read_image(broken)
    with pytest.raises(results.ResultsError, match="none has no results.json"):
        compare.compare([str(root / "none"), str(root / "none")])


def test_the_log_grows_and_is_cut_at_a_step(root):
    path = root / "train_log.jsonl"
    bar = tqdm(disable=True)
    for step in (2, 4, 6):
        train_log.write_line(path, {"step": step, "loss_segmentation": 0.5}, bar, 6)
    train_log.keep_until(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_paths_are_those_of_epath_and_files_are_not_opened_otherwise():
    paths = {*ROOT.glob("anoseg_jax/**/*.py"), *ROOT.glob("data/*.py"), ROOT / "launch.py"}
    # Copied beside exported models; needs nothing but numpy and pillow.
    for path in paths - {ROOT / "anoseg_jax" / "deploy" / "exported_predict.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pathlib", "shutil", "glob", "os.path"), where
            elif isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pathlib", "shutil", "glob"}, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", where

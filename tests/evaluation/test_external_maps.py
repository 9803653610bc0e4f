"""Reading anomaly maps of other methods: file formats, names, and one-line errors."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from anoseg_jax.evaluation import external_maps

NAMES = ["test/good/0.png", "test/hole/0.png", "test/hole/a.b.JPG"]


@pytest.fixture
def folder(tmp_path):
    """A map for each of NAMES."""
    for path in ("good/0.npy", "hole/0.tiff", "hole/a.b.tif"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        values = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
        if path.endswith("npy"):
            np.save(tmp_path / path, values.astype(np.float64)[None, :, :, None])
        else:
            Image.fromarray(values).save(tmp_path / path)
    return tmp_path


def test_maps_are_read_from_all_formats(folder):
    (folder / "hole" / "0.png").write_bytes(b"no map")
    for values in external_maps.read_maps(folder, NAMES):
        np.testing.assert_array_equal(values, np.arange(12.0).reshape(3, 4) - 5)
        assert values.dtype == np.float32


def test_a_png_of_16_bits_is_a_map_where_there_is_no_other_file(folder):
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    (folder / "hole" / "0.tiff").unlink()
    Image.fromarray(values).save(folder / "hole" / "0.png")
    Image.fromarray(values).save(folder / "good" / "0.png")  # beside 0.npy
    maps = external_maps.read_maps(folder, NAMES)
    np.testing.assert_array_equal(maps[1], values)
    np.testing.assert_array_equal(maps[0], np.arange(12.0).reshape(3, 4) - 5)
    for picture in (values.astype(np.uint8), np.zeros((3, 4, 3), np.uint8)):
        Image.fromarray(picture).save(folder / "hole" / "0.png")
        with pytest.raises(
            external_maps.MapsError, match="0.png: is uint8 .*: a PNG that is a map"
        ):
            external_maps.read_maps(folder, NAMES)


def test_names_match_in_any_unicode_form(tmp_path):
    (tmp_path / "riß").mkdir()
    np.save(tmp_path / "riß" / unicodedata.normalize("NFD", "ü.npy"), np.zeros((2, 2)))
    assert len(external_maps.read_maps(tmp_path, ["test/riß/ü.png"])) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 4, 5)), r"has shape \[3, 4, 5\] and type float64; a map is numbers \[h, w\]"),
        (np.zeros(4), r"has shape \[4\]"),
        (np.zeros((0, 0)), r"has shape \[0, 0\]"),
        (np.zeros((3, 4), complex), "type complex128"),
        (np.array([[1, np.nan], [np.inf, 0]]), "2 of 4 values are not finite"),
        (np.full((2, 2), 1e300), "4 of 4 values are not finite in float32"),
        (np.array([[None]]), "cannot be read .*: save it as .npy"),
    ],
)
def test_invalid_maps_are_refused(folder, values, message):
    np.save(folder / "good" / "0.npy", values)
    with pytest.raises(external_maps.MapsError, match=f"0.npy: .*{message}") as error:
        external_maps.read_maps(folder, NAMES)
    assert "\n" not in str(error.value)


def test_missing_duplicate_and_shared_maps_are_named(folder):
    more = [f"test/hole/{index}.png" for index in range(1, 6)]
    missing = "no map .* for 5 of 8 test images: hole/1, hole/2, hole/3 and 2 more"
    with pytest.raises(external_maps.MapsError, match=missing):
        external_maps.find_maps(folder, NAMES + more)
    with pytest.raises(
        external_maps.MapsError, match="test/hole/0.png, test/hole/0.bmp would have the sam"
    ):
        external_maps.find_maps(folder, [*NAMES, "test/hole/0.bmp"])
    np.save(folder / "hole" / "0.npy", np.zeros((3, 4)))
    double = "1 images have two maps: hole/0.npy and hole/0.tiff: keep one"
    with pytest.raises(external_maps.MapsError, match=double):
        external_maps.find_maps(folder, NAMES)
    with pytest.raises(external_maps.MapsError, match="bolt: there is no such folder"):
        external_maps.find_maps(folder / "bolt", NAMES)


def test_scores_are_matched_by_name(folder):
    assert external_maps.read_scores(folder, NAMES) is None
    lines = [f"{name},{index}.5" for index, name in enumerate(NAMES)]
    (folder / "scores.csv").write_text("\n".join(["name,score", *reversed(lines)]))
    np.testing.assert_array_equal(external_maps.read_scores(folder, NAMES), [0.5, 1.5, 2.5])
    # As other programs name them: wherever their images lie, or after their own files.
    lines = ["/data/bolt/test/good/0.png,3", "hole/0.npy,4", "hole/a.b.JPG,5"]
    (folder / "scores.csv").write_text("\n".join(["name,score", *lines]))
    np.testing.assert_array_equal(external_maps.read_scores(folder, NAMES), [3, 4, 5])
    (folder / "scores.csv").write_text("name,score\nhöle/0.png,1", encoding="latin-1")
    with pytest.raises(external_maps.MapsError, match="scores.csv: is not in UTF-8"):
        external_maps.read_scores(folder, NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,score\n", "needs the columns name,score; has .'image', 'score'"),
        ("name,score\ntest/good/0.png,1\n", "no score for 2 of 3 test images: test/hole/0.png"),
        ("name,score\na,1\na,2\n", "has a twice"),
        ("name,score\na,nan\n", "the score of a is 'nan'"),
        ("name,score\na\n", "the score of a is None"),
    ],
)
def test_invalid_scores_are_refused(folder, text, message):
    (folder / "scores.csv").write_text(text)
    with pytest.raises(external_maps.MapsError, match=f"scores.csv: {message}") as error:
        external_maps.read_scores(folder, NAMES)
    assert "\n" not in str(error.value)

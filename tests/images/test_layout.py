"""images/layout.py on small folders drawn here, and on shared/quirks where it is present."""

import dataclasses
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from drawings import HEIGHT, WIDTH, disc, photo, save, save_mask
from PIL import Image

from anoseg_jax.images import layout

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ANOSEG_SHARED", ROOT.parent / "shared"))


def masks_of(category):
    return [layout.load(example)["mask"] for example in category.test if example.label]


def assert_flawless(category):
    assert category.errors == () and category.warnings == ()
    layout.require_usable([category])


def only(lines):
    """The one line there is."""
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


# Layout and pairing.


def test_examples_are_listed_by_folder_and_name_with_their_masks(folder):
    category = layout.scan(folder)
    assert_flawless(category)
    assert category.name == "part"
    assert [example.name for example in category.train] == [
        "train/good/000.png",
        "train/good/001.png",
        "train/good/002.png",
    ]
    assert [(e.name, e.label, e.defect_type) for e in category.test] == [
        ("test/good/000.png", 0, "good"),
        ("test/good/001.png", 0, "good"),
        ("test/scratch/000.png", 1, "scratch"),
        ("test/scratch/001.png", 1, "scratch"),
    ]
    assert [(one.size, one.format) for one in category.checked] == 7 * [((HEIGHT, WIDTH), "PNG L")]
    shares = [one.share for one in category.checked if one.example.label]
    np.testing.assert_allclose(shares, [disc(0).mean(), disc(1).mean()], rtol=1e-6)
    assert layout.missing_metrics(category) == {}


def test_load_gives_rgb_bool_mask_and_names(folder):
    good, defective = (layout.scan(folder).test[i] for i in (0, 3))
    loaded = layout.load(defective)
    assert loaded["image"].dtype == np.uint8 and loaded["image"].shape == (HEIGHT, WIDTH, 3)
    assert (loaded["image"] == photo(21)[..., None]).all()
    assert loaded["mask"].dtype == bool
    np.testing.assert_array_equal(loaded["mask"], disc(1))
    assert (loaded["label"], loaded["defect_type"]) == (1, "scratch")
    assert not layout.load(good)["mask"].any()
    without = dataclasses.replace(defective, masks=())
    assert layout.load(without)["mask"] is None


def test_masks_are_found_without_suffix_and_with_any_extension(folder):
    masks = folder / "ground_truth/scratch"
    (masks / "000_mask.png").rename(masks / "000.png")
    Image.open(masks / "001_mask.png").save(masks / "001_mask.BMP")
    (masks / "001_mask.png").unlink()
    category = layout.scan(folder)
    assert_flawless(category)
    for mask, expected in zip(masks_of(category), (disc(0), disc(1)), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_names_pair_across_unicode_normal_forms(folder):
    composed, decomposed = (unicodedata.normalize(form, "größe ü") for form in ("NFC", "NFD"))
    (folder / "test/scratch/000.png").rename(folder / f"test/scratch/{decomposed}.png")
    masks = folder / "ground_truth/scratch"
    (masks / "000_mask.png").rename(masks / f"{composed}_mask.png")
    assert_flawless(layout.scan(folder))


def test_stray_and_hidden_files_are_ignored(folder):
    for name in ("Thumbs.db", "test/scratch/desktop.ini", "train/good/license.txt"):
        (folder / name).write_text("stray")
    for name in (".DS_Store", "train/good/._000.png", ".git/x.png", "test/.cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stray")
    category = layout.scan(folder)
    assert_flawless(category)
    assert (len(category.train), len(category.test)) == (3, 4)
    ignored = {path.relative_to(folder).as_posix() for path in category.ignored}
    assert ignored == {"Thumbs.db", "test/scratch/desktop.ini", "train/good/license.txt"}


def test_good_is_good_in_any_spelling(folder):
    (folder / "test/good").rename(folder / "test/Good")
    (folder / "train/good").rename(folder / "train/GOOD")
    category = layout.scan(folder)
    assert_flawless(category)
    assert [example.label for example in category.test] == [0, 0, 1, 1]
    assert {example.defect_type for example in category.train} == {"good"}


@pytest.mark.parametrize("place", ["train/bad", "validation/good", "test", "test/scratch/more"])
def test_images_out_of_place_are_ignored_with_a_warning(folder, place):
    save(photo(99), folder / place / "999.png")
    category = layout.scan(folder)
    assert category.errors == ()
    assert str(folder / place) in only(category.warnings)
    assert (len(category.train), len(category.test)) == (3, 4)


@pytest.mark.parametrize("shows_defect", [False, True])
def test_masks_of_good_parts_are_ignored_with_a_warning_if_they_show_a_defect(folder, shows_defect):
    mask_file = folder / "ground_truth/good/000_mask.png"
    save_mask(disc(0) & shows_defect, mask_file)
    category = layout.scan(folder)
    assert category.errors == ()
    assert all(not example.masks for example in category.test if not example.label)
    if shows_defect:
        assert str(mask_file) in only(category.warnings)
    else:
        assert category.warnings == ()


def test_a_mask_without_image_is_a_warning(folder):
    save_mask(disc(0), folder / "ground_truth/scratch/777_mask.png")
    category = layout.scan(folder)
    assert category.errors == ()
    assert "ground_truth/scratch/777_mask.png" in only(category.warnings)


def test_an_image_without_mask_beside_others_with_masks_is_an_error(folder):
    (folder / "ground_truth/scratch/001_mask.png").unlink()
    error = only(layout.scan(folder).errors)
    assert error.startswith(f"{folder / 'test/scratch/001.png'}: has no mask")
    assert "ground_truth/scratch/001_mask.png" in error


def test_a_defect_type_without_masks_beside_others_with_masks_is_an_error(folder):
    save(photo(30), folder / "test/dent/000.png")
    assert str(folder / "ground_truth/dent") in only(layout.scan(folder).errors)


def test_two_masks_for_one_image_are_an_error_that_names_both(folder):
    save_mask(disc(1), folder / "ground_truth/scratch/001_mask.bmp")
    error = only(layout.scan(folder).errors)
    assert "001_mask.bmp" in error and "001_mask.png" in error


def test_an_empty_mask_of_a_defect_is_a_warning(folder):
    save_mask(disc(0) & False, folder / "ground_truth/scratch/000_mask.png")
    category = layout.scan(folder)
    assert category.errors == ()
    assert "ground_truth/scratch/000_mask.png: is empty" in only(category.warnings)


def test_an_inverted_mask_is_a_warning(folder):
    small = np.zeros((HEIGHT, WIDTH), bool)
    small[4:6, 4:6] = True
    save_mask(~small, folder / "ground_truth/scratch/000_mask.png")
    category = layout.scan(folder)
    assert category.errors == ()
    assert "inverted" in only(category.warnings)


def test_a_mask_of_another_size_is_an_error_with_both_sizes(folder):
    save_mask(disc(0)[:6], folder / "ground_truth/scratch/000_mask.png")
    category = layout.scan(folder)
    error = only(category.errors)
    assert "ground_truth/scratch/000_mask.png" in error
    assert "16x6" in error and "16x12" in error
    with pytest.raises(layout.LayoutError, match="16x6"):
        layout.load(category.test[2])


@pytest.mark.parametrize("there", [True, False])
def test_no_images_to_train_on_is_an_error_that_names_the_folder(folder, there):
    shutil.rmtree(folder / "train/good")
    if there:
        (folder / "train/good").mkdir()
        (folder / "train/good/.gitkeep").touch()
    assert only(layout.scan(folder).errors).startswith(str(folder / "train/good"))


def test_one_image_to_train_on_is_enough(folder):
    for name in ("001.png", "002.png"):
        (folder / "train/good" / name).unlink()
    category = layout.scan(folder)
    assert_flawless(category)
    assert len(category.train) == 1


# Metrics that cannot be computed.


def test_without_ground_truth_pixel_metrics_are_missing(folder):
    shutil.rmtree(folder / "ground_truth")
    category = layout.scan(folder)
    assert category.errors == ()
    assert "ground_truth" in only(category.warnings)
    assert masks_of(category) == [None, None]
    assert layout.missing_metrics(category) == {"pixel": "the defective test images have no masks"}


def test_with_empty_masks_only_pixel_metrics_are_missing(folder):
    for i in range(2):
        save_mask(disc(i) & False, folder / f"ground_truth/scratch/{i:03}_mask.png")
    assert layout.missing_metrics(layout.scan(folder)) == {"pixel": "all masks are empty"}


def test_without_good_test_images_image_metrics_are_missing(folder):
    shutil.rmtree(folder / "test/good")
    category = layout.scan(folder)
    assert_flawless(category)
    assert layout.missing_metrics(category) == {"image": "there are no good test images"}


@pytest.mark.parametrize("gone", ["test", "test/scratch"])
def test_without_defective_test_images_all_metrics_are_missing(folder, gone):
    shutil.rmtree(folder / gone)
    shutil.rmtree(folder / "ground_truth")
    category = layout.scan(folder)
    assert_flawless(category)
    assert set(layout.missing_metrics(category)) == {"image", "pixel"}


# Files that cannot be read.

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def png_that_declares(width, height):
    """A whole, valid PNG header of any size, with next to no pixels behind it."""
    import struct
    import zlib

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


BAD_FILES = {
    "empty": (b"", "is empty"),
    "pointer": (GIT_LFS_POINTER, "git lfs pull"),
    "text": (b"not an image at all", "not an image"),
    "huge": (png_that_declares(60000, 60000), "megapixels"),
    "just_too_large": (png_that_declares(12500, 12001), "megapixels"),
    "cut_short": (None, "damaged or cut short"),
}


def spoil(path, kind):
    content = BAD_FILES[kind][0]
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", ["train/good/001.png", "ground_truth/scratch/001_mask.png"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_is_an_error_that_names_it_and_says_what_is_wrong(folder, kind, name):
    spoil(folder / name, kind)
    error = only(layout.scan(folder).errors)
    assert error.startswith(f"{folder / name}: ")
    assert BAD_FILES[kind][1] in error


def test_a_dangling_link_is_an_error_that_names_it(folder):
    (folder / "train/good/001.png").unlink()
    (folder / "train/good/001.png").symlink_to(folder / "annexed")
    assert only(layout.scan(folder).errors).startswith(str(folder / "train/good/001.png"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_a_huge_declared_size_is_refused_before_memory_is_taken(folder):
    # 3.6 gigapixels; the process may not have 2 GiB.
    spoil(folder / "train/good/001.png", "huge")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
        "from anoseg_jax.images import layout; print(*layout.scan(sys.argv[1]).errors)"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "megapixels" in done.stdout, done.stderr


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_bad_files_of_all_categories_are_named_at_once_one_a_line(folder):
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    spoil(folder / "train/good/000.png", "empty")
    spoil(folder / "test/scratch/000.png", "cut_short")
    spoil(other / "ground_truth/scratch/001_mask.png", "text")
    categories = layout.scan_categories(folder.parent, ("all",))
    with pytest.raises(layout.LayoutError) as error:
        layout.require_usable(categories)
    lines = str(error.value).split("\n")
    assert len(lines) == 3
    for name in (
        "part/train/good/000.png",
        "part/test/scratch/000.png",
        "other/ground_truth/scratch/001_mask.png",
    ):
        assert any(f"{name}: " in line for line in lines), name


def test_a_mask_is_compared_with_the_upright_image(folder):
    exif = Image.Exif()
    exif[274] = 6
    stored = np.ascontiguousarray(np.rot90(photo(20)))
    save(stored, folder / "test/scratch/000.png", exif=exif)
    assert_flawless(layout.scan(folder))


def test_sizes_may_vary(folder):
    save(photo(0, (30, 7)), folder / "train/good/000.png")
    category = layout.scan(folder)
    assert_flawless(category)
    assert [one.size for one in category.checked] == [(30, 7), *6 * [(HEIGHT, WIDTH)]]


# Several categories.


def test_categories_are_the_folders_with_train_or_test(folder):
    for name in ("zipper/train", "only_test/test", "papers/pdf", ".hidden/train"):
        (folder.parent / name).mkdir(parents=True)
    (folder.parent / "readme.txt").touch()
    categories = layout.scan_categories(folder.parent, ("all",))
    assert [category.name for category in categories] == ["only_test", "part", "zipper"]


def test_categories_come_in_the_order_asked_for(folder):
    shutil.copytree(folder, folder.parent / "another")
    scanned = layout.scan_categories(folder.parent, ("part", "another"))
    assert [category.name for category in scanned] == ["part", "another"]
    scanned = layout.scan_categories(folder.parent, ("all",))
    assert [category.name for category in scanned] == ["another", "part"]


def test_a_missing_category_is_an_error_that_lists_what_is_there(folder):
    with pytest.raises(layout.LayoutError, match="no category tile.* there: part") as error:
        layout.scan_categories(folder.parent, ("part", "tile"))
    only([str(error.value)])


def test_a_category_given_as_data_dir_is_told_so(folder):
    with pytest.raises(layout.LayoutError, match="is a category itself") as error:
        layout.scan_categories(folder, ("all",))
    assert str(folder.parent) in str(error.value)


def test_a_missing_data_dir_is_an_error_that_names_it(tmp_path):
    with pytest.raises(layout.LayoutError, match="nowhere: is not a folder"):
        layout.scan_categories(tmp_path / "nowhere", ("all",))


# The report.


def test_the_report_tells_counts_sizes_masks_and_problems(folder):
    spoil(folder / "train/good/000.png", "empty")
    save_mask(disc(0), folder / "ground_truth/scratch/777_mask.png")
    category = layout.scan(folder)
    text = layout.report(category)
    for part in (
        "3 good",
        "2 good, 2 scratch",
        "6 of 16x12",
        "6 PNG L",
        f"median {np.median([disc(0).mean(), disc(1).mean()]):.2%}",
        "image metrics  available",
        f"error: {category.errors[0]}",
        f"warning: {category.warnings[0]}",
        "not usable: 1",
    ):
        assert part in text


def test_the_report_says_which_metrics_are_not_available_and_why(folder):
    shutil.rmtree(folder / "ground_truth")
    text = layout.report(layout.scan(folder))
    assert "pixel metrics  not available: the defective test images have no masks" in text
    assert "image metrics  available" in text
    assert text.endswith("usable")


def test_layout_needs_no_tensorflow():
    code = "import sys; import anoseg_jax.images.layout; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# The folders of shared/quirks, all made from MVTec AD's screw.

needs_quirks = pytest.mark.skipif(
    not (SHARED / "quirks").is_dir() or not (SHARED / "real/mvtec_ad/screw").is_dir(),
    reason=f"{SHARED} holds no quirks/ and real/mvtec_ad/screw (ANOSEG_SHARED names its place)",
)
SCREW = SHARED / "real/mvtec_ad/screw"
USABLE = (
    "masks_one_bit",
    "masks_palette",
    "masks_type_ids",
    "masks_rgba_constant_alpha",
    "masks_antialiased_grey",
    "masks_plain_stem",
    "masks_for_good",
    "names_unusual",
    "train_has_defect_folder",
    "image_mixed_formats",
    "image_rgba_palette_cmyk",
    "image_16_bit",
    "image_exif_rotated",
    "image_sizes_vary",
    "train_single_image",
)
# Case -> the files that the errors name, and what they say.
ERRORS = {
    "mask_missing": {"test/scratch_neck/001.png": "has no mask"},
    "mask_other_size": {"ground_truth/scratch_neck/000_mask.png": "128x128"},
    "image_zero_bytes": {"train/good/002.png": "is empty"},
    "image_truncated": {"train/good/002.png": "damaged or cut short"},
    "image_is_pointer_text": {"train/good/002.png": "git lfs pull"},
    "image_declares_huge_size": {"train/good/001.png": "megapixels"},
    "train_empty": {"train/good": "holds no images"},
}
WARNINGS = {
    "mask_without_image": "ground_truth/scratch_neck/777_mask.png",
    "mask_empty_for_defect": "ground_truth/scratch_neck/000_mask.png",
    "train_has_defect_folder": "train/bad",
    "names_unusual": "validation/good",
    "no_ground_truth_folder": "ground_truth",
    "masks_antialiased_grey": "ground_truth/scratch_neck",
}
MISSING_METRICS = {
    "no_ground_truth_folder": {"pixel"},
    "no_test_folder": {"image", "pixel"},
    "test_all_good": {"image", "pixel"},
}


def quirk(case):
    return layout.scan(SHARED / "quirks" / case)


@needs_quirks
def test_every_quirk_has_an_expectation():
    there = {path.name for path in (SHARED / "quirks").iterdir() if path.is_dir()}
    assert there == {*USABLE, *ERRORS, *WARNINGS, *MISSING_METRICS}


@needs_quirks
@pytest.mark.parametrize("case", USABLE)
def test_quirk_loads_upright_in_three_channels_with_screws_own_masks(case):
    category = quirk(case)
    assert category.errors == ()
    assert len(category.train) == (1 if case == "train_single_image" else 6)
    assert [example.defect_type for example in category.test] == ["good"] * 3 + ["scratch_neck"] * 3
    for example in category.train:
        image = layout.load(example)["image"]
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        assert image.max() > 100
    for example in category.test[3:]:
        stem = example.image.stem
        own = np.asarray(Image.open(SCREW / f"ground_truth/scratch_neck/{stem}_mask.png"))
        np.testing.assert_array_equal(layout.load(example)["mask"], own == 255)
        own = np.asarray(Image.open(SCREW / f"test/scratch_neck/{stem}.png"))
        np.testing.assert_array_equal(layout.load(example)["image"], own[..., None].repeat(3, -1))


@needs_quirks
@pytest.mark.parametrize("case", ["image_16_bit", "image_rgba_palette_cmyk", "image_mixed_formats"])
def test_quirk_images_are_screws_own_up_to_the_formats_loss(case):
    for example in quirk(case).train:
        own = np.asarray(Image.open(SCREW / f"train/good/{example.image.stem}.png")).astype(int)
        difference = np.abs(layout.load(example)["image"] - own[..., None])
        lossy = example.image.suffix.lower() in (".jpg", ".webp")
        assert difference.mean() <= (3 if lossy else 0), example.name


@needs_quirks
def test_quirk_exif_rotated_images_are_turned_by_90_degrees():
    for example in quirk("image_exif_rotated").train:
        stored = np.asarray(Image.open(example.image)).astype(int)
        np.testing.assert_array_equal(layout.load(example)["image"], np.rot90(stored, -1))


@needs_quirks
@pytest.mark.parametrize("case", ERRORS)
def test_quirk_is_an_error_that_names_the_file_and_what_is_wrong(case):
    category = quirk(case)
    assert len(category.errors) == len(ERRORS[case])
    for name, why in ERRORS[case].items():
        path = SHARED / "quirks" / case / name
        assert why in only([e for e in category.errors if e.startswith(f"{path}: ")])
    with pytest.raises(layout.LayoutError):
        layout.require_usable([category])
    assert "not usable" in layout.report(category)


@needs_quirks
def test_quirks_bad_files_are_all_named_at_once():
    with pytest.raises(layout.LayoutError) as error:
        layout.require_usable(layout.scan_categories(SHARED / "quirks", tuple(ERRORS)))
    lines = str(error.value).split("\n")
    assert len(lines) == len(ERRORS)
    for case, line in zip(ERRORS, lines, strict=True):
        assert f"{case}/{next(iter(ERRORS[case]))}" in line


@needs_quirks
@pytest.mark.parametrize("case", sorted({*USABLE, *WARNINGS, *MISSING_METRICS}))
def test_quirk_goes_on_with_the_warnings_it_deserves_and_no_other(case):
    category = quirk(case)
    layout.require_usable([category])
    if case in WARNINGS:
        path = SHARED / "quirks" / case / WARNINGS[case]
        assert only(category.warnings).startswith(f"{path}: ")
    else:
        assert category.warnings == ()


@needs_quirks
@pytest.mark.parametrize("case", sorted({*USABLE, *WARNINGS, *MISSING_METRICS}))
def test_quirks_missing_metrics_have_a_reason(case):
    missing = layout.missing_metrics(quirk(case))
    assert set(missing) == MISSING_METRICS.get(case, set())
    for reason in missing.values():
        assert reason in layout.report(quirk(case))

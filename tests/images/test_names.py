"""Names of files, folders and categories: odd ones, links, system files, suffixes."""

import os
import unicodedata

import numpy as np
import pytest
from drawings import disc, draw_category, photo, save, save_mask

from anoseg_jax.images import layout
from anoseg_jax.images.decode import printable


def only(lines):
    assert len(lines) == 1 and "\n" not in lines[0], lines
    return lines[0]


def assert_flawless(category):
    assert category.errors == () and category.warnings == ()
    assert (len(category.train), len(category.test)) == (3, 4)
    assert all(bool(example.masks) == bool(example.label) for example in category.test)


# Bytes, Unicode and length.


def rename_to_bytes(path, name):
    """Renames a file to a name that is not UTF-8, as an archive from a GBK system has them."""
    target = os.path.join(os.fsencode(path.parent), name)
    try:
        os.rename(path, target)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return path.parent / os.fsdecode(name)


def test_names_that_are_not_utf_8_are_read_and_can_be_printed_and_stored(folder):
    rename_to_bytes(folder / "test/scratch/000.png", b"\xbb\xae000.png")
    rename_to_bytes(folder / "ground_truth/scratch/000_mask.png", b"\xbb\xae000_mask.png")
    rename_to_bytes(folder / "train/good", b"good")
    category = layout.scan(folder)
    assert_flawless(category)
    names = [example.name for example in category.test]
    assert "test/scratch/\\xbb\\xae000.png" in names
    assert all(name.encode("utf-8") for name in names)


def test_a_bad_file_whose_name_is_not_utf_8_is_named(folder):
    bad = rename_to_bytes(folder / "train/good/000.png", b"\xbb\xae000.png")
    bad.write_bytes(b"")
    category = layout.scan(folder)
    assert "train/good/\\xbb\\xae000.png: is empty" in only(category.errors)
    layout.report(category).encode("utf-8")
    with pytest.raises(layout.LayoutError) as error:
        layout.load(category.train[2])
    str(error.value).encode("utf-8")


def test_a_category_whose_name_is_not_utf_8_is_chosen_by_its_printed_name(folder):
    rename_to_bytes(folder, b"\xbb\xae")
    (category,) = layout.scan_categories(folder.parent, ("all",))
    assert category.name == "\\xbb\\xae"
    (category,) = layout.scan_categories(folder.parent, ("\\xbb\\xae",))
    assert_flawless(category)
    assert category.name == "\\xbb\\xae"


def test_folders_pair_across_unicode_normal_forms(folder):
    composed, decomposed = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))
    (folder / "test/scratch").rename(folder / "test" / composed)
    (folder / "ground_truth/scratch").rename(folder / "ground_truth" / decomposed)
    category = layout.scan(folder)
    assert_flawless(category)
    assert {example.defect_type for example in category.test} == {"good", composed}


def test_a_category_is_chosen_in_either_unicode_normal_form(folder):
    folder.rename(folder.parent / unicodedata.normalize("NFD", "größe"))
    for form in ("NFC", "NFD"):
        (category,) = layout.scan_categories(folder.parent, (unicodedata.normalize(form, "größe"),))
        assert_flawless(category)
        assert category.name == unicodedata.normalize("NFC", "größe")


def test_two_unicode_forms_of_one_name_are_two_images_of_one_stem(folder):
    for form in ("NFC", "NFD"):
        save(photo(1), folder / f"train/good/{unicodedata.normalize(form, 'ä')}.png")
    if len(list((folder / "train/good").iterdir())) < 5:
        pytest.skip("this file system has one form of a name")
    assert "has the same stem as" in only(layout.scan(folder).errors)


def test_names_of_237_bytes_are_read(folder):
    name = "x" * 233 + ".png"
    (folder / "test/scratch/000.png").rename(folder / "test/scratch" / name)
    (folder / "ground_truth/scratch/000_mask.png").rename(folder / "ground_truth/scratch" / name)
    category = layout.scan(folder)
    assert_flawless(category)
    assert f"test/scratch/{name}" in [example.name for example in category.test]


def test_printable_keeps_ordinary_names():
    for name in ("größe 1.png", "螺丝_002.png", "a.b (3).png", "-rf 100%"):
        assert printable(name) == name


# Categories.

ODD_NAMES = ("nut [M8] #1 50%", "v1.2", "a,b", "x:y", "all", "cpu")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_category_of_any_name_can_be_chosen(tmp_path, name):
    for other in ODD_NAMES:
        draw_category(tmp_path / other)
    assert len(layout.scan_categories(tmp_path, ("all",))) == len(ODD_NAMES)
    chosen = "all/" if name == "all" else name
    (category,) = layout.scan_categories(tmp_path, (chosen,))
    assert category.name == name
    assert_flawless(category)


def test_a_name_with_a_comma_that_was_split_is_told_how_to_be_chosen(tmp_path):
    draw_category(tmp_path / "a,b")
    with pytest.raises(layout.LayoutError) as error:
        layout.scan_categories(tmp_path, ("a", "b"))
    message = only([str(error.value)])
    assert 'there: "a,b"' in message and "--config.categories='(\"a,b\",)'" in message


@pytest.mark.parametrize("name", ["__MACOSX", "$RECYCLE.BIN", "@eaDir", ".Trash", "lost+found"])
def test_what_systems_leave_is_neither_category_nor_defect_type(folder, name):
    draw_category(folder.parent / name)
    save(photo(0), folder / "test" / name / "000.png")
    save(photo(0), folder / "train/good" / name / "000.png")
    (category,) = layout.scan_categories(folder.parent, ("all",))
    assert category.name == "part"
    assert_flawless(category)


# Links.


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


def test_links_that_loop_are_not_followed_and_named(folder):
    link(folder / "test/all", "..")
    link(folder / "test/latest", "../test")
    link(folder / "self", ".")
    link(folder / "a", "a")
    category = layout.scan(folder)
    assert category.errors == ()
    assert (len(category.train), len(category.test)) == (3, 4)
    for name in ("test/all", "test/latest", "self"):
        (warning,) = [w for w in category.warnings if w.startswith(f"{folder / name}: ")]
        assert "is not followed" in warning
    assert len(layout.scan_categories(folder.parent, ("all",))) == 1


def test_a_folder_of_images_that_is_linked_twice_is_an_error(folder):
    link(folder / "test/latest", "scratch")
    error = only([e for e in layout.scan(folder).errors if "is the same folder as" in e])
    assert "test/latest" in error and "test/scratch" in error


def test_categories_and_types_may_be_links(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "test/scratch").rename(elsewhere / "scratch")
    link(folder / "test/scratch", elsewhere / "scratch")
    folder.rename(elsewhere / "part")
    link(folder, elsewhere / "part")
    (category,) = layout.scan_categories(folder.parent, ("all",))
    assert category.name == "part"
    assert_flawless(category)


# Files.


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        *((".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".mpo", "JPEG")),
        *((".jp2", "JPEG2000"), (".j2k", "JPEG2000"), (".avif", "AVIF"), (".tga", "TGA")),
        *((".ppm", "PPM"), (".pcx", "PCX"), (".sgi", "SGI"), (".dib", "DIB"), (".apng", "PNG")),
        *((".PNG", "PNG"), ("", "PNG"), (".img", "TIFF"), (".scan", "JPEG")),
    ],
)
def test_every_file_that_pillow_reads_is_used(folder, suffix, form):
    for name in ("train/good", "test/scratch"):
        path = folder / name / "000.png"
        path.unlink()
        save(photo(7), path.with_suffix(suffix), format=form)
    assert_flawless(layout.scan(folder))


@pytest.mark.parametrize("suffix", [".mpo", ".jfif", ".avif", ".PNG"])
def test_a_damaged_file_with_the_suffix_of_an_image_is_an_error(folder, suffix):
    (folder / f"train/good/900{suffix}").write_bytes(b"")
    assert f"900{suffix}: is empty" in only(layout.scan(folder).errors)


def test_what_is_skipped_is_named_with_counts(folder):
    for index in range(3):
        (folder / f"train/good/9{index}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "train/good/video.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", "labels.json", ".hidden"):
        (folder / "train/good" / name).write_text("no image")
    category = layout.scan(folder)
    assert category.errors == () and len(category.train) == 3
    warning = only(category.warnings)
    assert warning.startswith(f"{folder / 'train/good'}: 4 files are skipped")
    assert "3 .heic, 1 .mp4" in warning


def test_images_that_share_a_stem_are_an_error_that_names_them_and_their_mask(folder):
    save(photo(300), folder / "test/scratch/000.jpg")
    error = only(layout.scan(folder).errors)
    for name in ("test/scratch/000.jpg", "000.png", "ground_truth/scratch/000_mask.png"):
        assert name in error


@pytest.mark.parametrize("name", ["train/good/001.bmp", "test/good/001.JPG"])
def test_good_images_that_share_a_stem_are_an_error_too(folder, name):
    save(photo(300), folder / name)
    error = only(layout.scan(folder).errors)
    assert "001.png" in error and name in error


# The suffix of masks.


def test_a_mask_suffix_is_an_option_and_proposed_where_it_is_missing(folder):
    for i in range(2):
        mask = folder / f"ground_truth/scratch/{i:03}_mask.png"
        mask.rename(mask.with_name(f"{i:03}_GT.png"))
    category = layout.scan(folder)
    assert only(category.errors).endswith("set --config.mask_suffix=_GT")
    assert_flawless(layout.scan(folder, layout.ReadOptions(mask_suffix="_GT")))


def test_the_suffix_decides_between_two_masks(folder):
    for i in range(2):
        save_mask(~disc(i), folder / f"ground_truth/scratch/{i:03}.png")
    category = layout.scan(folder)
    assert "2 masks are ignored" in only(category.warnings)
    assert "(000.png, 001.png)" in only(category.warnings)
    for i, example in enumerate(category.test[2:]):
        np.testing.assert_array_equal(layout.load(example)["mask"], disc(i))


# Evaluation of a trained model.


def test_a_test_folder_alone_is_enough_for_evaluation_and_not_for_training(folder):
    (folder / "train").rename(folder.parent / "elsewhere")
    (category,) = layout.scan_categories(folder.parent, ("part",))
    assert only(category.errors).startswith(f"{folder / 'train/good'}: is missing")
    layout.require_usable([category], training=False)
    with pytest.raises(layout.LayoutError, match="train/good: is missing"):
        layout.require_usable([category])
    assert "usable for --mode=evaluate" in layout.report(category)


def test_other_errors_stop_evaluation_too(folder):
    (folder / "train/good").rename(folder.parent / "elsewhere")
    (folder / "test/good/000.png").write_bytes(b"")
    category = layout.scan(folder)
    assert len(category.errors) == 2
    with pytest.raises(layout.LayoutError) as error:
        layout.require_usable([category], training=False)
    assert "test/good/000.png: is empty" in only([str(error.value)])

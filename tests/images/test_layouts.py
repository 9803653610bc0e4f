"""images/layouts.py: each known layout is found by itself, and no other folder."""

import numpy as np
import pytest
from drawings import disc, draw_category, photo, save, save_mask

from anoseg_jax.images import layout
from anoseg_jax.images.layouts import LAYOUTS


def draw(root, images, masks=None, value=255):
    """Draws {pattern of names: number of files}; masks have the value where they are defective."""
    for pattern, count in images.items():
        for index in range(count):
            save(photo(index), root / pattern.format(f"{index:03}"))
    for pattern, count in (masks or {}).items():
        for index in range(count):
            save(np.uint8(value) * disc(index), root / pattern.format(f"{index:03}"))


def draw_mvtec_ad(root):
    draw_category(root)


def draw_loco(root):
    good = {"train/good/{}.png": 4, "validation/good/{}.png": 2, "test/good/{}.png": 1}
    masks = {f"ground_truth/logical_anomalies/{i:03}/{{}}.png": 2 for i in range(2)}
    draw(root, good | {"test/logical_anomalies/{}.png": 2}, masks, value=236)


def draw_mvtec_ad_2(root):
    folders = {"train/good": 4, "validation/good": 2, "test_public/good": 1}
    images = {f"{folder}/{{}}_regular.png": count for folder, count in folders.items()}
    images["test_public/bad/{}_overexposed.png"] = 2
    draw(root, images, {"test_public/ground_truth/bad/{}_overexposed_mask.png": 2})


def draw_visa(root):
    images = {"Data/Images/Normal/{}.JPG": 4, "Data/Images/Anomaly/{}.JPG": 2}
    draw(root, images, {"Data/Masks/Anomaly/{}.png": 2}, value=3)
    lines = ["object,split,label,image,mask"]
    for i in range(4):
        split = "test" if i == 1 else "train"
        lines.append(f"{root.name},{split},normal,{root.name}/Data/Images/Normal/{i:03}.JPG,")
    for i in range(2):
        name = f"{root.name}/Data/{{}}/Anomaly/{i:03}"
        image, mask = name.format("Images") + ".JPG", name.format("Masks") + ".png"
        lines.append(f"{root.name},test,anomaly,{image},{mask}")
    lines.append("other,train,normal,other/Data/Images/Normal/001.JPG,")
    (root.parent / "split_csv").mkdir()
    (root.parent / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")


def draw_btad(root):
    images = {"train/ok/{}.bmp": 4, "test/ok/{}.bmp": 1, "test/ko/{}.bmp": 2}
    draw(root, images, {"ground_truth/ko/{}.png": 2})


def draw_normal_abnormal(root):
    draw(root, {"normal/{}.png": 5, "abnormal/{}.png": 2}, {"ground_truth/{}.png": 2})


def draw_only_good(root):
    draw(root, {"good/{}.png": 4})


# Name -> how it is drawn; images to train on, for thresholds, good and defective ones to test on.
KNOWN = {
    "mvtec_ad": (draw_mvtec_ad, (3, 0, 2, 2)),
    "mvtec_loco": (draw_loco, (4, 2, 1, 2)),
    "mvtec_ad_2": (draw_mvtec_ad_2, (4, 2, 1, 2)),
    "visa": (draw_visa, (3, 0, 1, 2)),
    "btad": (draw_btad, (4, 0, 1, 2)),
    "normal_abnormal": (draw_normal_abnormal, (4, 0, 1, 2)),
    "only_good": (draw_only_good, (4, 0, 0, 0)),
}


def counts(category):
    labels = [example.label for example in category.test]
    return len(category.train), len(category.validation), labels.count(0), labels.count(1)


def only(lines):
    assert len(lines) == 1 and "\n" not in lines[0], lines
    return lines[0]


def test_every_layout_that_fits_by_itself_is_drawn_here():
    assert {*KNOWN, "photographs"} == set(LAYOUTS)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("asked", [False, True])
def test_a_layout_is_found_by_itself_and_used_where_it_is_asked_for(tmp_path, name, asked):
    draw_layout, expected = KNOWN[name]
    draw_layout(tmp_path / "part")
    options = layout.ReadOptions(layout=name if asked else "auto")
    (category,) = layout.scan_categories(tmp_path, ("all",), options)
    assert category.errors == () and category.layout == name
    assert counts(category) == expected
    assert f"layout   {name}: {LAYOUTS[name].title}" in layout.report(category)
    assert {x.defect_type for x in (*category.train, *category.validation)} == {"good"}
    for index, example in enumerate(x for x in category.test if x.label):
        # LOCO's masks are the union of a folder.
        expected_mask = disc(0) | disc(1) if name == "mvtec_loco" else disc(index)
        np.testing.assert_array_equal(layout.load(example)["mask"], expected_mask)
    if name != "normal_abnormal":  # which says that it splits the good images
        assert category.warnings == ()


@pytest.mark.parametrize("name", KNOWN)
def test_no_image_is_read_twice_or_lost(tmp_path, name):
    KNOWN[name][0](tmp_path / "part")
    category = layout.scan(tmp_path / "part")
    examples = (*category.train, *category.validation, *category.test)
    assert len({x.image for x in examples}) == len({x.name for x in examples}) == len(examples)
    assert category.ignored == ()


def test_masks_beside_the_types_are_no_type(tmp_path):
    draw_mvtec_ad_2(tmp_path / "part")
    save_mask(disc(0), tmp_path / "part/test_public/ground_truth/777.png")
    category = layout.scan(tmp_path / "part")
    assert counts(category) == KNOWN["mvtec_ad_2"][1]
    assert "test_public/ground_truth: 1 image is ignored" in only(category.warnings)


def test_visa_images_that_its_split_does_not_list_are_tested_on_with_a_warning(tmp_path):
    draw_visa(tmp_path / "part")
    save(photo(9), tmp_path / "part/Data/Images/Normal/777.JPG")
    category = layout.scan(tmp_path / "part")
    assert counts(category) == (3, 0, 2, 2)
    assert "1cls.csv: does not list 1 of the 7 images" in only(category.warnings)


def test_visa_without_its_splits_and_a_flat_pair_test_on_every_fifth_good_image(tmp_path):
    draw_visa(tmp_path / "part")
    (tmp_path / "split_csv/1cls.csv").unlink()
    draw(tmp_path / "part", {"Data/Images/Normal/1{}.JPG": 7})
    category = layout.scan(tmp_path / "part")
    assert counts(category) == (9, 0, 2, 2)
    assert "2 of its 11 images, every fifth" in only(category.warnings)


def test_a_damaged_split_is_an_error_that_names_it(tmp_path):
    draw_visa(tmp_path / "part")
    (tmp_path / "split_csv/1cls.csv").write_text("a;b\n1;2\n")
    error = only(layout.scan(tmp_path / "part").errors)
    assert error.startswith(f"{tmp_path / 'split_csv/1cls.csv'}: ")


@pytest.mark.parametrize("spelling", [str.upper, str.capitalize])
def test_the_case_of_folder_names_does_not_matter(folder, spelling):
    for path in sorted(folder.glob("*/*"), reverse=True):
        path.rename(path.with_name(spelling(path.name)))
    for path in folder.glob("*"):
        path.rename(path.with_name(spelling(path.name)))
    (category,) = layout.scan_categories(folder.parent, ("all",))
    assert category.errors == () and category.warnings == ()
    assert counts(category) == (3, 0, 2, 2)
    assert all(x.masks for x in category.test if x.label)


def test_good_parts_are_good_by_another_name(folder):
    (folder / "test/good").rename(folder / "test/OK")
    (folder / "train/good").rename(folder / "train/normal")
    category = layout.scan(folder)
    assert category.errors == () and counts(category) == (3, 0, 2, 2)


@pytest.mark.parametrize("data_dir", ["part", "."])
def test_photographs_in_no_folder_are_good_ones_only_where_this_is_asked_for(tmp_path, data_dir):
    draw(tmp_path / "part", {"{}.png": 3})
    with pytest.raises(layout.LayoutError) as error:
        layout.scan_categories(tmp_path / data_dir, ("all",))
    message = only([str(error.value)])
    category = f"{tmp_path / data_dir}/{'<category>' if data_dir == 'part' else 'part'}"
    for folder in ("train/good", "test/good", "test/<defect type>"):
        assert f"{category}/{folder}" in message
    assert "000.png, 001.png and 1 more" in message
    assert "--config.layout=photographs" in message
    options = layout.ReadOptions(layout="photographs")
    for names in (("all",), ("part",)):
        (category,) = layout.scan_categories(tmp_path / data_dir, names, options)
        assert category.name == "part" and category.errors == ()
        assert counts(category) == (3, 0, 0, 0)


def test_a_folder_without_photographs_is_told_the_known_layouts(tmp_path):
    (tmp_path / "part" / "scans").mkdir(parents=True)
    with pytest.raises(layout.LayoutError) as error:
        layout.scan_categories(tmp_path, ("all",))
    message = only([str(error.value)])
    assert f"{tmp_path}/<category>/train/good" in message
    for known in KNOWN:
        assert LAYOUTS[known].tree in message


@pytest.mark.parametrize("name", ["mvtec_ad", "btad", "normal_abnormal", "only_good"])
def test_a_category_given_as_data_dir_is_no_set_of_categories(tmp_path, name):
    KNOWN[name][0](tmp_path / "part")
    with pytest.raises(layout.LayoutError, match="part: is a category itself") as error:
        layout.scan_categories(tmp_path / "part", ("all",))
    assert f"--config.data_dir={tmp_path}" in only([str(error.value)])


def test_a_folder_that_fits_none_is_left_out_and_named(folder):
    draw(folder.parent, {"scans/{}.png": 2})
    (category,) = layout.scan_categories(folder.parent, ("all",))
    warning = only(category.warnings)
    assert warning.startswith(f"{folder.parent / 'scans'}: is left out")
    assert "2 images (000.png, 001.png)" in warning
    with pytest.raises(layout.LayoutError, match="no category scans .*folder scans was looked for"):
        layout.scan_categories(folder.parent, ("scans",))


def test_an_unknown_layout_is_refused_with_those_there_are(folder):
    with pytest.raises(
        layout.LayoutError, match="layout='mvtec' must be auto or one of .*mvtec_ad"
    ):
        layout.scan_categories(folder.parent, ("all",), layout.ReadOptions(layout="mvtec"))


def test_masks_of_a_flat_pair_may_be_missing(tmp_path):
    draw(tmp_path / "part", {"ok/{}.png": 2, "ng/{}.png": 2})
    category = layout.scan(tmp_path / "part")
    assert category.errors == () and counts(category) == (1, 0, 1, 2)
    assert set(layout.missing_metrics(category)) == {"pixel"}


def test_a_mask_of_a_folder_may_have_several_files_in_any_layout(folder):
    (folder / "ground_truth/scratch/000_mask.png").unlink()
    save_mask(disc(0), folder / "ground_truth/scratch/000/scratch.png")
    save_mask(disc(2), folder / "ground_truth/scratch/000/dent.png")
    category = layout.scan(folder)
    assert category.errors == () and category.warnings == ()
    np.testing.assert_array_equal(layout.load(category.test[2])["mask"], disc(0) | disc(2))

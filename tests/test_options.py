"""Configs and what they refuse, before anything is read."""

import importlib
from pathlib import Path

import pytest
import tiny_config

from anoseg_jax import UsageError, config_files, options
from anoseg_jax.evaluation import evaluate
from anoseg_jax.method import defects, losses, models
from configs import ablation, default, folder, mvtec

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize(
    "name", ["default", "mvtec", "cpu", "paper", "folder", "synthetic", "ablation"]
)
def test_every_config_can_be_run(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size = 16
    options.check(config)
    for category in config.categories:
        options.of_category(config, category)
    options.of_variants(config, config.categories)


def test_a_config_that_does_not_exist_is_refused_with_those_that_do():
    assert config_files.load("cpu").image_size == (128, 128)
    with pytest.raises(UsageError, match="config='gpu': there is no such config, only ablation, c"):
        config_files.load("gpu")


def test_categories_are_picked_by_name():
    assert mvtec.get_config("screw,tile").categories == ("screw", "tile")
    assert len(mvtec.get_config().categories) == 15
    assert folder.get_config("bolt:cpu").image_size == (128, 128)
    assert folder.get_config("cpu") == folder.get_config("all:cpu")
    with pytest.raises(ValueError, match="cpu"):
        folder.get_config("bolt:gpu")
    with pytest.raises(ValueError, match="paper"):
        ablation.get_config("bolt:cpu")
    assert ablation.get_config("bolt:paper").image_size == (256, 256)


def test_options_of_a_category_stand_in_for_those_of_the_run():
    config = mvtec.get_config("screw,cable")
    assert options.of_category(config, "screw").augment.rotation == 5
    assert options.of_category(config, "cable").augment.rotation == 0
    assert config.augment.rotation == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, r"batch_size=6 .*4 devices.*example 4"),
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"batch_size": 20, "accumulate": 3}, r"=20 .*4 devices, times accumulate=3.*example 12"),
        ({"image_size": ("a", "b")}, r"image_size=\('a', 'b'\) must be numbers"),
        ({"categories": (3,)}, r"categories=\(3,\) must be names"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"shard": "4/4"}, "shard='4/4' must be i/n with i from 0 to n-1"),
        ({"shard": "1"}, "shard='1' must be i/n"),
        ({"log_every": 0}, "log_every=0"),
        ({"held_out": 1.0}, "held_out=1.0 must be from 0 to less than 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be from 0 to less than 1"),
        ({"evaluate.image_false_positive_rate": -0.1}, "positive_rate=-0.1 must be from 0 to"),
        ({"evaluate.batch_size": 0}, "evaluate.batch_size=0 must be at least 1"),
        ({"model.latent": 0}, "model.latent=0 must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seeds": (0, -1)}, r"seeds=\(0, -1\) must be whole numbers of at least 0"),
        ({"seeds": (0, 0.5)}, r"seeds=\(0, 0.5\) must be whole numbers"),
        ({"seeds": (2, 2)}, "seeds: 2 is named twice"),
        ({"categories": ("a", "b", "a")}, "categories: a is named twice"),
        ({"defects.local_change.depth": (0.5,)}, r"depth=\(0.5,\) must be two numbers"),
        ({"defects.local_change.depth": (0.9, 0.1)}, "smallest and largest"),
        ({"image_size": (30, 32)}, r"30x32.*model.depth=2.*multiples of 4"),
        ({"dataset": "mvtec"}, "dataset='mvtec' must be one of folder, mvtec_ad, synthetic_ad"),
        ({"defects.preset": "hard"}, "defects.preset='hard'"),
        ({"defects.hard_augmentation.grid": 40}, "grid=40"),
        ({"loss.segmentation": "dice"}, "loss.segmentation='dice'"),
        ({"loss.label_smoothing": -0.1}, "loss.label_smoothing=-0.1"),
        ({"model.width": 20}, "model.width=20"),
        ({"detector.width": 20}, "detector.width=20"),
        ({"detector.num_steps": 0}, "detector.num_steps=0"),
        ({"evaluate.image_score": "detector"}, "needs detector.enabled=True"),
        ({"evaluate.image_score": "mean"}, "evaluate.image_score='mean' must be one of map"),
        ({"image_size": (32, 32, 3)}, r"image_size=\(32, 32, 3\) must be height and width"),
        ({"evaluate.pixel_threshold": 128.0}, "pixel_threshold=128 must be from 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused_with_key_value_and_remedy(changes, message):
    config = tiny_config.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(options.OptionError, match=message) as caught:
        options.check(config)
        options.check_devices(config)
    assert "\n" not in str(caught.value)


def test_the_names_that_options_may_have_are_those_of_the_method():
    assert options.CHOICES["defects.preset"] == tuple(defects.PRESETS)
    assert options.CHOICES["loss.segmentation"] == tuple(losses.SEGMENTATION)
    assert options.CHOICES["evaluate.image_score"] == evaluate.IMAGE_SCORES
    assert not set(options.CHOICES["dataset"][1:]) - {path.name for path in DATA.iterdir()}


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 20), ("discriminator_width", 4), ("dtype", "float16"), ("depth", 6)],
)
def test_the_networks_refuse_what_the_options_refuse(key, value):
    config = tiny_config.get_config()
    config.model[key] = value
    with pytest.raises(options.OptionError, match=f"model.{key}"):
        options.check(config)
    with pytest.raises(ValueError, match=f"model.{key}"):
        models.create(config.model, config.loss)
        models.check_size(config.image_size, config.model.depth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps_dir": "/none"}, "maps_dir='/none' is no folder; it holds <category>"),
        ({"maps_dir": "/", "seeds": (1, 2)}, r"maps_dir='/' .*seeds=\(1, 2\) must be empty"),
    ],
)
def test_maps_that_cannot_be_evaluated_are_refused(changes, message):
    config = tiny_config.get_config()
    config.update(changes)
    with pytest.raises(options.OptionError, match=message):
        options.check(config, training=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": -1}, "memory_bank.size=-1 must be at least 0"),
        ({"patch": 1}, "memory_bank.patch=1 must be at least 2"),
        ({"patch": 9}, r"memory_bank.patch=9 must fit a quarter of the image, 8 .*\(32, 32\)"),
        ({"stride": 0}, "memory_bank.stride=0 must be at least 1"),
        ({"stride": 3}, r"memory_bank.stride=3: a quarter of image_size=\(32, 32\) must be a mult"),
        ({"components": 0}, "memory_bank.components=0 must be at least 1"),
        ({"components": 76}, "memory_bank.components=76 must be at most 75"),
        ({"candidates_per_patch": 0}, "memory_bank.candidates_per_patch=0 must be at least 1"),
        ({"num_bank_images": 3}, "memory_bank.num_bank_images=3 must be at least 4"),
        (
            {"distance_weights": (0.5,)},
            r"memory_bank.distance_weights=\(0.5,\) must be two numbers",
        ),
        ({"position_weight": -0.5}, "memory_bank.position_weight=-0.5 must be at least 0"),
    ],
)
def test_a_memory_bank_that_cannot_work_is_refused_by_name(changes, message):
    config = tiny_config.get_config()
    config.memory_bank.update(changes)
    with pytest.raises(options.OptionError, match=message) as caught:
        options.check(config)
    assert "\n" not in str(caught.value)
    if changes != {"size": -1}:
        config.memory_bank.size = 0  # without a bank its other options do not matter
        options.check(config)


def test_a_patch_of_an_odd_side_that_fits_is_allowed():
    config = tiny_config.get_config()
    config.memory_bank.update({"patch": 7, "stride": 4, "components": 147})
    options.check(config)


def test_maps_of_another_method_cannot_be_trained():
    config = tiny_config.get_config()
    config.maps_dir = "/"
    options.check(config, training=False)
    with pytest.raises(options.OptionError, match="maps_dir='/' is for --mode=evaluate"):
        options.check(config)


def test_the_command_line_wins_over_the_options_of_a_category_and_a_variant_over_both():
    config = tiny_config.get_config()
    config.category_options.bolt = {"num_steps": 200, "augment": {"rotation": 5.0, "shift": 0.1}}
    config.category_options.nut = {"num_steps": 300}
    config.variants.long = {"num_steps": 900}
    config.num_steps, config.augment.rotation, config.category_options.nut.num_steps = 20, 1.0, 30
    set_there = ["num_steps", "augment.rotation", "category_options.nut.num_steps"]
    kept = options.keep_overrides(config, set_there)
    bolt, nut = (options.of_category(kept, name) for name in ("bolt", "nut"))
    assert (bolt.num_steps, bolt.augment.rotation, bolt.augment.shift) == (20, 1.0, 0.1)
    assert nut.num_steps == 30
    variant = options.of_variants(kept, ["bolt"])["long"]
    assert options.of_category(variant, "bolt").num_steps == 900
    assert config.category_options.bolt.num_steps == 200


def test_paths_at_home_and_square_images_are_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = tiny_config.get_config()
    config.update({"data_dir": "~/parts", "maps_dir": "~", "resume": "~/a~b", "image_size": (64,)})
    config.category_options.bolt = {"image_size": (96,), "resume": "~/bolt"}
    config = options.normalize(config)
    assert (config.data_dir, config.maps_dir) == ("/somewhere/parts", "/somewhere")
    assert config.resume == "/somewhere/a~b" and config.image_size == (64, 64)
    config.maps_dir = ""
    bolt = options.of_category(config, "bolt")
    assert bolt.resume == "/somewhere/bolt" and bolt.image_size == (96, 96)


def test_an_unknown_option_of_a_category_is_refused():
    config = tiny_config.get_config()
    config.category_options.bolt = {"augmentation": {"flip_horizontal": True}}
    with pytest.raises(options.OptionError, match="category_options.bolt.*augmentation") as error:
        options.of_category(config, "bolt")
    assert len(str(error.value)) < 120
    config.category_options.bolt = {"layout": "btad"}
    with pytest.raises(options.OptionError, match="bolt: layout is the same for all categories"):
        options.of_category(config, "bolt")


def test_each_row_of_the_ablation_adds_one_part():
    """Whatever a category says about that part; what else it says stays."""
    config = ablation.get_config("screw,magnetic_tile")
    config.batch_size = 16
    config.category_options.screw.model = {"coords": True}
    rows = options.of_variants(config, config.categories)
    assert list(rows) == list(ablation.ROWS)
    screws = [options.of_category(row, "screw") for row in rows.values()]
    parts = [
        (
            s.defects.preset,
            *(s.loss.adversarial_weight, s.loss.reconstruction_weight),
            *(s.model.coords, s.memory_bank.size),
        )
        for s in screws
    ]
    defaults = default.get_config()
    assert parts == [
        ("plain", 0, 0, False, 0),
        ("paper", 0, 0, False, 0),
        ("paper", 0.01, 1, False, 0),
        ("paper", 0.01, 1, True, 0),
        (defaults.defects.preset, 0.01, 1, True, defaults.memory_bank.size),
    ]
    for screw in screws:
        assert screw.augment.rotation == 5 and not screw.variants and not screw.category_options
        screw.update({"defects": {"preset": "plain"}, "model": {"coords": True}})
        screw.memory_bank.size = 0
        screw.loss = screws[0].loss
    assert all(screw == screws[0] for screw in screws)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("thin", {"model": {"widht": 8}}, "variants.thin: .*widht"),
        ("hard", {"defects": {"preset": "hard"}}, "variants.hard: defects.preset='hard' must be"),
        ("later", {"seeds": (1, 2)}, "variants.later: seeds is the same for all variants"),
        ("a/b", {"num_steps": 3}, "variants.a/b: the name"),
    ],
)
def test_a_variant_that_cannot_work_is_refused_by_name(name, changes, message):
    config = tiny_config.get_config()
    config.variants[name] = changes
    with pytest.raises(options.OptionError, match=message) as caught:
        options.of_variants(config, ["bolt"])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_and_a_wrong_type_fail_at_once():
    config = tiny_config.get_config().lock()
    with pytest.raises((AttributeError, KeyError)):
        config.learning_rat = 1.0
    with pytest.raises(TypeError):
        config.num_steps = "many"

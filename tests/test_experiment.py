"""Runs of many units: what each writes, in one command or shared out, and what a failure costs."""

import errno
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny_config
from PIL import Image

from anoseg_jax import experiment, shards
from anoseg_jax.evaluation import evaluate
from anoseg_jax.evaluation.results import assemble, write_category
from anoseg_jax.report import pictures, plots
from anoseg_jax.running import progress, versions
from data import sources
from data.synthetic_ad import synthetic_ad_dataset_builder as synthetic

CATEGORIES = ("bolt", "nut", "washer")
SPLITS = dict.fromkeys(("screw", "tile", "wood"), sources.Splits(None, None))


def evaluation_of(config, folder, splits, *, training):
    """Stands in for run_category: every metric is of the options and the category."""
    folder.mkdir(parents=True, exist_ok=True)
    if training and (folder / "broken").exists():
        raise FileNotFoundError("broken")
    value = 0.1 * config.seed + 0.5 * config.model.coords + 0.01 * len(config.categories[0])
    metrics = dict.fromkeys(evaluate.METRICS, value)
    metrics |= {"not_available": {}, "steps": config.num_steps, "train_seconds": 1.0}
    images = {"image": np.zeros((0, 8, 8, 3), np.uint8), "mask": np.zeros((0, 8, 8), bool)}
    unknown = dict.fromkeys(("pixel", "image"), {"threshold": None, "how": "none"})
    evaluation = evaluate.measure([], metadata={"thresholds": unknown}, image_size=(8, 8))
    evaluation.results |= metrics
    return evaluation, images


@pytest.fixture
def run(monkeypatch):
    """Runs all of a config, or a shard of it; with seeds there are variants, too."""
    monkeypatch.setattr(experiment, "run_category", evaluation_of)
    monkeypatch.setattr(plots, "draw_plot", lambda plot: "<svg></svg>")

    def run(workdir, shard="", **changes):
        config = tiny_config.get_config()
        config.update({"seeds": (1, 2), "shard": shard, **changes})
        if config.seeds:
            config.variants.without = {"model": {"coords": False}}
            config.variants.coordinates = {"model": {"coords": True}}
        command = "python launch.py --config=c" + f" --config.shard={shard}" * bool(shard)
        return experiment.run(config, workdir, SPLITS, training=True, command=command)

    return run


def files(workdir):
    """Returns the content of all files that are not hidden (locks are) by their path."""
    paths = [path for path in workdir.rglob("[!.]*") if path.is_file()]
    return {path.relative_to(workdir): path.read_bytes() for path in paths}


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40])
def test_every_unit_is_in_one_shard(count):
    plan = {"variants": ["a", "b"], "seeds": [0, 1], "categories": ["screw", "tile", "wood"]}
    units = [unit for index in range(count) for unit in shards.units_of(plan, (index, count))]
    assert len(set(units)) == len(units) == 12
    assert set(units) == set(shards.units_of(plan))
    sizes = {len(shards.units_of(plan, (index, count))) for index in range(count)}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seeds", [(), (1, 2)])
def test_merged_shards_are_what_one_command_writes(run, tmp_path, seeds):
    assert run(tmp_path / "one", seeds=seeds) == []
    for index in (4, 0, 2, 1, 3):  # in any order
        assert run(tmp_path / "many", f"{index}/5", seeds=seeds) == []
        written = set(files(tmp_path / "many"))
        assert not {path.name for path in written} & {"results.md", "report.html"}
        assert all(path.parent.name in SPLITS for path in written - {Path("run.json")})
    assert shards.merge(tmp_path / "many") == []
    one, many = files(tmp_path / "one"), files(tmp_path / "many")
    plan = json.loads(many.pop(Path("run.json")))
    assert plan["categories"] == list(SPLITS) and plan["command"] == "python launch.py --config=c"
    assert many == one
    assert {"results.json", "report.html"} <= {path.name for path in many}
    assert (Path("ablation.md") in many) == bool(seeds)


def test_variants_are_run_in_order_and_again_in_the_same_way(run, tmp_path, monkeypatch):
    """The same folders with the same options: what is finished there is not trained again."""
    calls = []

    def run_category(config, folder, splits, *, training):
        table_exists = (tmp_path / "ablation.md").exists()
        calls.append((str(folder.relative_to(tmp_path)), config.to_json(), table_exists))
        if folder.name == "tile" and config.seed == 2 and not config.model.coords:
            raise FileNotFoundError("no checkpoint")
        return evaluation_of(config, folder, splits, training=training)

    monkeypatch.setattr(experiment, "run_category", run_category)
    assert run(tmp_path) == ["without/seed_2/tile: no checkpoint"]
    folders, configs, table_exists = zip(*calls, strict=True)
    assert list(folders) == [
        f"{variant}/seed_{seed}/{category}"
        for variant in ("without", "coordinates")
        for seed in (1, 2)
        for category in SPLITS
    ]
    assert table_exists == (False,) * 6 + (True,) * 6
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert table["variants"] == ["without", "coordinates"]
    assert table["command"] == "python launch.py --config=c"
    difference = table["categories"]["screw"]["coordinates"]["iou"]["difference"]
    assert difference == pytest.approx(0.5)
    assert table["steps"]["screw"] == [6]
    assert "- without/seed_2/tile: no checkpoint" in (tmp_path / "ablation.md").read_text()
    run(tmp_path)
    assert tuple(config for _, config, _ in calls[12:]) == configs


def test_the_page_of_a_run_is_written_after_each_category(run, tmp_path, monkeypatch):
    page, texts = tmp_path / "report.html", []

    def evaluate_and_read(config, folder, splits, *, training):
        texts.append(page.read_text() if page.exists() else "")
        return evaluation_of(config, folder, splits, training=training)

    monkeypatch.setattr(experiment, "run_category", evaluate_and_read)
    (tmp_path / "tile").mkdir()
    (tmp_path / "tile" / "broken").touch()
    assert run(tmp_path, seeds=()) == ["tile: broken"]
    assert [text.count("not done yet") for text in texts] == [0, 2, 1]
    assert [text.count("failed: broken") for text in [*texts, page.read_text()]] == [0, 0, 1, 1]
    assert "not done yet" not in page.read_text()


def test_what_is_missing_and_what_differs_is_named(run, tmp_path):
    run(tmp_path, "0/2")
    broken = tmp_path / "without" / "seed_1" / "tile" / "broken"
    broken.parent.mkdir(parents=True)
    broken.touch()
    assert run(tmp_path, "1/2") == ["without/seed_1/tile: broken"]
    why = "has no results.json: its shard failed, or is not done"
    assert shards.merge(tmp_path) == [f"{broken.parent}: {why}"]
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert table["failures"] == [f"{broken.parent}: {why}"]
    results = json.loads((broken.parents[1] / "results.json").read_text())
    assert list(results["categories"]) == ["screw", "wood"]
    broken.unlink()
    run(tmp_path, "1/2", num_steps=7)
    first, *others = shards.merge(tmp_path)
    assert f"{broken.parents[1]}: the config_sha256 of its categories differ" in first
    assert len(others) == 3
    categories = json.loads((broken.parents[1] / "results.json").read_text())["categories"]
    assert list(categories) == ["screw", "tile", "wood"]


def test_shards_on_other_machines_are_both_named(tmp_path, monkeypatch):
    for name, version in (("screw", "3.11"), ("tile", "3.12")):
        monkeypatch.setattr(versions, "versions", lambda v=version: {"python": v, "jax": "0.10"})
        results = {**dict.fromkeys(evaluate.METRICS, 0.5), "not_available": {}}
        write_category(tmp_path / name, results, config="{}", command="c")
    assemble(tmp_path, ["screw", "tile"])
    made = json.loads((tmp_path / "results.json").read_text())
    assert made["versions"] == {"python": "3.11; 3.12", "jax": "0.10"} and made["command"] == "c"


def test_shards_may_prepare_the_same_data_at_once(tmp_path, monkeypatch):
    draw, prepare = synthetic.drawing.examples, synthetic.Builder.download_and_prepare
    monkeypatch.setattr(synthetic.drawing, "examples", lambda *args: islice(draw(*args), 2))

    def be_slower(builder, **options):
        prepare(synthetic.Builder(config="weave", data_dir=tmp_path), **options)
        raise FileExistsError("cannot rename")

    monkeypatch.setattr(synthetic.Builder, "download_and_prepare", be_slower)
    splits = sources.open_splits("synthetic_ad", ("weave",), data_dir="", tfds_dir=str(tmp_path))
    weave = splits["weave"]
    assert [int(split.cardinality()) for split in (weave.train, weave.test)] == [2, 2]


@pytest.fixture
def three_categories(tmp_path):
    """Options that evaluate the maps of three categories; data and maps are in `tmp_path`."""
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        for name in ("train/good/0", "train/good/1", "test/good/0", "test/hole/1"):
            path = tmp_path / "data" / category / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
            if name.startswith("test"):
                path = tmp_path / "maps" / category / f"{name.removeprefix('test/')}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, rng.random((32, 32), np.float32))
    config = tiny_config.get_config()
    config.data_dir, config.maps_dir = str(tmp_path / "data"), str(tmp_path / "maps")
    return config


def fill_the_disk(folder, *arguments):
    if folder.parent.name == "nut":
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/best.png")


def break_the_program(train, *arguments, **options):
    if break_the_program.calls.pop(0):
        raise AssertionError("what nobody expected")
    return {}


@pytest.mark.parametrize("fault", ["unreadable", "disk_full", "bug"])
def test_a_category_that_breaks_costs_one_line_and_no_other_category(
    three_categories, tmp_path, monkeypatch, capsys, fault
):
    splits = sources.open_splits("folder", ("all",), data_dir=three_categories.data_dir)
    if fault == "unreadable":  # after the check: a network drive is gone
        (tmp_path / "data" / "nut" / "test" / "hole" / "1.png").unlink()
    elif fault == "disk_full":
        monkeypatch.setattr(pictures, "write_pictures", fill_the_disk)
    else:
        break_the_program.calls = [False, True, False]
        monkeypatch.setattr(evaluate, "evaluate_baselines", break_the_program)
    monkeypatch.setattr(progress, "ANNOUNCE_AFTER", 3600.0)  # a slow machine says what it waits for
    workdir = tmp_path / "w"
    (failure,) = experiment.run(three_categories, workdir, splits, training=False, command="c")
    assert failure.startswith("nut: ") and "\n" not in failure
    assert capsys.readouterr().err == f"error: {failure}\n"
    expected = {"unreadable": "1.png", "disk_full": "No space left", "bug": "what nobody expected"}
    assert expected[fault] in failure
    assert (workdir / "nut" / "error.txt").exists() == (fault == "bug")
    categories = json.loads((workdir / "results.json").read_text())["categories"]
    complete = ["bolt", "nut", "washer"] if fault == "disk_full" else ["bolt", "washer"]
    assert list(categories) == complete
    assert (workdir / "washer" / "report.html").exists()

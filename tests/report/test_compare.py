"""Comparison of runs: from files to differences, and intervals that mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawings import draw_squares
from result_files import write_results

from anoseg_jax.evaluation import METRICS, evaluate, intervals, metrics, pixel_tables
from anoseg_jax.evaluation.results import (
    Evaluation,
    ResultsError,
    mean_of,
    write_evaluation,
)
from anoseg_jax.report import compare

ROOT = Path(__file__).resolve().parents[2]
PIXEL = ("pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro", "au_pro_0.05")


def scene(*, noise, n=24, size=(16, 20), seed=0):
    """Returns float32 maps, masks and labels: the first half good, squares in the others."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), bool)
    draw_squares(rng, masks[n // 2 :], 5)
    maps = 0.2 + 0.4 * masks + noise * rng.standard_normal(masks.shape)
    return np.clip(maps, 0, 1).astype(np.float32), masks, masks.any(axis=(1, 2))


def eight_bits(maps):
    return np.round(255 * maps).astype(np.uint8)


def histograms(maps, masks):
    return np.stack([metrics.level_histograms(*pair) for pair in zip(maps, masks, strict=True)])


def results_of(maps, masks, labels, has_mask=None):
    known = np.ones(len(maps), bool) if has_mask is None else has_mask
    pixel = metrics.segmentation_metrics(
        maps, [mask if is_known else None for mask, is_known in zip(masks, known, strict=True)]
    )
    image = metrics.image_metrics(maps.mean(axis=(1, 2)), labels)
    both = image | pixel
    both["not_available"] = image["not_available"] | pixel["not_available"]
    return {
        **{name: both[name] for name in METRICS},
        "not_available": both["not_available"],
        "params_sha256": "0" * 64,
        "train_seconds": 2.5,
        "steps": 4,
    }


def write_category(workdir, name, maps, masks, labels, *, names=None, has_mask=None, change=None):
    """Writes the files of write_results and write_evaluation for any maps."""
    folder = workdir / name
    folder.mkdir(parents=True)
    path = workdir / "results.json"
    categories = json.loads(path.read_text())["categories"] if path.exists() else {}
    categories[name] = results_of(maps, masks, labels, has_mask) | (change or {})
    everything = {"categories": categories, "mean": mean_of(categories)}
    path.write_text(json.dumps(everything))
    names = names or [f"test/{index:03d}.png" for index in range(len(maps))]
    known = np.ones(len(maps), bool) if has_mask is None else has_mask
    columns = ("name", "defect_type", "label", "score", "has_mask", "iou")
    types, scores = np.where(labels, "dent", "good"), maps.mean(axis=(1, 2)).tolist()
    rows = zip(names, types, labels.astype(int), scores, known, [None] * len(maps), strict=True)
    images = [dict(zip(columns, row, strict=True)) for row in rows]
    evaluation = Evaluation({}, images, eight_bits(maps), masks, {})
    write_evaluation(folder, evaluation, {"image": masks, "mask": masks}, store_maps=False)
    return workdir


@pytest.fixture
def two_runs(tmp_path):
    """A and B on the same images of one category; B's maps have a quarter of the noise of A's."""
    return [
        write_category(tmp_path / name, "screw", *scene(noise=noise))
        for name, noise in (("A", 0.4), ("B", 0.1))
    ]


# Metrics from histograms.


def saturated(rng, shape):
    return np.where(rng.random(shape) < 0.7, np.where(rng.random(shape) < 0.5, 0, 255), 128)


MAPS = {
    "random": lambda rng, shape: rng.integers(0, 256, shape),
    "tied": lambda rng, shape: 51 * rng.integers(0, 6, shape),
    "saturated": saturated,
    "constant": lambda rng, shape: np.full(shape, 7),
}


@pytest.mark.parametrize("kind", MAPS)
def test_histograms_equal_the_metrics_of_repeated_8_bit_maps(kind):
    """The weights are how often each image is repeated, none included."""
    rng = np.random.default_rng(1)
    _, masks, labels = scene(noise=0.1, n=10)
    maps = MAPS[kind](rng, masks.shape).astype(np.uint8)
    maps[masks] = np.maximum(maps[masks], maps[masks][::-1])  # better than chance
    counts = histograms(maps, masks)
    for weights in intervals.resample_weights(labels, 5, rng):
        from_histograms, _ = intervals.histogram_metrics(np.tensordot(weights, counts, 1))
        again = np.repeat(np.arange(len(maps)), weights.astype(int))
        exact = metrics.segmentation_metrics(maps[again].astype(np.float32) / 255, masks[again])
        for name in metrics.PIXEL_METRICS:
            assert from_histograms[name] == pytest.approx(exact[name], abs=1e-12), name


def test_histograms_by_hand():
    """A region of 2 pixels and, touching by a corner, none; one of 1 pixel elsewhere."""
    masks = np.zeros((1, 3, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 2, 3] = True
    maps = np.zeros((1, 3, 4), np.uint8)
    maps[0, 0, 0], maps[0, 1, 1], maps[0, 2, 3], maps[0, 0, 3] = 9, 255, 255, 9
    normal, defect, regions = histograms(maps, masks)[0]
    assert normal[0] == 8 and normal[9] == 1 and normal.sum() == 9
    assert defect[9] == 1 and defect[255] == 2 and defect.sum() == 3
    assert regions[9] == 0.5 and regions[255] == 1.5 and regions.sum() == 2


def test_no_defect_pixels_is_none():
    assert intervals.histogram_metrics(np.eye(3, 256)[[0, 1, 1]] * [[1], [0], [0]]) is None


def test_eight_bits_move_a_metric_by_no_more_than_the_bound():
    for seed, noise in enumerate((0.1, 0.2, 0.4)):
        maps, masks, _ = scene(noise=noise, seed=seed)
        maps = maps**4  # crowded at 0, as trained maps are
        counts = histograms(eight_bits(maps), masks).sum(axis=0)
        from_histograms, bounds = intervals.histogram_metrics(counts)
        exact = metrics.segmentation_metrics(maps, masks)
        for name in PIXEL:
            assert abs(from_histograms[name] - exact[name]) <= bounds[name] + 1e-12, name
        assert bounds["pixel_auroc"] > 0


def test_image_auroc_equals_that_of_repeated_images():
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(0, 8, 30) / 8, rng.random(30) < 0.4
    weights = intervals.resample_weights(labels, 20, rng)
    aurocs = intervals.image_auroc(scores, labels, weights)
    for row, value in zip(weights.astype(int), aurocs, strict=True):
        exact = metrics.image_metrics(np.repeat(scores, row), np.repeat(labels, row))
        assert value == pytest.approx(exact["image_auroc"], abs=1e-12)


def test_image_auroc_by_hand():
    """Pairs: 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4; with the good 2 twice and no 1: 3 of 4."""
    scores, labels = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    weights = np.array([[1, 1, 1, 1], [0, 2, 1, 1]], float)
    assert intervals.image_auroc(scores, labels, weights).tolist() == [3.5 / 4, 3 / 4]


# Resampling and intervals.


def test_a_resample_has_as_many_of_each_stratum():
    strata = np.array([0, 1, 0, 1, 1, 2])
    weights = intervals.resample_weights(strata, 50, np.random.default_rng(0))
    assert weights.shape == (51, 6) and (weights[0] == 1).all()
    for stratum in range(3):
        assert (weights[:, strata == stratum].sum(axis=1) == (strata == stratum).sum()).all()
    assert weights[1:, :5].std() > 0.5 and (weights[:, 5] == 1).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Scores of normal distributions one apart: the AUROC is Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(3)
    labels = np.arange(80) < 40
    covered = 0
    for _ in range(200):
        scores = rng.standard_normal(80) + labels
        weights = intervals.resample_weights(labels, 300, rng)
        low, high = np.quantile(intervals.image_auroc(scores, labels, weights)[1:], [0.025, 0.975])
        covered += low <= 0.76025 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_a_clearly_better_run_is_marked_and_the_reverse_too(two_runs):
    comparison = compare.compare(two_runs, bootstrap=200)
    assert comparison["metrics"] == list(METRICS) and comparison["baseline"] == "A"
    values = comparison["categories"]["screw"]["values"]
    for metric, difference in comparison["categories"]["screw"]["differences"]["B"].items():
        assert difference["clear"] == "better" or metric == "image_auroc", metric
        assert difference["value"] == values["B"][metric]["value"] - values["A"][metric]["value"]
        assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert "better**" in compare.as_markdown(comparison)
    reverse = compare.compare(two_runs[::-1], bootstrap=200)["categories"]["screw"]
    assert reverse["differences"]["A"]["pixel_ap"]["clear"] == "worse"


def test_values_are_those_of_results_json_with_the_interval_around(two_runs):
    values = compare.compare(two_runs, bootstrap=200)["categories"]["screw"]["values"]
    for run in two_runs:
        exact = json.loads((run / "results.json").read_text())["categories"]["screw"]
        for metric, value in values[run.name].items():
            assert value["value"] == exact[metric] and value["std"] is None
            assert value["interval"][0] <= exact[metric] <= value["interval"][1]
            assert value["error"] <= value["bound"] + 1e-9 and value["reason"] is None


def test_a_run_and_itself_differ_by_exactly_nothing(two_runs):
    """Whatever the order of the images in the files."""
    maps, masks, labels = (array[::-1] for array in scene(noise=0.4))
    names = [f"test/{index:03d}.png" for index in range(24)][::-1]
    same = write_category(two_runs[0].parent / "same", "screw", maps, masks, labels, names=names)
    for runs in ([two_runs[0], two_runs[0]], [two_runs[0], same]):
        comparison = compare.compare(runs, bootstrap=50)
        (differences,) = comparison["categories"]["screw"]["differences"].values()
        for metric, difference in differences.items():
            assert abs(difference["value"]) < 1e-12 and difference["clear"] is None
            assert np.abs(difference["interval"]).max() < 1e-12, metric
            if same not in runs:
                assert difference["value"] == 0 and difference["interval"] == [0, 0]
    assert [*compare.compare([same, same], bootstrap=2)["runs"]] == [f"{same} (1)", f"{same} (2)"]


def test_the_same_files_give_the_same_comparison(two_runs):
    assert compare.compare(two_runs, bootstrap=20) == compare.compare(two_runs, bootstrap=20)


def test_the_mean_is_over_categories_and_its_interval_narrower(tmp_path):
    runs = []
    for name, noise in (("A", 0.4), ("B", 0.1)):
        for index, category in enumerate(("screw", "tile")):
            write_category(tmp_path / name, category, *scene(noise=noise, seed=index))
        runs.append(tmp_path / name)
    comparison = compare.compare(runs, bootstrap=100)
    for metric in METRICS:
        of = [category["values"]["A"][metric] for category in comparison["categories"].values()]
        mean = comparison["mean"]["values"]["A"][metric]
        assert mean["value"] == pytest.approx(np.mean([value["value"] for value in of]))
        assert mean["of"] == 2
        widths = [np.ptp(value["interval"]) for value in of]
        assert np.ptp(mean["interval"]) < max(widths)
    assert comparison["mean"]["differences"]["B"]["pixel_ap"]["clear"] == "better"
    assert "| **mean** |" in compare.as_markdown(comparison)


def test_seeds_are_found_and_their_spread_is_given(tmp_path):
    maps, masks, labels = scene(noise=0.1)
    for name, noises in (("A", (0.1, 0.2, 0.3)), ("B", (0.1,))):
        for seed, noise in zip((10, 2, 1), noises, strict=False):
            folder = tmp_path / name / f"seed_{seed}"
            write_category(folder, "screw", *scene(noise=noise))
    comparison = compare.compare([tmp_path / "A", tmp_path / "B"], bootstrap=100)
    assert comparison["runs"]["A"]["seeds"] == ["1", "2", "10"]
    value = comparison["categories"]["screw"]["values"]["A"]["pixel_ap"]
    assert value["value"] == pytest.approx(np.mean(value["seeds"]))
    assert value["std"] == pytest.approx(np.std(value["seeds"], ddof=1))
    assert value["interval"][0] < value["value"] < value["interval"][1]
    assert comparison["categories"]["screw"]["values"]["B"]["pixel_ap"]["std"] is None
    assert " ± " in compare.as_markdown(comparison)
    (tmp_path / "A" / "seed_2" / "results.json").unlink()
    with pytest.raises(ResultsError, match=r"seed_2 has no results.json"):
        compare.compare([tmp_path / "A", tmp_path / "B"])


# What cannot be compared.


def test_other_images_are_said_and_not_paired(two_runs):
    maps, masks, labels = scene(noise=0.2)
    names = [f"test/{index:03d}.png" for index in range(1, 25)]
    other = write_category(two_runs[0].parent / "C", "screw", maps, masks, labels, names=names)
    comparison = compare.compare([two_runs[0], other], bootstrap=20)
    difference = comparison["categories"]["screw"]["differences"]["C"]["iou"]
    assert difference["value"] > 0 and difference["interval"] is None and not difference["clear"]
    assert difference["reason"].startswith("not the same images: 1 only in the one, 1 only in")
    assert comparison["categories"]["screw"]["values"]["C"]["iou"]["interval"] is not None
    assert comparison["mean"]["differences"]["C"]["iou"]["interval"] is None
    assert "not the same images: 1 only" in compare.as_markdown(comparison)


@pytest.mark.parametrize("what", ("masks", "labels"))
def test_another_truth_is_said_and_not_paired(two_runs, what):
    maps, masks, labels = scene(noise=0.2)
    if what == "masks":
        masks[-1] = ~masks[-1]
    else:
        labels[0] = True
    other = write_category(two_runs[0].parent / "C", "screw", maps, masks, labels)
    screw = compare.compare([two_runs[0], other], bootstrap=20)["categories"]["screw"]
    reason = screw["differences"]["C"]["iou"]["reason"]
    assert reason.startswith("not the same truth") and what[:4] in reason


def test_none_is_a_dash_with_its_reason(two_runs):
    maps, masks, labels = scene(noise=0.2)
    has_mask = ~labels  # no defect is annotated
    bare = write_category(two_runs[0].parent / "C", "screw", maps, masks, labels, has_mask=has_mask)
    comparison = compare.compare([two_runs[0], bare], bootstrap=20)
    value = comparison["categories"]["screw"]["values"]["C"]["iou"]
    assert value["value"] is None and value["reason"] == pixel_tables.NO_DEFECTS
    difference = comparison["categories"]["screw"]["differences"]["C"]["iou"]
    assert difference["value"] is None and difference["reason"] == "no value in C"
    assert comparison["mean"]["values"]["A"]["iou"]["value"] is None
    table = compare.as_markdown(comparison)
    assert "| - | - |" in table
    assert "C, no value of pixel_auroc, pixel_ap, iou, pixel_f1_max, au_pro: no defect" in table
    assert comparison["categories"]["screw"]["values"]["C"]["image_auroc"]["interval"] is not None


def test_images_without_a_mask_count_in_image_metrics_only(tmp_path):
    maps, masks, labels = scene(noise=0.1)
    has_mask = np.arange(24) % 3 > 0
    run = write_category(tmp_path / "A", "screw", maps, masks, labels, has_mask=has_mask)
    values = compare.compare([run, run], bootstrap=20)["categories"]["screw"]["values"]
    for value in next(iter(values.values())).values():
        assert value["interval"] is not None and value["error"] < 0.01


def test_files_that_do_not_fit_give_no_interval_and_no_exception(two_runs):
    first, second = two_runs
    path = second / "screw" / "histograms.npz"
    whole = path.read_bytes()

    def reason():
        screw = compare.compare(two_runs, bootstrap=5)["categories"]["screw"]
        value = screw["values"]["B"]["iou"]
        assert value["value"] is not None and value["interval"] is None
        assert screw["differences"]["B"]["iou"]["value"] is not None
        return value["reason"]

    for content in (whole[:100], b""):
        path.write_bytes(content)
        assert "histograms.npz cannot be read" in reason()
    rows = second / "screw" / "images.csv"
    path.write_bytes(whole)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:-1]))
    assert "histograms.npz has 24 images and images.csv 23" in reason()
    rows.write_text("\n".join(lines))
    path.write_bytes((first / "screw" / "histograms.npz").read_bytes())
    assert "of another evaluation" in reason()
    path.unlink()
    assert "histograms.npz is not there. --mode=evaluate writes it." in reason()


def test_maps_too_low_for_8_bits_give_no_interval(two_runs):
    """All below half of 1 / 255: the levels are all 0, the metric is far from 0.5."""
    maps, masks, labels = scene(noise=0.1)
    low = write_category(two_runs[0].parent / "C", "screw", maps / 1000, masks, labels)
    values = compare.compare([two_runs[0], low], bootstrap=5)["categories"]["screw"]["values"]["C"]
    assert values["pixel_auroc"]["reason"].startswith(
        "the files of its images give 0.5000, results"
    )
    assert values["image_auroc"]["interval"] is not None


def test_categories_missing_in_a_run_are_listed(two_runs):
    write_category(two_runs[0], "tile", *scene(noise=0.2))
    comparison = compare.compare(two_runs, bootstrap=5)
    assert list(comparison["categories"]) == ["screw"]
    assert comparison["runs"]["A"]["missing"] == [] and comparison["runs"]["B"]["missing"] == [
        "tile"
    ]
    assert "- B lacks tile" in compare.as_markdown(comparison)


def test_errors_are_one_line(two_runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    tile = write_category(tmp_path / "T", "tile", *scene(noise=0.2))
    for runs, message in (
        ([], "at least two runs, got 0"),
        (two_runs[:1], "at least two runs, got 1"),
        ([two_runs[0], tmp_path / "empty"], "empty has no results.json"),
        ([two_runs[0], tmp_path / "nowhere"], "nowhere has no results.json"),
        ([two_runs[0], tmp_path / "broken"], "broken/results.json cannot be read"),
        ([two_runs[0], tile], "no category in common: A has screw; T has tile"),
    ):
        with pytest.raises(ResultsError, match=message) as error:
            compare.compare(runs)
        assert len(str(error.value).splitlines()) == 1


# Files.


def test_the_files_of_evaluate_are_read(tmp_path):
    class Predictor:
        image_size = (16, 20)
        weights_sha256 = "cafe"
        step = 3
        record = {"train_seconds": 1.5}

        def __call__(self, images):
            maps = images[..., 0].astype(np.float32) / 255
            return maps, maps.max(axis=(1, 2))

    maps, masks, labels = scene(noise=0.1)
    batch = {
        "image": np.repeat(eight_bits(maps)[..., None], 3, axis=-1),
        "mask": masks,
        "has_mask": np.ones(24, bool),
        "label": labels.astype(int),
        "defect_type": np.where(labels, "dent", "good"),
        "name": np.array([f"test/{index}.png" for index in range(24)]),
    }
    evaluation = evaluate.evaluate(Predictor(), [batch])
    (tmp_path / "A" / "screw").mkdir(parents=True)
    write_results(tmp_path / "A", "screw", evaluation.results, config="{}", command="")
    write_evaluation(tmp_path / "A" / "screw", evaluation, batch)
    comparison = compare.compare([tmp_path / "A", tmp_path / "A"], bootstrap=20)
    for value in next(iter(comparison["categories"]["screw"]["values"].values())).values():
        assert value["error"] < 1e-6 and value["interval"] is not None


def test_what_is_written_is_the_comparison(two_runs, tmp_path):
    comparison = compare.compare(two_runs, bootstrap=5)
    compare.write(comparison, tmp_path / "W")
    assert json.loads((tmp_path / "W" / "comparison.json").read_text()) == comparison
    assert (tmp_path / "W" / "comparison.md").read_text() == compare.as_markdown(comparison)
    assert sorted(path.name for path in (tmp_path / "W").iterdir()) == [
        "comparison.json",
        "comparison.md",
    ]
    table = (tmp_path / "W" / "comparison.md").read_text()
    assert table.count("| category | A | B | B - A |") == len(METRICS)


def test_it_needs_no_jax(two_runs):
    """Blocked imports: comparisons and pages are made where only the files are."""
    program = (
        "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
        "from anoseg_jax.report import compare, compare_page, pages\n"
        "print(compare.as_markdown(compare.compare(sys.argv[1:], bootstrap=5)))"
    )
    command = [sys.executable, "-c", program, *map(str, two_runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "## au_pro" in done.stdout

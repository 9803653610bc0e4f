"""Errors of use: one line with a remedy, before JAX or TensorFlow are imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from drawings import photo, save

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"jax", "flax", "optax", "orbax", "clu", "tensorflow", "tensorflow_datasets"}
TINY = "--config=tests/tiny_config.py"


def run(*arguments, cwd=ROOT, **environment):
    """Runs the command; returns its exit code, what it says on stderr, and what it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "launch.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    lines = done.stderr.splitlines()
    imports = [line for line in lines if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "absl" in modules  # this is how imports are seen
    return done.returncode, [line for line in lines if line not in imports], modules


def assert_refused(message, *arguments, **options):
    code, lines, modules = run(*arguments, **options)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    return modules


@pytest.fixture
def data_dir(tmp_path):
    for index in range(4):
        save(photo(index), tmp_path / f"data/bolt/train/good/{index}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --config=FILE"),
        ([TINY], "needs --workdir=DIR"),
        (["--mode=report", "--workdir=/none"], "/none has no results.json"),
        (["--mode=report", "--workdir=w", TINY], "--config does not belong to --mode=report"),
        (["--mode=merge", "--workdir=w", "--devices=2"], "--devices does not belong to"),
        ([TINY, "--workdir=w", "bolt"], "'bolt' does not belong to"),
        (["--mode=check", TINY, "--distributed"], "train or evaluate"),
        (["--mode=compare", "--workdir=w"], "needs the folders of finished runs"),
        (["--mode=merge", "--workdir=/none"], "/none has no run.json: no run with"),
        (["--mode=compare", "--workdir=w", "/none", "/none2"], "/none"),
        ([TINY, "--workdir=w", "--nope"], "--nope: there is no such flag"),
        ([TINY, "--workdr=w"], "--workdr: there is no such flag; did you mean --workdir"),
        ([TINY, "--mode=check", "--config.data_dir=/none"], "/none: is not a folder"),
        (["--mode=check", TINY], "data_dir is missing: --config.data_dir=DIR"),
        ([TINY, "--workdir=w"], "data_dir is missing: --config.data_dir=DIR"),
        (["--config=configs/folder.py:a:b", "--workdir=w"], ": configs/folder.py:a:b: the size"),
        (["--config=cpuu", "--workdir=w"], "no file cpuu; did you mean --config=cpu.*, folder,"),
        (["--config=my/none.py", "--workdir=w"], "no file my/none.py; By name there are ablation"),
        (["--config=synthetic:wave", "--workdir=w"], "no category wave; it has "),
        (["--config=mvtec:nut", "--config.dataset=mvtec_ad", "--workdir=w"], "no category nut;"),
        (["--mode=predict", "--workdir=/none", "--out=o", "tests"], "/none: is not a folder"),
        (["--mode=predict", "--workdir=tests", "--out=o", "/none"], "/none: there is no such"),
        (["--mode=export", "--workdir=tests", "--out=o", "--format=onnx"], "no trained model"),
        (["--mode=serve", "--workdir=tests"], "tests: no trained model in it"),
        (["--mode=serve", "--workdir=w", "--pixel_threshold=3"], "--pixel_threshold=3.* 1"),
    ],
)
def test_errors_of_use_are_one_line_before_jax_is_imported(arguments, message):
    assert not assert_refused(message, *arguments) & HEAVY


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_step=1", "--config.num_step: there is no such option; did you mean --config.num_st"),
        ("model.widht=8", "--config.model.widht: .* did you mean --config.model.width"),
        ("foo=1", "--config.foo: there is no such option; configs/default.py has all"),
        ("num_steps.x=1", "--config.num_steps.x: there is no such option"),
        ("num_steps=x", "--config.num_steps=x: must be a whole number"),
        ("learning_rate=x", "--config.learning_rate=x: must be a number"),
        ("remat=x", "--config.remat=x: must be True or False"),
        ("image_size=x", "image_size=.* must be numbers"),
        ("num_steps=0", "num_steps=0 must be at least 1"),
        ("seeds=(1,1)", "seeds: 1 is named twice"),
        ("resume=/none", "resume='/none': there is no checkpoint; it is the folder of a category"),
        ("image_size=30", "image_size 30x30 does not fit model.depth=2"),
        ("defects.preset=hard", "defects.preset='hard' must be one of default, paper"),
        ("categories=nut", "no category nut in it; categories there: bolt"),
    ],
)
def test_an_option_that_cannot_work_is_named_before_jax_is_imported(data_dir, option, message):
    arguments = (TINY, f"--config.data_dir={data_dir}", f"--workdir={data_dir}/w")
    modules = assert_refused(message, *arguments, f"--config.{option}")
    assert not modules & HEAVY
    assert not (data_dir / "w").exists()


def test_a_flat_folder_of_photographs_is_told_both_ways_out(tmp_path):
    save(photo(1), tmp_path / "0.png")
    arguments = TINY, f"--config.data_dir={tmp_path}", f"--workdir={tmp_path}/w"
    message = f"{tmp_path}/<category>/train/good.*or.*--config.layout=photographs"
    message += rf" \(the category is {tmp_path.name}\)"
    assert not assert_refused(message, *arguments) & HEAVY


def test_the_options_of_categories_are_checked_before_jax_is_imported(data_dir, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import tiny_config\n"
        "def get_config():\n"
        "    config = tiny_config.get_config()\n"
        "    config.category_options.bolt = {'augment': {'rotatoin': 5.0}}\n"
        "    return config\n"
    )
    message = "category_options.bolt: rotatoin: there is no such option; did you mean rotation"
    arguments = f"--config={config}", f"--config.data_dir={data_dir}", f"--workdir={tmp_path}/w"
    assert not assert_refused(message, *arguments) & HEAVY
    config.write_text("def get_config(:\n")
    assert_refused("mine.py: SyntaxError: .*line 1", *arguments)


def test_a_config_is_found_by_name_from_any_folder(data_dir):
    arguments = f"--config.data_dir={data_dir}", "--mode=check"
    for config in ("folder:bolt:cpu", "configs/folder.py:bolt:cpu"):
        code, lines, modules = run(f"--config={config}", *arguments, cwd=data_dir)
        assert (code, lines) == (0, []) and not modules & HEAVY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode=predict", "--out=gs://b/o"], "--out=gs://b/o: must be a local folder"),
        (["--mode=export", "--out=gs://b/o", "--format=onnx"], "--out=gs://b/o: must be a local"),
        (["--mode=predict", "--out=o", "--follow", "gs://b/new"], "--follow needs photographs in"),
    ],
)
def test_a_bucket_is_refused_where_only_a_local_folder_will_do(data_dir, arguments, message):
    (data_dir / "w" / "bolt" / "checkpoints").mkdir(parents=True)
    arguments = arguments if "--mode=export" in arguments else [*arguments, f"{data_dir}/bolt"]
    assert not assert_refused(message, f"--workdir={data_dir}/w", *arguments) & HEAVY


def test_a_bucket_that_cannot_be_reached_is_named():
    message = "File system scheme 's3' not implemented .*s3://none/results.json"
    assert_refused(message, "--mode=report", "--workdir=s3://none", EPATH_USE_TF="1")


def test_a_storage_that_does_not_exist_is_named():
    message = "paths that begin with gss:// cannot be read or written: give a local path, gs:// or"
    assert not assert_refused(message, "--mode=report", "--workdir=gss://bucket/w") & HEAVY


@pytest.mark.parametrize("workdir", ["file", "file/w", "/proc/anoseg"])
def test_a_folder_that_cannot_be_written_to_is_named(data_dir, workdir):
    (data_dir / "file").touch()
    arguments = (TINY, f"--config.data_dir={data_dir}", f"--workdir={data_dir / workdir}")
    modules = assert_refused(f"--workdir={data_dir / workdir}: cannot be written to", *arguments)
    assert not modules & HEAVY


@pytest.mark.skipif(os.getuid() == 0, reason="root may write to every folder")
def test_a_read_only_folder_is_named(data_dir):
    (data_dir / "w").mkdir(mode=0o500)
    arguments = (TINY, f"--config.data_dir={data_dir}", f"--workdir={data_dir}/w")
    assert_refused("w: cannot be written to .Permission denied", *arguments)


@pytest.mark.parametrize("platforms", ["cuda", "gpux"])
@pytest.mark.parametrize("mode", ["train", "dry_run"])
def test_a_device_that_is_not_there_is_named_before_tensorflow_is_imported(
    data_dir, mode, platforms
):
    arguments = (TINY, f"--config.data_dir={data_dir}", f"--workdir={data_dir}/w", f"--mode={mode}")
    modules = assert_refused(
        f"JAX_PLATFORMS={platforms}: JAX finds no such device here.*: unset JAX_PLATFORMS",
        *arguments,
        JAX_PLATFORMS=platforms,
    )
    assert not modules & {"tensorflow", "tensorflow_datasets"}


def test_a_batch_that_the_devices_cannot_divide_is_refused_before_tensorflow_is_imported(data_dir):
    arguments = (TINY, f"--config.data_dir={data_dir}", f"--workdir={data_dir}/w")
    modules = assert_refused(
        r"batch_size=6 must be a multiple of 4 \(4 devices\), for example 4",
        *(*arguments, "--config.batch_size=6"),
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert not modules & {"tensorflow", "tensorflow_datasets"}


PRINT_STEPS = """
import sys
from absl import flags
from anoseg_jax import cli, options

cli.define_flags(sys.argv)
cli.parse(sys.argv)
for name in flags.FLAGS.config.categories:
    print(options.of_category(flags.FLAGS.config, name).num_steps)
"""


def test_the_command_line_wins_over_the_options_of_a_category(tmp_path):
    config = tmp_path / "two.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import tiny_config\n"
        "def get_config(categories):\n"
        "    config = tiny_config.get_config(categories)\n"
        "    config.category_options.bolt = {'num_steps': 200}\n"
        "    config.category_options.nut = {'num_steps': 300}\n"
        "    return config\n"
    )

    def steps(*more):
        done = programs.run(PRINT_STEPS, f"--config={config}:bolt,nut", "--workdir=w", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert steps() == ["200", "300"]
    assert steps("--config.num_steps=20") == ["20", "20"]
    assert steps("--config.category_options.nut.num_steps=30") == ["200", "30"]
    assert steps("--config.num_steps=20", "--config.category_options.nut.num_steps=30") == [
        *("20", "30")
    ]

"""Who may import whom (docs/architecture.md), read from the files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each module may import those after it; the leaves import none of them.
ORDER = (
    *("experiment", "shards", "replay", "compare_page", "ablation", "report", "compare"),
    *("pictures", "evaluate", "torch_weights", "dry_run", "detector", "train", "options"),
    *("predict", "train_state", "train_log"),
)
LEAVES = (
    *("models", "augment", "defects", "losses", "metrics", "checkpoint", "input_pipeline"),
    *("baselines", "peers", "files", "job"),
)
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorboard"}
CLU_WITH_TENSORFLOW = {"clu.metric_writers", "clu.periodic_actions"}


def imports(path, *, only_top_level=False):
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if only_top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(path):
    parts = [name.split(".") for name in imports(path)]
    return {part[1] for part in parts if part[0] == "anoseg_jax"} & {*ORDER, *LEAVES}


def test_every_module_has_its_place():
    there = {path.stem for path in (ROOT / "anoseg_jax").glob("*.py")} - {"__init__"}
    assert there == {*ORDER, *LEAVES}


@pytest.mark.parametrize("module", LEAVES)
def test_a_leaf_imports_no_sibling(module):
    assert not siblings(ROOT / "anoseg_jax" / f"{module}.py")


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down_the_list_only(module):
    below = {*ORDER[ORDER.index(module) + 1 :], *LEAVES}
    if module != "experiment":
        below.remove("input_pipeline")
    assert siblings(ROOT / "anoseg_jax" / f"{module}.py") <= below


def test_only_launch_and_data_import_data_and_nothing_imports_configs():
    for path in (ROOT / "anoseg_jax").glob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"data", "configs", "tests"}, path
    assert not any(n.startswith("configs") for n in imports(ROOT / "launch.py"))


def test_tensorflow_has_one_door():
    for path in (ROOT / "anoseg_jax").glob("*.py"):
        if path.stem in ("input_pipeline", "experiment"):  # the door, and the room behind it
            continue
        names = imports(path, only_top_level=True)
        assert not {name.split(".")[0] for name in names} & TENSORFLOW, path
        assert not {".".join(name.split(".")[:2]) for name in names} & CLU_WITH_TENSORFLOW, path

"""Which module may import which (docs/architecture.md), read from the files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A group may import the groups to its right only; modules of one folder, and cli and the modules
# beside it, may import each other.
FOLDERS = (
    *(("cli", "api", "experiment", "dry_run"), ("shards", "options", "config_files")),
    *(("deploy", "interop", "report"), ("evaluation",), ("method",), ("running", "images")),
)
# Within method/, where modules of one group may not import each other.
METHOD = (
    *(("detector",), ("train",), ("predict", "thresholds", "train_state")),
    ("models", "memory_bank", "defects", "augment", "losses"),
    ("shapes",),
)
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorboard", "clu.metric_writers")


def module_name(path):
    """Returns the name below anoseg_jax, such as "method.train"."""
    parts = path.relative_to(ROOT / "anoseg_jax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PATHS = {module_name(path): path for path in (ROOT / "anoseg_jax").rglob("*.py")}
MODULES = sorted(PATHS.keys() - {""})


def imports(path, *, only_top_level=False):
    """Returns the dotted names that a file imports, also those of single functions."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if only_top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module, **options):
    """Returns the modules of anoseg_jax that one of them imports."""
    names = {
        name.removeprefix("anoseg_jax.")
        for name in imports(PATHS[module], **options)
        if name.startswith("anoseg_jax.")
    }
    known = names & PATHS.keys()
    return known | {name.rpartition(".")[0] for name in names - known} - {""}


def group_of(name, groups):
    return next((i for i, group in enumerate(groups) if name in group), None)


def test_every_module_has_its_place():
    folders = {module.partition(".")[0] for module in MODULES}
    assert folders == {name for group in FOLDERS for name in group}
    modules = {module.removeprefix("method.") for module in MODULES if "method." in module}
    assert modules == {name for group in METHOD for name in group}


@pytest.mark.parametrize("module", MODULES)
def test_folders_import_folders_to_the_right_only(module):
    folder = module.partition(".")[0]
    for imported in imported_modules(module):
        other = imported.partition(".")[0]
        if other == folder or {other, folder} <= set(FOLDERS[0]):
            continue
        assert group_of(other, FOLDERS) > group_of(folder, FOLDERS), imported


@pytest.mark.parametrize("module", [name for group in METHOD for name in group])
def test_the_methods_modules_import_modules_to_the_right_only(module):
    for imported in imported_modules(f"method.{module}"):
        if imported.startswith("method."):
            other = imported.removeprefix("method.")
            assert group_of(other, METHOD) > group_of(module, METHOD), imported


def test_only_cli_imports_data_and_nothing_imports_configs():
    for module, path in PATHS.items():
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"configs", "tests"} and (module == "cli" or "data" not in tops), path


def test_importing_a_module_imports_no_tensorflow_but_for_the_input_pipeline():
    """And experiment, which imports the input pipeline."""
    with_tensorflow = {
        module
        for module in PATHS
        for name in imports(PATHS[module], only_top_level=True)
        if name.startswith(TENSORFLOW)
    }
    assert with_tensorflow == {"images.input_pipeline"}
    for module in MODULES:
        if with_tensorflow & imported_modules(module, only_top_level=True):
            assert module == "experiment"
        if module != "cli":
            assert "experiment" not in imported_modules(module)

"""Finds the files of configs/ and data/: in the checkout, or where the wheel has put them."""

import difflib
import importlib
import sys

from etils.epath import Path
from ml_collections import ConfigDict

from anoseg_jax import UsageError


def root() -> Path:
    """Returns the folder that holds configs/ and data/: the checkout, or else bundled/."""
    package = Path(__file__).resolve().parent
    is_checkout = all((package.parent / name).exists() for name in ("launch.py", "configs", "data"))
    return package.parent if is_checkout else package / "bundled"


def make_importable() -> None:
    """Makes `import configs` and `import data` find those of this program."""
    folder = str(root())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def names() -> list[str]:
    """Returns the names of the configs, without ".py"."""
    return sorted(
        path.stem for path in (root() / "configs").glob("*.py") if path.stem != "__init__"
    )


def find(value: str) -> str:
    """Returns the file that `--config=value` names, with the ":..." that may follow the name.

    A name without a folder, or in configs/, is one of this program's configs from wherever it is
    called: "cpu:screw". Raises UsageError if there is no such file.
    """
    name, colon, argument = value.partition(":")
    path = Path(name)
    if path.is_file():
        return value
    if path.parent in (Path("."), Path("configs")) and path.stem in names():
        return f"{root() / 'configs' / path.stem}.py{colon}{argument}"
    similar = difflib.get_close_matches(path.stem, names(), 1)
    advice = f"did you mean --config={similar[0]}{colon}{argument}? " if similar else ""
    raise UsageError(
        f"--config={value}: there is no file {name}; {advice}By name there are {', '.join(names())}"
    )


def load(name: str) -> ConfigDict:
    """Returns the options of the config of this name, such as "cpu"; UsageError without one."""
    if name not in names():
        raise UsageError(f"config={name!r}: there is no such config, only {', '.join(names())}")
    make_importable()
    return importlib.import_module(f"configs.{name}").get_config()

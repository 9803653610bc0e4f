"""Atomic writes of files, local or in an object store (gs://).

An object store cannot append, seek while writing, or be opened by `open`: contents are made in
memory first, and all paths are those of etils.epath.
"""

import os
import tempfile

from etils.epath import Path

from anoseg_jax import UsageError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: no reader sees it incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, see `write_bytes`."""
    write_bytes(path, text.encode())


def require_writable(folder: Path, flag: str) -> None:
    """Creates a folder; raises UsageError, naming its flag, if it cannot be written to."""
    if "://" in os.fspath(folder):  # an object store says so at the first file
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag}={folder}: cannot be written to ({error.strerror}): give a folder that you may "
            "write to"
        ) from error

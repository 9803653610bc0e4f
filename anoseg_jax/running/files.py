"""Atomic writes of files, local or in an object store (gs://).

An object store cannot append, seek while writing, or be opened by `open`: contents are made in
memory first, and all paths are those of etils.epath.
"""

from etils.epath import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: no reader sees it incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, see `write_bytes`."""
    write_bytes(path, text.encode())

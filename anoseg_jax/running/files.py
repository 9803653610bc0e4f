"""Files written whole or not at all; a path is local or of an object store (gs://).

An object store cannot append, seek while writing, or be opened by `open`: what is written is made
in memory first, and paths are those of etils.epath everywhere.
"""

from etils.epath import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: it is whole or it is not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())

"""Lists folders as people leave them: without system files, whatever the case of a name."""

import io
import os
import unicodedata
from collections.abc import Iterable

from etils.epath import Path
from PIL import Image, ImageFile

# Folders that operating systems, archives and network drives leave beside the user's.
SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    )
)
# Files that belong beside images and are none: nobody misses them.
SIDE_SUFFIXES = frozenset(
    ".cfg .csv .db .doc .docx .html .ini .json .jsonl .log .md .pdf .py .rst .sh .toml .txt .url "
    ".xls .xlsx .xml .yaml .yml".split()
)
# What a file without the suffix of an image may be; these have a signature at their beginning.
_SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")


def _image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that Pillow decodes, with the plugins that are installed."""
    Image.init()
    suffixes = {".mpo"}  # opened by the JPEG plugin
    for suffix, name in Image.registered_extensions().items():
        opener = Image.OPEN.get(name, (None,))[0]
        # Stubs and MPEG know a format's signature and cannot decode it.
        is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if opener and not is_stub and name != "MPEG":
            suffixes.add(suffix)
    return frozenset(suffixes)


IMAGE_SUFFIXES = _image_suffixes()


def comparable(name: str) -> str:
    """Returns a name for comparisons: macOS writes an umlaut as two characters, others as one."""
    return unicodedata.normalize("NFC", name).casefold()


def entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the folders and the files in a folder, sorted, without hidden and system ones.

    Both are empty if it is no folder.
    """
    folders, files = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or comparable(path.name) in SYSTEM_FOLDERS:
            continue
        (folders if path.is_dir() else files).append(path)
    return folders, files


def child(folder: Path, *names: str) -> Path:
    """Returns the folder's sub-folder of that path, as its names are spelled there.

    Case and Unicode form do not matter, the exact spelling comes first. Of a path that does not
    exist the rest is as asked for.
    """
    for name in names:
        if not (folder / name).is_dir():
            spelled = [p for p in entries(folder)[0] if comparable(p.name) == comparable(name)]
            name = spelled[0].name if spelled else name
        folder = folder / name
    return folder


def is_image(path: Path) -> bool:
    """Whether a file has an image's suffix; of any other suffix, whether it begins like one."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            beginning = file.read(1 << 16)
        with Image.open(io.BytesIO(beginning), formats=_SIGNED_FORMATS):
            return True
    except Exception:  # whatever a decoder raises: it is no image
        return False


def images(folder: Path) -> list[Path]:
    """Returns the image files in a folder, sorted; none if it is no folder."""
    return [path for path in entries(folder)[1] if is_image(path)]


def identity(folder: Path) -> str:
    """Returns the same text for two paths of one folder."""
    return os.path.realpath(os.fspath(folder))


def walk(folder: Path, exclude: str | None = None) -> tuple[list[Path], list[Path]]:
    """Returns all files below a folder, and the links to folders that are listed already.

    These are not followed: they would lead round in circles. `exclude` is the `identity` of a
    folder that is left out.
    """
    # By itself: what epath's `walk` yields of gs:// lacks the gs:// with some of its backends.
    files, links, listed = [], [], set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        here = identity(current)
        if here in listed:
            links.append(current)
        if here in listed or here == exclude:
            continue
        listed.add(here)
        inner, inside = entries(current)
        files += inside
        waiting += reversed(inner)
    return files, links


def by_folder(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Returns the paths by the folder that they are in, in their order."""
    grouped: dict[Path, list[Path]] = {}
    for path in paths:
        grouped.setdefault(path.parent, []).append(path)
    return grouped


def names_of(paths: list[Path], limit: int = 4) -> str:
    """Returns the names of the paths, or of the first of them and how many more there are."""
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(path.name for path in paths[:limit]) + more

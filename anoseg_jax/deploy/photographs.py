"""Lists photographs: files, folders and glob patterns; watches folders for new files."""

import os
import time
from collections.abc import Iterable, Iterator

from etils import epath

from anoseg_jax import UsageError
from anoseg_jax.images.folders import IMAGE_SUFFIXES, SIDE_SUFFIXES, identity, is_image, walk

POLL_SECONDS = 1.0


class Photographs:
    """The image files that the arguments of a command name.

    Attributes:
      arguments: files, folders (searched with all folders in them) and glob patterns.
      exclude: a folder that is left out wherever it is, such as that of the results; or None.
      skipped: files in the folders that are no images, as `list` saw them last.
    """

    def __init__(self, arguments: Iterable[str], exclude: epath.PathLike | None = None):
        """Raises UsageError if an argument that is no pattern names nothing."""
        self.arguments = list(arguments)
        self.exclude = None if exclude is None else identity(epath.Path(exclude))
        self.skipped: list[epath.Path] = []
        roots = [_absolute(self._root_of(argument)).parts for argument in self.arguments]
        self._root = os.path.commonprefix(roots)  # of parts, not of characters

    def _root_of(self, argument: str) -> epath.Path:
        path = epath.Path(argument)
        if path.is_dir():
            return path
        if path.exists():
            return path.parent
        fixed, _ = _split_pattern(path)
        if fixed == path:
            raise UsageError(f"{argument}: there is no such file or folder")
        return fixed

    def name(self, path: str) -> str:
        """Returns a file's path relative to the folder that holds all of them: unique."""
        return os.path.join(*_absolute(epath.Path(path)).parts[len(self._root) :])

    def list(self) -> list[str]:
        """Returns the paths of all images, each once.

        Files in folders count if they are images (`folders.is_image`), and are in `skipped` if not;
        files that an argument names count always.
        """
        paths: dict[str, None] = {}
        self.skipped = []
        for argument in self.arguments:
            path = epath.Path(argument)
            fixed, pattern = _split_pattern(path)
            is_pattern = fixed != path and not path.exists()
            for match in sorted(fixed.glob(pattern)) if is_pattern else [path]:
                if not match.is_dir():
                    paths[os.fspath(match)] = None
                    continue
                for inside in walk(match, self.exclude)[0]:
                    if is_image(inside):
                        paths[os.fspath(inside)] = None
                    elif inside.suffix.lower() not in SIDE_SUFFIXES:
                        self.skipped.append(inside)
        return list(paths)

    def watch(self, skip: set[str]) -> Iterator[str | None]:
        """Yields images as they arrive, without end; None when nothing is new at the moment.

        A file is complete when its size and the time of its last change were the same twice,
        POLL_SECONDS apart. A file that changes later is yielded again.

        Args:
          skip: paths that are yielded only if they change from now on.
        """
        done = {path: _size_and_time(path) for path in skip}
        before: dict[str, tuple[int, int] | None] = {}
        while True:
            # Programs that copy give a file its suffix at the end.
            images = [p for p in self.list() if epath.Path(p).suffix.lower() in IMAGE_SUFFIXES]
            now = {path: _size_and_time(path) for path in images}
            for path, stat in now.items():
                if stat is not None and before.get(path) == stat != done.get(path):
                    done[path] = stat
                    yield path
            done = {path: stat for path, stat in done.items() if path in now}
            before = now
            yield None
            time.sleep(POLL_SECONDS)


def _absolute(path: epath.Path) -> epath.Path:
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _split_pattern(path: epath.Path) -> tuple[epath.Path, str]:
    """Returns the folder above a pattern's first wildcard, and the pattern below it."""
    parts = path.parts
    count = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return epath.Path(*parts[:count]), "/".join(parts[count:])


def _size_and_time(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:  # removed in the meantime
        return None
    return stat.st_size, stat.st_mtime_ns

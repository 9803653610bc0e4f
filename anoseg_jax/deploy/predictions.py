"""Predicts many photographs: predictions.csv, maps, overlays, report.html, in bounded memory."""

import collections
import concurrent.futures
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils.epath import Path
from PIL import Image

from anoseg_jax import UsageError
from anoseg_jax.deploy.photographs import Photographs
from anoseg_jax.deploy.prediction import UNREADABLE, Prediction, Unreadable
from anoseg_jax.deploy.predictions_page import MAX_REASONS, Card, Summary, draw_panels, write_page
from anoseg_jax.deploy.predictor import Predictor, Reading, decode
from anoseg_jax.images import drawing
from anoseg_jax.images.decode import LayoutError, printable, resize_image
from anoseg_jax.images.folders import names_of

COLUMNS = (
    *("file", "score", "normalized_score", "threshold", "verdict"),
    *("num_regions", "regions", "seconds", "error"),
)

MAX_NAME = 200  # bytes of a file name; most file systems take 255, and a suffix is added
HUGE = 20_000_000  # pixels: such photographs are drawn one at a time
REPORT_SECONDS = 10.0  # between two lines of progress, and two pages when following


class Drawn(NamedTuple):
    """What a thread has made of a prediction: its row of the table, and its card or None."""

    row: dict[str, Any]
    card: Card | None


class Writer:
    """Writes the files of one photograph; called from several threads."""

    def __init__(
        self, out: Path, photographs: Photographs, reading: Reading, summary: Summary, maps: str
    ):
        """Begins; `maps` says which photographs get a map and an overlay: all, defective, none."""
        self._out, self._photographs, self._reading = out, photographs, reading
        self._summary, self._maps = summary, maps
        self._one_huge = threading.Lock()

    def __call__(self, index: int, prediction: Prediction) -> Drawn:
        """Writes map and overlay; returns the row, and the card if the score is high enough."""
        began = time.monotonic()
        is_huge = prediction.size[0] * prediction.size[1] > HUGE
        with self._one_huge if is_huge else contextlib.nullcontext():
            card = self._draw(index, prediction)
        row = {
            "file": printable(prediction.name),
            "score": f"{prediction.score:.9g}",
            "normalized_score": _number(prediction.normalized_score),
            "threshold": _number(prediction.thresholds.image),
            "verdict": prediction.verdict,
            "num_regions": len(prediction.regions),
            "regions": json.dumps(prediction.largest_regions),
            "seconds": f"{prediction.seconds + time.monotonic() - began:.4f}",
        }
        return Drawn(row, card)

    def _draw(self, index: int, prediction: Prediction) -> Card | None:
        name = short_name(self._photographs.name(prediction.name))
        map_path = self._out / "maps" / f"{name}.png"
        overlay_path = self._out / "overlays" / f"{name}.jpg"
        if self._maps in ("all", prediction.verdict):
            for path in (map_path, overlay_path):
                path.parent.mkdir(parents=True, exist_ok=True)
            map_path.write_bytes(drawing.encode_map(prediction.anomaly_map))
            overlay = drawing.outline(self._read(prediction), prediction.mask)
            overlay_path.write_bytes(drawing.encode_jpeg(overlay, quality=85))
        else:  # of an earlier call with other thresholds
            map_path.unlink(missing_ok=True)
            overlay_path.unlink(missing_ok=True)
        if not self._summary.is_on_page(prediction.score):
            return None
        return Card(
            prediction.score,
            -index,  # of equal scores, the one that came first
            printable(self._photographs.name(prediction.name)),
            prediction.verdict,
            prediction.normalized_score,
            len(prediction.regions),
            draw_panels(prediction),
        )

    def _read(self, prediction: Prediction) -> Image.Image:
        """Reads the photograph again: to keep all that wait for their turn would take memory."""
        image = prediction.image
        with contextlib.suppress(LayoutError):  # removed or rewritten in the meantime
            image = decode(prediction.name, self._reading)
        return Image.fromarray(resize_image(image, prediction.size))


def short_name(name: str) -> str:
    """Returns a relative path whose last part leaves room for a suffix; equal parts stay equal."""
    folder, _, last = name.rpartition(os.sep)
    encoded = os.fsencode(last)
    if len(encoded) > MAX_NAME:
        digest = hashlib.sha256(encoded).hexdigest()[:12]
        last = f"{os.fsdecode(encoded[: MAX_NAME - 13])}_{digest}"
    return os.path.join(folder, last)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def read_files(path: Path) -> set[str]:
    """Returns the column `file` of a predictions.csv; empty if there is none."""
    text = path.read_text() if path.exists() else ""
    return {row["file"] for row in csv.DictReader(io.StringIO(text))}


def rows(
    predictor: Predictor, photographs: Iterable[str | None], writer: Writer, summary: Summary
) -> Iterator[dict[str, Any] | None]:
    """Yields the row of each photograph, in order, after its files are written; None for None.

    Reading, computing and writing overlap: of each, only a few photographs are in memory.
    """
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        writing: collections.deque = collections.deque()

        def finish() -> dict[str, Any]:
            outcome = writing.popleft()
            if isinstance(outcome, Unreadable):
                summary.counts[UNREADABLE] += 1
                name = printable(outcome.name)
                reason = outcome.reason.removeprefix(f"{name}: ")
                if len(summary.reasons) < MAX_REASONS:
                    summary.reasons.append((name, reason))
                return {"file": name, "verdict": UNREADABLE, "error": reason}
            drawn = outcome.result()
            summary.counts[drawn.row["verdict"]] += 1
            summary.scores.append(float(drawn.row["score"]))
            if drawn.card is not None:
                summary.add_card(drawn.card)
            return drawn.row

        for index, prediction in enumerate(predictor.stream(photographs)):
            if isinstance(prediction, Prediction):
                writing.append(pool.submit(writer, index, prediction))
            elif prediction is not None:
                writing.append(prediction)
            while len(writing) > (0 if prediction is None else 2 * threads):
                yield finish()
            if prediction is None:
                yield None
        while writing:
            yield finish()


def predict(
    predictor: Predictor,
    photographs: Photographs,
    out: Path,
    *,
    maps: str = "all",
    follow: bool = False,
) -> bool:
    """Predicts all photographs and writes predictions.csv, maps/, overlays/, report.html.

    Args:
      predictor: the model with its thresholds.
      photographs: to predict, without those in `out`.
      out: the folder to write to; a local one, as rows are appended.
      maps: which photographs get a map and an overlay: "all", "defective" or "none".
      follow: goes on until Ctrl-C or SIGTERM with files as they arrive; rows are appended, and
        files that predictions.csv has are left out.

    Returns:
      Whether everything was done: all photographs were readable, and no signal ended it early.

    Raises:
      UsageError: there are no images.
    """
    paths = photographs.list()
    if not paths and not follow:
        raise UsageError(f"{', '.join(photographs.arguments)}: no images in it")
    out.mkdir(parents=True, exist_ok=True)
    predictor.warm_up()
    table_path, summary = out / "predictions.csv", Summary()
    for name, source in predictor.threshold_sources.items():
        value = getattr(predictor.thresholds, name)
        if value is None:
            missing = "scores without verdicts" if name == "image" else "no regions"
            print(f"no {name} threshold, so {missing}: {source}")
        else:
            print(f"{name} threshold {value:.4g}: {source}")
    if photographs.skipped:
        count, names = len(photographs.skipped), printable(names_of(photographs.skipped))
        print(f"warning: skipped {count} files that are no images: {names}", file=sys.stderr)
    known = read_files(table_path) if follow else set()
    skip = {path for path in paths if printable(path) in known}
    source = photographs.watch(skip) if follow else paths
    total = None if follow else len(paths)
    with table_path.open("a" if known else "w") as table, interruptible() as is_stopped:
        to_read = itertools.takewhile(lambda _: not is_stopped(), source)
        write_files = Writer(out, photographs, predictor.reading, summary, maps)
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        if not known:
            writer.writeheader()
        last_line, is_new = time.monotonic(), False
        for row in rows(predictor, to_read, write_files, summary):
            if row is None:  # a pause: the page may take its time
                if is_new:
                    write_page(out / "report.html", predictor, summary)
                is_new = False
                continue
            writer.writerow(row)
            table.flush()  # what is done survives whatever happens
            is_new = True
            if time.monotonic() - last_line > REPORT_SECONDS:
                print(summary.line(total), file=sys.stderr, flush=True)
                last_line = time.monotonic()
    write_page(out / "report.html", predictor, summary)
    print(summary.line(total))
    if defective := summary.defective_names():
        print(f"defective, the highest score first: {defective}")
    print(f"{table_path}; the same with pictures: report.html beside it")
    is_complete = follow or sum(summary.counts.values()) == total
    return is_complete and not summary.counts[UNREADABLE]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came: what was read is finished.

    A second signal ends the process at once.
    """
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        os.write(2, f"\n{signal.Signals(number).name}: finishing what was read\n".encode())
        signals.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

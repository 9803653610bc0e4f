"""Serves a model over HTTP: POST /predict takes an image file as its body; GET / is a page for it.

Nothing that a client sends is taken as a path, and nothing is kept of a photograph.
"""

import asyncio
import base64
import contextlib
import dataclasses
import io
import ipaddress
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image

from anoseg_jax.deploy.export import describe
from anoseg_jax.deploy.prediction import Prediction
from anoseg_jax.deploy.predictions_page import render
from anoseg_jax.deploy.predictor import Loaded, Predictor
from anoseg_jax.images import drawing
from anoseg_jax.images.decode import LayoutError

MAPS = ("none", "small", "full")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      megabytes: of a request's body.
      megapixels: of an image.
      waiting: requests at the same time; any more are refused (503).
      seconds: for a request, receiving it included.
    """

    megabytes: float = 50
    megapixels: float = 50
    waiting: int = 64
    seconds: float = 30


class Refused(Exception):
    """A request that gets no prediction."""

    def __init__(self, status: int, reason: str):
        """`status` is the HTTP status, `reason` one line for the client."""
        super().__init__(reason)
        self.status, self.reason = status, reason


class Batches:
    """Computes the images of requests that wait at the same time in one batch."""

    def __init__(self, predictor: Predictor):
        """Must be created where an event loop runs."""
        self._predictor = predictor
        self._queue: asyncio.Queue = asyncio.Queue()

    async def compute(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns map and score of an image of the model's size."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((image, future))
        return await future

    async def run(self) -> None:
        """Computes batches until it is cancelled."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._predictor.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(image, future) for image, future in batch if not future.done()]
            if not batch:  # their clients have waited too long
                continue
            try:
                images = np.stack([image for image, _ in batch])
                maps, scores = await asyncio.to_thread(self._predictor.compute, images)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), image_map, score in zip(batch, maps, scores, strict=True):
                if not future.done():
                    future.set_result((image_map, float(score)))


class Service:
    """What the requests share: model, limits, batches."""

    def __init__(self, predictor: Predictor, limits: Limits):
        """Must be created where an event loop runs."""
        self._predictor, self._limits = predictor, limits
        self.batches = Batches(predictor)
        self.running = 0
        # Decoded photographs are large: as many at a time as there are processors.
        self._decoding = asyncio.Semaphore(os.cpu_count() or 1)

    async def predict(self, request: Request) -> dict[str, Any]:
        """Returns the answer to POST /predict. Raises Refused."""
        if self.running >= self._limits.waiting:
            raise Refused(503, f"busy with {self.running} requests: try again later")
        wanted = request.query_params.get("map", "none")
        if wanted not in MAPS:
            raise Refused(400, f"map={wanted!r} must be one of {', '.join(MAPS)}")
        self.running += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                data = await self._receive(request)
                async with self._decoding:
                    loaded = await asyncio.to_thread(self._load, data)
                del data
                image_map, score = await self.batches.compute(loaded.image)
                prediction = Prediction(
                    "",
                    score,
                    self._predictor.thresholds,
                    loaded.size,
                    loaded.seconds,
                    loaded.image,
                    image_map,
                )
                async with self._decoding:
                    return await asyncio.to_thread(as_json, prediction, wanted)
        except TimeoutError:
            seconds = self._limits.seconds
            raise Refused(408, f"took longer than {seconds:g} s to receive and answer") from None
        finally:
            self.running -= 1

    async def _receive(self, request: Request) -> bytes:
        """Returns the body; counts the bytes that arrive, whatever the headers announce."""
        body, limit = bytearray(), int(self._limits.megabytes * 1e6)
        is_too_long = False
        async for chunk in request.stream():
            is_too_long = is_too_long or len(body) + len(chunk) > limit
            if is_too_long:
                body.clear()  # the rest is read and dropped, so that the client gets the answer
            else:
                body += chunk
        if is_too_long:
            raise Refused(413, f"the image has more than {self._limits.megabytes:g} MB")
        return bytes(body)

    def _load(self, data: bytes) -> Loaded:
        if data.startswith(b"--") and b"form-data;" in data[:1000]:  # curl -F, an HTML form
            raise Refused(415, "send the file itself, no form: curl --data-binary @photo.jpg ...")
        width = height = 0
        with contextlib.suppress(Exception):  # load says what is wrong with it
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        if width * height > self._limits.megapixels * 1e6:
            limit = f"{self._limits.megapixels:g} megapixels"
            raise Refused(413, f"the image has {width}x{height} pixels, more than {limit}")
        try:
            return self._predictor.load(data)
        except LayoutError as error:
            line = str(error).splitlines()[0]
            raise Refused(400, line.replace("the image: ", "the image ")) from None


def as_json(prediction: Prediction, wanted: str) -> dict[str, Any]:
    """Returns the answer for a prediction; `wanted` is the size of its map, one of MAPS.

    The map is a 16-bit grey PNG, 65535 is 1, in base64: "small" is of the model's size, "full" of
    the photograph's.
    """
    answer = {
        "score": prediction.score,
        "normalized_score": prediction.normalized_score,
        "verdict": prediction.verdict or None,
        "threshold": prediction.thresholds.image,
        "pixel_threshold": prediction.thresholds.pixel,
        "size": list(prediction.size),
        "num_regions": len(prediction.regions),
        "regions": prediction.largest_regions,
    }
    if wanted != "none":
        image_map = prediction.anomaly_map if wanted == "full" else prediction.model_map
        answer["map"] = base64.b64encode(drawing.encode_map(image_map)).decode()
    return answer


def create_app(predictor: Predictor, limits: Limits = Limits()) -> FastAPI:
    """Returns the application; see Limits."""
    metadata = describe(predictor)
    page = render(
        "serve.html.jinja",
        model=predictor.folder.name,
        thresholds=predictor.thresholds._asdict(),
        colours=drawing.COLOURS.tolist(),
        limits=limits,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(predictor, limits)
        computing = asyncio.create_task(app.state.service.batches.run())
        yield
        computing.cancel()

    # Without the pages of FastAPI, which load scripts from other servers.
    app = FastAPI(title="anoseg_jax", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """Predicts the image file in the body; ?map=small or full adds the anomaly map."""
        return await app.state.service.predict(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Says that the model is loaded, and how many requests are being answered."""
        return {"status": "ok", "requests": app.state.service.running}

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """Returns what is known of the model."""
        return metadata

    @app.get("/")
    async def index() -> HTMLResponse:
        """Returns the page."""
        return HTMLResponse(page)

    return app


def serve(predictor: Predictor, host: str, port: int, limits: Limits = Limits()) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that are running are answered before it ends."""
    import uvicorn

    predictor.warm_up()
    config = uvicorn.Config(
        create_app(predictor, limits),
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )
    # After its shutdown uvicorn raises the signal again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    print(f"{predictor.folder}: http://{host}:{port}, until Ctrl-C", flush=True)
    if not _is_loopback(host):
        print("warning: whoever reaches this address can use it: no password, no encryption")
    uvicorn.Server(config).run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

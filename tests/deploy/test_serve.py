"""--mode=serve over HTTP: answers, refusals, the page in a browser, and how it ends."""

import asyncio
import base64
import concurrent.futures
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from part_images import draw_part
from PIL import Image

from anoseg_jax.deploy.predictor import Predictor

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor(workdir, pixel_threshold=0.01)


def start(workdir):
    """Starts a server that takes 1 MB and 1 megapixel; returns its process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "launch.py"), "--mode=serve", f"--workdir={workdir}"),
            *(f"--port={port}", "--pixel_threshold=0.01", "--max_megabytes=1"),
            "--max_megapixels=1",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert f":{port}" in process.stdout.readline()
    for _ in range(100):
        with socket.socket() as connection:
            if not connection.connect_ex(("127.0.0.1", port)):
                return process, port
        time.sleep(0.1)
    raise AssertionError("the server does not listen")


@pytest.fixture(scope="module")
def port(workdir):
    process, port = start(workdir)
    yield port
    process.terminate()
    assert process.wait(30) == 0


def ask(port, method, path, body=None, headers=None):
    """Returns the status and the parsed answer; `body` may be an iterator of chunks."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    chunked = body is not None and not isinstance(body, bytes)
    connection.request(method, path, body, headers or {}, encode_chunked=chunked)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, json.loads(content) if is_json else content


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def test_an_answer_is_what_the_predictor_says(port, predictor):
    image = draw_part(1, (40, 60), defect=True)
    expected = predictor(image)
    status, answer = ask(port, "POST", "/predict", encode(image))
    assert status == 200 and "map" not in answer
    assert answer["score"] == pytest.approx(expected.score, rel=1e-6)
    assert answer["verdict"] == expected.verdict and answer["size"] == [40, 60]
    assert answer["normalized_score"] == pytest.approx(expected.normalized_score)
    assert answer["threshold"] == pytest.approx(expected.thresholds.image)
    assert answer["num_regions"] == len(expected.regions)
    region = expected.regions[0]
    assert answer["regions"][0] == {"area": region.area, "box": list(region[1:])}
    for size, image_map in (("small", expected.model_map), ("full", expected.anomaly_map)):
        _, answer = ask(port, "POST", f"/predict?map={size}", encode(image, "TIFF"))
        png = Image.open(io.BytesIO(base64.b64decode(answer["map"])))
        np.testing.assert_allclose(np.asarray(png) / 65535, image_map, atol=1e-4)


def test_requests_at_the_same_time_are_all_answered(port, predictor):
    images = [draw_part(seed, (30 + seed, 50)) for seed in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: ask(port, "POST", "/predict", encode(x)), images))
    assert [status for status, _ in answers] == [200] * 24
    scores = [answer["score"] for _, answer in answers]
    np.testing.assert_allclose(scores, [x.score for x in predictor(images)], rtol=1e-5)


def bomb():
    """Returns a PNG of a few bytes that declares 60000 x 60000 pixels."""
    data = bytearray(encode(draw_part(0)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "is empty"),
        (b"hello", 400, "is not an image"),
        (b"/etc/passwd", 400, "is not an image"),
        (b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n", 415, "--data-binary @"),
        (encode(draw_part(0))[:200], 400, "damaged or cut short"),
        (bomb(), 413, "60000x60000 pixels, more than 1 megapixels"),
        (bytes(2_000_000), 413, "more than 1 MB"),
    ],
)
def test_bad_input_is_refused_with_one_line(port, body, status, reason):
    assert ask(port, "POST", "/predict", body)[0] == status
    answer = ask(port, "POST", "/predict", body)[1]
    assert answer.keys() == {"error"} and reason in answer["error"]
    assert "\n" not in answer["error"] and "Traceback" not in answer["error"]


def test_bytes_are_counted_on_the_stream(port):
    chunks = (bytes(100_000) for _ in range(30))  # without Content-Length
    status, answer = ask(port, "POST", "/predict", chunks, {"Transfer-Encoding": "chunked"})
    assert status == 413 and "more than 1 MB" in answer["error"]


def test_other_requests(port, predictor):
    assert ask(port, "GET", "/health") == (200, {"status": "ok", "requests": 0})
    status, model = ask(port, "GET", "/model")
    assert status == 200 and model["weights_sha256"] == predictor.model.weights_sha256
    status, answer = ask(port, "POST", "/predict?map=/etc/passwd", encode(draw_part(0)))
    assert status == 400 and "must be one of none, small, full" in answer["error"]
    assert ask(port, "GET", "/predict")[0] == 405
    assert ask(port, "GET", "/../../etc/passwd")[0] == 404


class SlowRequest:
    """A request whose body takes its time."""

    query_params = {}

    def __init__(self, body, seconds):
        self.body, self.seconds = body, seconds

    async def stream(self):
        yield self.body[:10]
        await asyncio.sleep(self.seconds)
        yield self.body[10:]


def test_a_slow_request_is_ended_and_one_too_many_is_refused(predictor):
    from anoseg_jax.deploy.serve import Limits, Refused, Service

    async def run():
        service = Service(predictor, Limits(waiting=2, seconds=0.5))
        computing = asyncio.create_task(service.batches.run())
        body = encode(draw_part(0))
        slow = [asyncio.create_task(service.predict(SlowRequest(body, 5))) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(Refused, match="busy with 2 requests") as error:
            await service.predict(SlowRequest(body, 0))
        assert error.value.status == 503
        for task in slow:
            with pytest.raises(Refused, match="longer than 0.5 s") as error:
                await task
            assert error.value.status == 408
        answer = await service.predict(SlowRequest(body, 0))  # there is room again
        computing.cancel()
        return answer

    predictor.warm_up()
    assert asyncio.run(run())["score"] > 0


def test_sigterm_lets_a_running_request_finish(workdir):
    process, port = start(workdir)
    body = encode(draw_part(0))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:100])
    while ask(port, "GET", "/health")[1]["requests"] == 0:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    connection.send(body[100:])
    response = connection.getresponse()
    assert response.status == 200 and json.loads(response.read())["score"] > 0
    connection.close()
    assert process.wait(30) == 0


DROP = """(bytes) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
  dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true }));
}"""


COUNT_RED = """() => {
  const canvas = document.getElementById("photograph");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, i) => i % 4 === 0 && value === 255 && data[i + 1] === 60).length;
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_a_dropped_photograph_and_its_sliders_work(
    port, predictor, browser, tmp_path, width
):
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors, hosts = [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split(":")[0]))
    page.goto(f"http://127.0.0.1:{port}/")
    image = draw_part(1, (40, 60), defect=True)
    page.evaluate(DROP, list(encode(image)))
    page.locator("#last li").wait_for()
    expected = predictor(image)
    assert page.inner_text("#badge") == expected.verdict
    assert f"score {expected.score:.3f}" in page.inner_text("#score")
    sizes = page.evaluate("['photograph', 'heat'].map((id) => document.getElementById(id).width)")
    assert sizes == [60, 60]

    def count_red():
        return page.evaluate(COUNT_RED)

    page.fill("#pixel-threshold", "1")
    few = count_red()
    page.fill("#pixel-threshold", str(round(float(np.median(expected.model_map)), 3)))
    assert count_red() > few
    for threshold, verdict in (
        (expected.score - 0.01, "defective"),
        (expected.score + 0.01, "good"),
    ):
        page.fill("#image-threshold", str(threshold))
        assert page.inner_text("#badge") == verdict
    (tmp_path / "broken.png").write_bytes(b"")
    page.set_input_files("#file", [tmp_path / "broken.png"])
    page.locator("#last li").nth(1).wait_for()
    assert "is empty" in page.inner_text("#last li:first-child")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == [] and hosts <= {"http", "data", "blob"}
    page.close()

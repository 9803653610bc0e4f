"""Loads a server on this machine: many clients, broken images, one of 200 MB, a decompression bomb.

python benchmarks/serve.py --workdir=W/bolt PHOTO_OR_FOLDER ... [--clients=8] [--requests=500]

Prints a table; exits with 1 if a good request was not answered, a bad one was not refused with 4xx,
or the server did not end with 0 after SIGTERM.
"""

import argparse
import concurrent.futures
import http.client
import random
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from anoseg_jax.deploy.photographs import Photographs  # noqa: E402

HUGE = 200_000_000  # bytes


def bomb() -> bytes:
    """Returns a PNG of a few bytes that declares 60000 x 60000 pixels."""
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    end = b"\x00\x00\x00\x00IEND\xaeB`\x82"
    size, checksum = (13).to_bytes(4, "big"), zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + size + header + checksum + end


def post(port: int, body: bytes) -> tuple[int, float]:
    """Returns the status (0 if the connection broke) and the seconds that the answer took."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", body)
        status = connection.getresponse().status
    except OSError:
        status = 0
    finally:
        connection.close()
    return status, time.monotonic() - began


def memory(pid: int, name: str) -> int:
    """Returns VmRSS or VmHWM (the peak) of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) // 1024


def start(workdir: str) -> tuple[subprocess.Popen, int]:
    """Starts a server; returns its process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--mode=serve", f"--workdir={workdir}", f"--port={port}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *command], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    while True:
        with socket.socket() as connection:
            if not connection.connect_ex(("127.0.0.1", port)):
                return process, port
        time.sleep(0.1)


def main() -> int:
    """Runs the load; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="+")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=500)
    arguments = parser.parse_args()
    paths = Photographs(arguments.photographs).list()
    good = [Path(path).read_bytes() for path in paths[:50]]

    rng = random.Random(0)
    bodies = []
    for index in range(arguments.requests):
        body = good[index % len(good)]
        is_broken = index % 20 == 7  # 5 %
        bodies.append((is_broken, body[: rng.randrange(len(body) - 20)] if is_broken else body))
    bodies.insert(len(bodies) // 3, (True, bytes(HUGE)))
    bodies.insert(len(bodies) // 2, (True, bomb()))

    process, port = start(arguments.workdir)
    post(port, good[0])
    before, began = memory(process.pid, "VmRSS"), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
        answers = list(pool.map(lambda pair: post(port, pair[1]), bodies))
    seconds, peak = time.monotonic() - began, memory(process.pid, "VmHWM")
    process.terminate()
    code = process.wait(60)

    pairs = list(zip(bodies, answers, strict=True))
    times = np.array([took for (is_bad, _), (_, took) in pairs if not is_bad])
    unanswered = sum(status != 200 for (is_bad, _), (status, _) in pairs if not is_bad)
    refused = [status for (is_bad, _), (status, _) in pairs if is_bad]
    not_refused = sum(not 400 <= status < 500 for status in refused)
    print("| what | value |\n|---|---|")
    for name, value in (
        ("clients", arguments.clients),
        ("good requests, not answered", f"{len(times)}, {unanswered}"),
        ("bad requests, not refused with 4xx", f"{len(refused)}, {not_refused}"),
        ("requests a second", f"{len(bodies) / seconds:.1f}"),
        (
            "answer: median, 99th percentile",
            "{:.0f} ms, {:.0f} ms".format(*(1000 * np.percentile(times, (50, 99)))),
        ),
        ("memory before, at the peak", f"{before} MB, {peak} MB"),
        ("exit code after SIGTERM", code),
    ):
        print(f"| {name} | {value} |")
    return int(bool(unanswered or not_refused or code))


if __name__ == "__main__":
    sys.exit(main())

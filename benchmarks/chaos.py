"""Kills a short training run many times, and compares what comes out with a run left alone.

python benchmarks/chaos.py [--kills=32] [--seed=0]

Each trial starts the command in a fresh workdir, kills it at a random moment, starts it again, and
so on; after its last kill the run is left alone. Prints a table; exits with 1 if a restart did not
go on, a signal did not give the exit code it should, or the final params_sha256 differs from that
of the uninterrupted run. On CPU; images, workdirs and compiled programs are in a temporary folder.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 60, 3
KINDS = {
    "SIGKILL at a random moment": 3,
    "SIGKILL inside a save": 3,
    "SIGTERM at a random moment": 2,
    "SIGKILL of process 0 of two": 1,
    "SIGKILL of process 1 of two": 1,
}  # how many in ten
KILLS_A_TRIAL = 4


def write_images(root: Path) -> None:
    """Writes a category of noise in the folder layout, with two test images of each kind."""
    rng = np.random.default_rng(0)
    folders = {"train/good": 8, "test/good": 2, "test/hole": 2}
    for folder, count in folders.items():
        (root / "part" / folder).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            image.save(root / "part" / folder / f"{index:03d}.png")


def start(here: Path, workdir: Path, processes: int) -> list[subprocess.Popen]:
    """Starts the command in one process of two devices, or two of one; appends to workdir.log."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(here / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(processes):
        of_several = (f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}")
        command = [
            sys.executable,
            str(ROOT / "launch.py"),
            "--config=tests/tiny_config.py",
            f"--config.data_dir={here / 'data'}",
            f"--workdir={workdir}",
            f"--config.num_steps={STEPS}",
            f"--config.checkpoint_every={EVERY}",
            "--config.log_every=20",
            "--config.evaluate.pictures=0",
            *(of_several if processes > 1 else ()),
        ]
        with open(f"{workdir}.{index}.log", "a") as log:
            started.append(
                subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
            )
    return started


def is_saving(workdir: Path) -> bool:
    """Returns whether a checkpoint is being written."""
    return any((workdir / "part" / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def newest(workdir: Path) -> int:
    """Returns the step of the newest checkpoint; 0 without one."""
    found = (workdir / "part" / "checkpoints").glob("*")
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def kill(kind: str, processes: list[subprocess.Popen], workdir: Path, rng: random.Random) -> str:
    """Does what `kind` says to a run; returns "" if that went as it should, else what did not."""
    victim = processes[int("of process 1" in kind)]
    number = signal.SIGTERM if "SIGTERM" in kind else signal.SIGKILL
    before = newest(workdir)

    def wait(until) -> None:
        while victim.poll() is None and not until():
            time.sleep(0.0005)

    if "inside a save" in kind:
        wait(lambda: is_saving(workdir))
        time.sleep(rng.uniform(0, 0.02))
    elif "of two" in kind or before == 0 or rng.random() < 0.7:
        wait(lambda: newest(workdir) > before)  # in mid training
        time.sleep(rng.uniform(0, 1))
    else:
        time.sleep(rng.uniform(0, 8))  # anywhere, also while it starts
    if victim.poll() is not None:
        return "over before it could be killed"
    victim.send_signal(number)
    codes = [process.wait() for process in processes]
    if number == signal.SIGTERM and codes[0] not in (75, -signal.SIGTERM):
        return f"exit code {codes[0]}"
    if len(codes) > 1 and 0 in codes:
        return f"exit codes {codes}"
    if "inside a save" in kind and not is_saving(workdir):
        return "over before it could be killed"
    return ""


def finish(here: Path, workdir: Path, processes: int) -> str:
    """Lets a run come to its end; returns the hash of its weights, or what went wrong."""
    codes = [process.wait() for process in start(here, workdir, processes)]
    if any(codes):
        return f"exit codes {codes}, see {workdir}.0.log"
    results = json.loads((workdir / "results.json").read_text())
    return results["categories"]["part"]["params_sha256"]


def main() -> int:
    """Runs the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    here = Path(tempfile.mkdtemp(prefix="chaos_"))
    write_images(here / "data")
    expected = {count: finish(here, here / f"alone_{count}", count) for count in (1, 2)}
    print(f"uninterrupted: {expected}", flush=True)
    table = {kind: {"kills": 0, "wrong": 0} for kind in KINDS}
    due = [kind for kind, share in KINDS.items() for _ in range(share)]
    schedule = [due[index % len(due)] for index in range(options.kills)]
    rng.shuffle(schedule)
    # Trials of one process, then of two.
    groups = [[kind for kind in schedule if ("of two" in kind) == several] for several in (0, 1)]
    wrong = 0
    for processes, kinds in enumerate(groups, start=1):
        for first in range(0, len(kinds), KILLS_A_TRIAL):
            workdir = here / f"trial_{processes}_{first}"
            steps = []
            for kind in kinds[first : first + KILLS_A_TRIAL]:
                problem = kill(kind, start(here, workdir, processes), workdir, rng)
                steps.append(newest(workdir))
                if problem.startswith("over"):
                    print(f"{kind}: {problem}; not counted", flush=True)
                    continue
                table[kind]["kills"] += 1
                table[kind]["wrong"] += bool(problem)
                if problem:
                    print(f"{kind}: {problem}; see {workdir}.0.log", flush=True)
            got = finish(here, workdir, processes)
            same = got == expected[processes]
            wrong += not same
            print(f"trial at steps {steps}: {'same weights' if same else got}", flush=True)
    print("\n| what | kills | went wrong |\n|---|---|---|")
    for kind, row in table.items():
        print(f"| {kind} | {row['kills']} | {row['wrong']} |")
    print(f"\nfinal weights that differ: {wrong}; logs: {here}")
    return int(wrong + sum(row["wrong"] for row in table.values()) > 0)


if __name__ == "__main__":
    sys.exit(main())

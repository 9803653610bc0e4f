"""The processes of a run: locks, and what they share. Signals: test_launch.py."""

from pathlib import Path

import jax
import numpy as np
import programs
import pytest

from anoseg_jax import UsageError
from anoseg_jax.images import batches
from anoseg_jax.running import distributed

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_locked_against_other_runs(tmp_path):
    folder = tmp_path / "w"
    with distributed.lock(folder):
        for shared in (False, True):
            with pytest.raises(UsageError, match=rf"{folder} is in use by process \d+ on ") as told:
                with distributed.lock(folder, shared=shared):
                    pass
            assert "take another --workdir" in str(told.value)
    with distributed.lock(folder, shared=True), distributed.lock(folder, shared=True):
        with pytest.raises(UsageError, match="is in use by process"), distributed.lock(folder):
            pass
    with distributed.lock(folder):
        pass


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_the_processes_are_disjoint_and_complete(monkeypatch, processes):
    order = batches.batch_order(count=10, batch_size=8, seed=3, step=5)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(order[distributed.rows(8)].tolist())
    assert {len(share) for share in shares} == {8 // processes}
    assert sum(shares, []) == order.tolist()


def test_processes_that_differ_are_refused_before_they_train(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils,
        "process_allgather",
        lambda mine: np.stack([mine, mine + (mine > 200)]),
    )
    distributed.check_equal({"options": "00"})
    with pytest.raises(UsageError, match="process 1 differs from process 0 in its images: all"):
        distributed.check_equal({"options": "00", "images": "00ff"})


def test_the_flags_of_several_processes_need_each_other():
    with pytest.raises(UsageError, match="--coordinator, --num_processes and --process_id need"):
        distributed.start("localhost:1234", 2, None)


def test_where_jax_finds_no_cluster_the_message_says_what_to_give():
    program = """
from anoseg_jax import UsageError
from anoseg_jax.running import distributed
try:
    distributed.start(None, None, None)
except UsageError as error:
    print(error)
"""
    done = programs.run(program)
    assert (
        "processes of this run cannot connect" in done.stdout
        and "--coordinator=HOST:PORT" in done.stdout
    )


def test_without_file_locks_training_says_so_and_other_modules_can_be_imported(tmp_path):
    """As on Windows, which has no fcntl."""
    program = """
import sys
sys.modules["fcntl"] = None
import anoseg_jax.deploy.predictor, anoseg_jax.report.compare_page, anoseg_jax.report.pages
from anoseg_jax import UsageError
from anoseg_jax.running import distributed
try:
    with distributed.lock(sys.argv[1]):
        pass
except UsageError as error:
    print(error)
"""
    done = programs.run(program, tmp_path)
    assert done.stdout.startswith("this system has no file locks: on Windows, train in WSL")

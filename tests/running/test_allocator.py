"""Memory that is freed is used again."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from anoseg_jax.running import allocator
print(int({ask} and allocator.keep_freed_memory()))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(8):
    block = libc.malloc(65_000_000)
    ctypes.memset(block, 1, 65_000_000)
    libc.free(block)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_a_block_that_is_freed_and_asked_for_again_has_no_new_page_faults():
    def faults(ask: bool) -> tuple[int, int]:
        command = [sys.executable, "-c", PROGRAM.format(ask=ask)]
        done, count = subprocess.check_output(command, text=True).split()
        return int(done), int(count)

    (done, few), (_, many) = faults(True), faults(False)
    if not done:
        pytest.skip("another C library than glibc")
    assert few < many / 4

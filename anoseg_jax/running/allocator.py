"""The C library's memory allocator, for the large arrays of a step on a CPU."""

import ctypes

# Of glibc's malloc.h: parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed memory instead of giving it back; returns whether it could.

    A step on a CPU frees arrays of 65 MB and asks for them again. By default each of them comes
    from the system anew, one page fault for every 4 kB: up to half of a step's time. Call it before
    JAX starts its threads. Other C libraries stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    options = {M_TRIM_THRESHOLD: 2_000_000_000, M_MMAP_THRESHOLD: 1 << 30}
    return all([mallopt(option, value) for option, value in options.items()])

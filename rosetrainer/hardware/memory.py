"""What spares a process work with its memory. It imports no torch: it comes before."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Imports go inside: a million objects and no garbage, and looking for it is a tenth of them.

    What was made inside is never looked at again.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def keep_freed_memory() -> None:
    """Lets this process keep what it frees: the next step needs the same again.

    A step takes and frees gigabytes; if each large tensor is a mapping of its own, as by glibc's
    default, the kernel zeroes its pages every time. The user's own settings win, and where malloc
    is not glibc's, on macOS say, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # of malloc.h
    mallopt(arena_max, 1)  # else each thread has top_pad for itself, and its freed memory too
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)

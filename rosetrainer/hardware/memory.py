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
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # of malloc.h
    # One arena, else each thread has top_pad for itself, and its freed memory too.
    _set_malloc({arena_max: 1, mmap_max: 0, trim_threshold: 2**31 - 1, top_pad: 64 * 2**20})


def give_back_freed_memory() -> None:
    """Lets the system have what is freed at once: each large tensor is a mapping of its own.

    glibc does so only until the first is freed. From then on tensors of its size lie between small
    ones that stay, and a hole is lost to whatever does not fit.
    """
    mmap_threshold = -3
    _set_malloc({mmap_threshold: 2**20})


def _set_malloc(values: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for parameter, value in values.items():
            mallopt(parameter, value)

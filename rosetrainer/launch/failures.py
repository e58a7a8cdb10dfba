"""One failure is told once, by the rank that it came to first, in a few lines."""

from __future__ import annotations

import contextlib
import errno
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from rosetrainer.durable_files import room, short
from rosetrainer.launch.rank import RankError, explain_out_of_memory, is_out_of_memory
from rosetrainer.validation import ConfigError

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "NCCL communicator was aborted"),
    "Connection was likely closed",  # to whoever keeps the store
)
T = TypeVar("T")

FAILURES = "failures"
"""The store's count of them: the first one is told."""


@dataclass
class Failures:
    """Where the traceback of an error that is not the user's goes, once there is a run folder."""

    folder: Path | None = None


@contextlib.contextmanager
def report_first_error(
    store: dist.Store | None,
    rank: int,
    world_size: int,
    was_asked: Callable[[], bool] = lambda: False,
) -> Iterator[Failures]:
    """Makes an error in here a RankError: with a text on the first rank, else empty.

    was_asked: whether another rank has just looked for one that hangs; if the store is gone since,
    that one has ended all, and told it.
    """
    failures = Failures()
    try:
        yield failures
    except (RankError, BrokenPipeError):  # of the latter's kind: `train | head`
        raise
    except Exception as error:
        if store is None and isinstance(error, ConfigError):
            raise  # nobody else could speak
        status = 2 if isinstance(error, ConfigError) or is_of_the_disk(error) else 1
        text = (
            explain(error, rank, world_size, failures.folder) if is_first(store, was_asked) else ""
        )
        raise RankError(text, status) from error


def is_first(store: dist.Store | None, was_asked: Callable[[], bool]) -> bool:
    """Whether no other rank has failed before; the store counts."""
    if store is None:
        return True
    before = answer(lambda: store.add(FAILURES, 1), 2.0)
    # Where whoever keeps the store is gone, this may be the only rank to speak.
    return before == 1 or (before is None and not was_asked())


def answer(question: Callable[[], T], seconds: float) -> T | None:
    """What a question to the store gives; None if the store fails or does not answer in time."""
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def is_of_the_disk(error: Exception) -> bool:
    """Whether something could not be written for want of room or of permission."""
    if isinstance(error, OSError):
        wants = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)
        return error.errno in wants
    return isinstance(error, SafetensorError) and "I/O error" in str(error)


def explain(error: Exception, rank: int, world_size: int, folder: Path | None) -> str:
    """What a user needs of it: at most five lines."""
    if isinstance(error, ConfigError):
        return str(error)
    if is_of_the_disk(error):
        where = folder or Path.cwd()
        return (
            f"cannot write in {where}: {short(error)}; {room(where)} bytes can be written there; "
            f"free some space, and the same command goes on"
        )
    if is_out_of_memory(error):
        return explain_out_of_memory(error, rank, world_size)
    line = (str(error).splitlines() or [""])[0]
    if any(reason in str(error) for reason in LOST):
        return (
            f"rank {rank} has lost its connection to another rank, which has ended; the same "
            f"command goes on from the last checkpoint"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"rank {rank} of {world_size} failed: {type(error).__name__}: {line}\n"
        f"  {last.filename}, line {last.lineno}, in {last.name}"
    )
    if folder is not None:
        path = folder / f"error_rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)))
            text += f"\n  the whole traceback: {path}"
    return text

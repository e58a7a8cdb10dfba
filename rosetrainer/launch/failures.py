"""A rank's error as a user is told of it, in a few lines, and which rank failed first.

Imports no torch: a rank has errors to report before its seconds of importing that are over.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rosetrainer.durable_files import room, short
from rosetrainer.environment import trainer_command
from rosetrainer.validation import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""In the text of a RuntimeError: torch's allocators on each system, CUDA's own, cuBLAS's."""

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "NCCL communicator was aborted"),
    "Connection was likely closed",  # to whoever keeps the store
)
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)
T = TypeVar("T")


class RankError(Exception):
    """An error with all that a user needs to know of it, in a few lines.

    status: with which the process ends, 2 for a user's mistake. first: whether no other rank has
    failed before; where no launcher reports errors, this rank then prints it.
    """

    def __init__(self, text: str, status: int = 1, first: bool = True) -> None:
        super().__init__(text)
        self.status, self.first = status, first


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
    """Makes an error of training a RankError, the first one where no other rank has counted one.

    was_asked: whether another rank has just looked for one that hangs; if the store is gone since,
    that one has ended all, and reported it.
    """
    failures = Failures()
    try:
        yield failures
    except (RankError, BrokenPipeError):  # of the latter's kind: `train | head`
        raise
    except Exception as error:
        if store is None and isinstance(error, ConfigError):
            raise
        failure = explain_training(error, rank, world_size, failures.folder)
        if store is not None:
            failure.first = is_first(store, not was_asked())
        raise failure from error


def is_first(store: dist.Store, if_gone: bool) -> bool:
    """Whether no other rank has failed before; the store counts. if_gone: without its answer."""
    before = answer(lambda: store.add("failures", 1), 4.0)
    return if_gone if before is None else before == 1


def answer(question: Callable[[], T], seconds: float, gone: T | None = None) -> T | None:
    """What a question to the store gives; `gone` if that fails, None if it takes too long."""
    answers: list[T | None] = []

    def ask() -> None:
        try:
            answers.append(question())
        except (RuntimeError, OSError):
            answers.append(gone)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def explain(error: Exception, rank: int, world_size: int) -> RankError:
    """A user's mistake, want of memory, or the traceback of anything else."""
    if isinstance(error, RankError):
        return error
    if isinstance(error, ConfigError):
        return RankError(str(error), 2)
    if is_out_of_memory(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        for_what = f" when it asked for {asked[1]} more" if asked else ""
        text = f"rank {rank} of {world_size} ran out of memory{for_what}\n  {memory_advice()}"
        return RankError(text)
    trace = "".join(traceback.format_exception(error)).rstrip()
    return RankError(f"rank {rank} of {world_size} failed:\n{trace}")


def explain_training(error: Exception, rank: int, world_size: int, path: Path | None) -> RankError:
    """As explain, and what a run that can go on may meet; path: the run folder."""
    failure = explain(error, rank, world_size)
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    if full or (type(error).__name__ == "SafetensorError" and "I/O error" in str(error)):
        where = path or Path.cwd()
        text = (
            f"cannot write in {where}: {short(error)}; {room(where)} bytes can be written there; "
            f"free some space, and the same command goes on"
        )
        return RankError(text, 2)
    if any(reason in str(error) for reason in LOST):
        return RankError(
            f"rank {rank} has lost its connection to another rank, which has ended; the same "
            f"command goes on from the last checkpoint"
        )
    if path is None or isinstance(error, ConfigError) or is_out_of_memory(error):
        return failure
    line = (str(error).splitlines() or [""])[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"rank {rank} of {world_size} failed: {type(error).__name__}: {line}\n"
        f"  {last.filename}, line {last.lineno}, in {last.name}"
    )
    file = path / f"error_rank_{rank:05d}.txt"
    with contextlib.suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)))
        text += f"\n  the whole traceback: {file}"
    return RankError(text)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the machine or of a GPU, could not be had."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in NO_MEMORY)


def memory_advice() -> str:
    """One line: what needs less memory, and how to know before."""
    return (
        "training needs less with a smaller --micro-batch-size or with --recompute block, and "
        "more ranks with --tp-size share the model; the same flags after "
        f"`{trainer_command()} plan` predict how much"
    )

"""The many-rank harness: fresh ranks for each test, forked from a process that has torch loaded.

A torchrun costs 9 to 20 s, almost all of it imports; a fork of the loaded server a fraction of a
second. Ranks meet in a file, so no port is taken. What a rank returns must be picklable without
torch's shared memory: numbers and lists, no tensors.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Ours too, which the mutants' tests forget again: they put a changed rosetrainer on the path.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.utils.tensorboard",
    "numpy",
    "safetensors.torch",
    "pytest",
    "rosetrainer.commands.train",
    "rosetrainer.commands.parity",
]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(PRELOAD)

LONGEST_SECONDS = 600.0
"""A safety net under every wait of the tests: what is to happen is waited for, not a time."""


class RankFailure(AssertionError):
    """A rank raised or died. The text holds the traceback of each rank that failed."""


class NoMeeting(RankFailure):
    """gloo could not connect the ranks, which no code of ours had come to by then."""


TRIES = 3
"""On a crowded machine gloo's first connection has been closed, once in thousands of launches."""


def run_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...], each rank a process in one gloo group.

    Raises RankFailure with each failed rank's own traceback; the others are ended.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(NoMeeting):
            return _run_once(n_ranks, function, *arguments)
    return _run_once(n_ranks, function, *arguments)


def _run_once(n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    ranks: list[Any] = []
    results: list[Any] = [None] * n_ranks
    failures: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = str(Path(folder) / "store")
        for rank in range(n_ranks):
            receiver, sender = FORKSERVER.Pipe(duplex=False)
            target = (sender, meeting_point, rank, n_ranks, function, arguments)
            process = FORKSERVER.Process(target=_rank_main, args=target)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            _collect(ranks, results, failures, time.monotonic() + LONGEST_SECONDS)
        finally:
            for rank, (process, _) in enumerate(ranks):
                if process.is_alive() and failures:
                    process.kill()
                process.join(LONGEST_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()
                    failures[rank] = "answered, and did not end"
    if failures:
        told = (f"--- rank {rank} of {n_ranks}:\n{text}" for rank, text in sorted(failures.items()))
        before = any(f"{NoMeeting.__name__}: " in text for text in failures.values())
        raise (NoMeeting if before else RankFailure)("\n".join(told))
    return results


def _collect(
    ranks: list[Any], results: list[Any], failures: dict[int, str], deadline: float
) -> None:
    waiting: dict[Any, int] = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while waiting:
        left = deadline - time.monotonic()
        ready: list[Any] = multiprocessing.connection.wait(list(waiting), timeout=max(left, 0))
        if not ready:
            failures.update(dict.fromkeys(waiting.values(), "no answer in time"))
            return
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                ok, value = receiver.recv()
            except EOFError:
                ranks[rank][0].join()
                ok, value = False, f"died without a word, exit code {ranks[rank][0].exitcode}"
            if ok:
                results[rank] = value
            else:
                failures[rank] = value
                # The others may wait for this rank for ever; a moment for their own word.
                deadline = min(deadline, time.monotonic() + 1.0)


def _meet(meeting_point: str, rank: int, n_ranks: int) -> None:
    import torch.distributed as dist

    store, limit = dist.FileStore(meeting_point, n_ranks), timedelta(seconds=LONGEST_SECONDS)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=limit)
    except RuntimeError as error:
        raise NoMeeting(str(error)) from error


def _rank_main(
    sender: Any,
    meeting_point: str,
    rank: int,
    n_ranks: int,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n_ranks)
    )
    torch.set_num_threads(1)
    gc.freeze()  # a collection would look through all that the server has loaded, and copy it
    warnings.simplefilter("error")  # pytest's own setting does not reach this process
    try:
        if n_ranks > 1:
            _meet(meeting_point, rank, n_ranks)
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

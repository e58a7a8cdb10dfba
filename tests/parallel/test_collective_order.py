"""The order of collectives is the same on all ranks, each of which is an interpreter of its own:
strings have other hashes there and objects other addresses, so sets have another order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import ranks
import torch
from oracle import TOLERANCE, dense_model, gradients, tiny_config
from parallel.test_zero import built, global_batch, own_batches
from torch import nn

from rosetrainer.config import OptimConfig, ParallelConfig
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel import data_parallel
from rosetrainer.parallel.context import Ledger, init_parallel
from rosetrainer.parallel.sharding import gather_whole
from rosetrainer.training.step import compute_gradients

SEEDS = ("0", "3")  # PYTHONHASHSEED of each rank
LEVELS = (0, 3)
CONFIG = tiny_config(d_model=25, d_ff=35, tied=False)


def errors(folder: Path) -> list[float]:
    """Of the first gradients at each level. Each collective of two updates is written down before
    it starts, for ranks that do not fit together may end at once."""
    rank = int(os.environ["RANK"])
    elsewhere = [nn.Parameter(torch.empty(0)) for _ in range(rank * 999)]
    data_parallel.BUCKET_BYTES = 20_000
    first, dense = init_parallel(ParallelConfig(dp_size=len(SEEDS))), dense_model(CONFIG)
    input_ids, labels = global_batch(CONFIG, 0)
    dense(input_ids, labels=labels)[1].backward()
    names = {id(axis.ledger): axis.name for axis in first.axes}
    found = []
    with (folder / f"rank {rank}").open("w", buffering=1) as file:

        def record(ledger: Ledger, kind: str, phase: str, size: int) -> None:
            print(level, names[id(ledger)], kind, phase, size, file=file)

        with mock.patch.object(Ledger, "record", record):
            for level in LEVELS:
                context = replace(first, parallel=replace(first.parallel, zero=level))
                model = built(CONFIG, context)
                optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-3))
                for step in range(2):
                    compute_gradients(model, own_batches(context, CONFIG, step), context)
                    if step == 0:
                        ours, theirs = gather_whole(model, gradients=True), gradients(dense)
                        pairs = [(ours[name], theirs[name]) for name in theirs]
                        found.append(
                            max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
                        )
                    clip_gradients(model, context, 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
    assert elsewhere is not None
    return found


def test_sets_have_another_order_on_each_rank_and_collectives_have_one(tmp_path: Path) -> None:
    """At level 0 in buckets, at level 3 in units; and the gradients are one process's."""
    context, started = multiprocessing.get_context("spawn"), []
    for rank, seed in enumerate(SEEDS):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, str(tmp_path / "store"), rank, len(SEEDS), errors, (tmp_path,))
        process = context.Process(target=ranks._rank_main, args=arguments)
        with mock.patch.dict(os.environ, PYTHONHASHSEED=seed):
            process.start()
        sender.close()
        started.append((process, receiver))
    answers = []
    for process, receiver in started:
        with contextlib.suppress(EOFError):  # it has ended without one
            answers.append(receiver.recv())
        process.join(ranks.LONGEST_SECONDS)
        process.kill()
    one, other = ((tmp_path / f"rank {rank}").read_text().splitlines() for rank in range(2))
    assert one == other
    for level in LEVELS:
        sizes = {line.split()[-1] for line in one if line.startswith(str(level))}
        assert len(sizes) > 5, "calls that can be told apart"
    assert len(answers) == len(SEEDS)
    for ok, found in answers:
        assert ok, found
        assert max(found) <= TOLERANCE

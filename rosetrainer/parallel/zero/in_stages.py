"""Level 1 in a pipeline: a step's parameters are whole, and their gradients are summed at its end.

A schedule makes the gradients of a rank's stages in an order of its own, and those of a tied table
are summed over pp before they are over dp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rosetrainer.parallel.zero.sharded_model import ShardedModel


@contextmanager
def whole_for_a_step(sharded: ShardedModel | None) -> Iterator[None]:
    """Inside, the parameters are whole until sum_into_slices; afterwards slices in any case."""
    if sharded is None:
        yield
        return
    for unit in sharded.units:
        unit.gather("forward")
    try:
        yield
    finally:
        sharded.release()


def sum_into_slices(sharded: ShardedModel) -> None:
    """Sums the gradients over the shards; the parameters are slices, each with its gradient."""
    for unit in reversed(sharded.units):
        unit.collect()
        unit.start_scatter()
        unit.finish_scatter()
        unit.finish_step()

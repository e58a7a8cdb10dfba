"""What a pipeline's schedule says of a rank: its share of the model, its messages, what it holds.

Letters: B rows of a micro-batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel.pipeline.simulation import checked_schedule
from rosetrainer.parallel.pipeline.stage import layers_of_stages, owners_of_stages
from rosetrainer.planner.shares import Parameter, Share, Work


def shares_of_rank(model: GPTConfig, parallel: ParallelConfig, pp_rank: int) -> dict[int, Share]:
    """What each stage of a rank has, by its number."""
    every = layers_of_stages(model, parallel)
    owners = owners_of_stages(parallel)
    return {
        stage: Share(len(layers), stage == 0, stage == len(every) - 1)
        for stage, layers in enumerate(every)
        if owners[stage] == pp_rank
    }


def together(shares: dict[int, Share]) -> Share:
    """What all of them have."""
    every = shares.values()
    layers = sum(one.layers for one in every)
    return Share(layers, any(one.first for one in every), any(one.last for one in every))


def messages(
    model: GPTConfig, parallel: ParallelConfig, work: Work, pp_rank: int, table: Parameter
) -> Iterator[tuple[str, str, list[int]]]:
    """(operation, phase, payload bytes of each call) of what the rank sends and receives.

    table: this rank's rows of the vocabulary, where it has some.
    """
    schedule = checked_schedule(parallel, work.micro_batches)
    tokens = work.tokens // (parallel.tp_size or 1 if parallel.sequence_parallel else 1)
    size = work.rows * tokens * model.d_model * work.weight_bytes
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    shared = model.tied and first != last and pp_rank in (first, last)
    for place, operation in enumerate(("send", "receive")):
        own = [many for pair, many in schedule.messages.items() if pair[place] == pp_rank]
        actions = [action for many in own for action in many]
        forward = sum(action.kind == "F" for action in actions)
        yield operation, "forward", [size] * forward
        tied = [table.elements * work.weight_bytes] * shared
        yield operation, "backward", [size] * (len(actions) - forward) + tied


def live_bytes(
    parallel: ParallelConfig, pp_rank: int, micro_batches: int, of_stage: dict[int, int]
) -> int:
    """The most bytes of activations that a rank holds at once.

    of_stage: what one micro-batch keeps in each of its stages. Without a pipeline a micro-batch is
    done with before the next one begins.
    """
    if parallel.pp_size == 1:
        return sum(of_stage.values())
    live = peak = 0
    for action in checked_schedule(parallel, micro_batches).actions[pp_rank]:
        more = (action.kind == "F") - (action.kind in ("B", "W"))
        live += more * of_stage[action.stage]
        peak = max(peak, live)
    return peak

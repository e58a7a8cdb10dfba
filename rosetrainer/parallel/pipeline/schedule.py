"""The schedules of a pipeline, as data: what each rank computes, in which order.

Letters: p ranks, v stages of a rank, m micro-batches. Of a micro-batch in a stage F is the forward
pass and B the backward pass, or I and W its halves: the gradients of the input, which the stage
before waits for, and those of the weights, for which nobody waits.

AFAB is that of "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism"
(Huang et al.), 1F1B and interleaved those of "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM" (Narayanan et al.), zero-bubble is ZB-H1 of "Zero Bubble Pipeline
Parallelism" and zero-bubble-v ZB-V of "Pipeline Parallelism with Controllable Memory" (both Qi et
al.).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from rosetrainer.parallel_config import check_schedule_sizes

Step = tuple[str, int]  # kind and stage of an action; its micro-batch follows from the order


class Action(NamedTuple):
    """What a rank does next: F, B, I or W of a micro-batch in a stage."""

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} in stage {self.stage}"


@dataclass(frozen=True)
class Schedule:
    """The actions of each rank in their order. rank_of: the rank of each stage."""

    micro_batches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    @property
    def splits_backward(self) -> bool:
        return any(action.kind == "W" for action in self.actions[0])

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.rank_of) if owner == rank]

    def fed_by(self, action: Action) -> Action | None:
        """The action of another stage whose result this one needs."""
        kind, stage, micro_batch = action
        if kind == "F":
            return Action("F", stage - 1, micro_batch) if stage else None
        if kind == "W" or stage == self.stages - 1:
            return None
        return Action(kind, stage + 1, micro_batch)

    def feeds(self, action: Action) -> Action | None:
        """The action of another stage that needs the result of this one."""
        kind, stage, micro_batch = action
        if kind == "F":
            return Action("F", stage + 1, micro_batch) if stage + 1 < self.stages else None
        if kind == "W" or not stage:
            return None
        return Action(kind, stage - 1, micro_batch)

    @cached_property
    def place(self) -> dict[Action, int]:
        """The number of an action among its rank's."""
        return {action: n for actions in self.actions for n, action in enumerate(actions)}

    @cached_property
    def messages(self) -> dict[tuple[int, int], list[Action]]:
        """By (source, target) rank: for which actions the messages are, in the order of sending.

        Between two ranks messages arrive in the order in which they were sent, so the target has
        to receive them in this order, whatever it needs first.
        """
        found: dict[tuple[int, int], list[Action]] = {}
        for source, actions in enumerate(self.actions):
            for fed in filter(None, map(self.feeds, actions)):
                if (target := self.rank_of[fed.stage]) != source:
                    found.setdefault((source, target), []).append(fed)
        return found


def make_schedule(name: str, p: int, v: int, m: int) -> Schedule:
    """The schedule of this name. Raises ConfigError if it cannot run with p, v and m."""
    check_schedule_sizes(name, p, v, m)
    makers: dict[str, Callable[[int], Iterable[Step]]] = {
        "afab": lambda rank: in_turn(rank, p, 1, m, ahead=m),
        "1f1b": lambda rank: in_turn(rank, p, 1, m, ahead=p - 1 - rank),
        "interleaved": lambda rank: in_turn(rank, p, v, m, ahead=2 * (p - 1 - rank) + (v - 1) * p),
        "zero-bubble": lambda rank: weights_put_off(in_turn(rank, p, 1, m, p - 1 - rank), rank),
        "zero-bubble-v": lambda rank: zero_bubble_v(rank, p, m),
    }
    actions = tuple(tuple(numbered(makers[name](rank), m)) for rank in range(p))
    return Schedule(m, ranks_of_stages(name, p, p * v), actions)


def ranks_of_stages(name: str, p: int, stages: int) -> tuple[int, ...]:
    """The rank of each stage: round after round, or of a V down the ranks and up again."""
    if name == "zero-bubble-v":
        return tuple(min(stage, stages - 1 - stage) for stage in range(stages))
    return tuple(stage % p for stage in range(stages))


def numbered(steps: Iterable[Step], m: int) -> Iterator[Action]:
    """Every stage takes the micro-batches in their order, first in, first out, up to m."""
    done: Counter[Step] = Counter()
    for kind, stage in steps:
        if done[kind, stage] < m:
            yield Action(kind, stage, done[kind, stage])
        done[kind, stage] += 1


def in_turn(rank: int, p: int, v: int, m: int, ahead: int) -> list[Step]:
    """Forward passes `ahead`, then one forward and one backward in turn, then the backward passes.

    A rank goes through its stages with p micro-batches at a time, backward from the last one on.
    """
    local = [(k // p) % v for k in range(v * m)]  # number of a rank's stage
    forward = [("F", rank + p * index) for index in local]
    backward = [("B", rank + p * (v - 1 - index)) for index in local]
    ahead = min(ahead, v * m)
    pairs = zip(forward[ahead:], backward, strict=False)
    turns = [step for pair in pairs for step in pair]
    return [*forward[:ahead], *turns, *backward[v * m - ahead :]]


def weights_put_off(steps: Iterable[Step], delay: int) -> Iterator[Step]:
    """Each B as its I, and the W of the I that lies `delay` back; what is left at the end.

    The later a stage begins, the longer it puts W off: all hold p micro-batches, as 1F1B's first
    stage does, and at the end W takes the place of waiting.
    """
    put_off: list[Step] = []
    for kind, stage in steps:
        if kind == "F":
            yield kind, stage
            continue
        yield "I", stage
        put_off.append(("W", stage))
        if len(put_off) > delay:
            yield put_off.pop(0)
    yield from put_off


def zero_bubble_v(rank: int, p: int, m: int) -> list[Step]:
    """Two stages of a rank, one on the way down the ranks and one on the way up.

    With p = 2 and more micro-batches rank 0 begins F0 F0 F0, F1 I1 W1 F1 I1 W1; then F0 I0 W0 F1 I1
    W1 over and over: what comes back from the last stage, on this rank, leaves no gap.
    """
    down, up = rank, 2 * p - 1 - rank
    after = p - rank  # ranks from this one on
    full = max(m, 2 * p - 1)  # as if for so many, of which `numbered` takes m
    steps: list[Step] = [("F", down)] * (2 * after - 1)
    steps += [("F", up), ("F", down)] * rank
    steps += [("F", up), ("I", up), ("W", up)] * after
    turn = [("F", down), ("I", down), ("W", down), ("F", up), ("I", up), ("W", up)]
    steps += turn * (full - p)  # in the last ones there is no micro-batch left to go down
    steps += [("I", down), ("I", up)] * rank
    steps += [("I", down), ("W", down)] * after
    return steps + [("W", up)] * rank + [("W", down)] * rank

"""What can be said of a schedule before it runs: that it can, what it holds, how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rosetrainer.parallel.pipeline.schedule import Action, Schedule, make_schedule
from rosetrainer.parallel_config import ParallelConfig


class ScheduleError(ValueError):
    """A schedule that does not compute a step, or whose ranks wait for each other for ever."""


class ActionTime(NamedTuple):
    """When an action began and ended, by perf_counter, and how long it waited for other stages."""

    began: float
    ended: float
    waited: float


@dataclass(frozen=True)
class Run:
    """When each action of each rank begins and ends, in seconds."""

    times: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def length(self) -> float:
        """Seconds from the first action to the end of the last one."""
        begins, ends = zip(*(time for rank in self.times for time in rank), strict=True)
        return float(max(ends) - min(begins))

    @property
    def busy(self) -> float:
        """Seconds of all actions, as a mean over the ranks."""
        return sum(end - begin for rank in self.times for begin, end in rank) / len(self.times)

    @property
    def bubble_share(self) -> float:
        """Idle time, as a share of the step: (p - 1) / (m + p - 1) for 1F1B."""
        return 1 - self.busy / self.length

    @property
    def bubble_ratio(self) -> float:
        """Idle time over that of a step without any: (p - 1) / m for 1F1B."""
        return self.length / self.busy - 1


@lru_cache
def checked_schedule(parallel: ParallelConfig, micro_batches: int) -> Schedule:
    """The schedule of a layout, found to be right. Raises ConfigError if it cannot run."""
    sizes = (parallel.pp_size, parallel.stages_of_rank, micro_batches)
    schedule = make_schedule(parallel.pp_schedule, *sizes)
    check_schedule(schedule)
    return schedule


def check_schedule(schedule: Schedule) -> list[int]:
    """The most activations that each rank holds at once, see live_activations.

    Raises ScheduleError unless every action is there once, on its stage's rank and in a possible
    order, and no ranks wait for each other. Sends wait for nobody, and a rank receives in the order
    of sending, so that a rank waits only for actions whose results it needs.
    """
    for rank, actions in enumerate(schedule.actions):
        _check_rank(schedule, rank, actions)
    simulate(schedule, backward_takes_twice)
    return [live_activations(actions) for actions in schedule.actions]


def _check_rank(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    backward = ("I", "W") if schedule.splits_backward else ("B",)
    stages, batches = schedule.stages_of(rank), range(schedule.micro_batches)
    wanted = Counter(Action(k, s, b) for k in ("F", *backward) for s in stages for b in batches)
    found = Counter(actions)
    for action in wanted | found:
        if wanted[action] != found[action]:
            times = f"{found[action]} times and not {wanted[action]}"
            raise ScheduleError(f"rank {rank} makes {action} {times}")
    place = {action: index for index, action in enumerate(actions)}
    for action in actions:
        before = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
        if before and place[action._replace(kind=before)] > place[action]:
            raise ScheduleError(f"rank {rank} makes {action} before its {before}")


def live_activations(actions: tuple[Action, ...]) -> int:
    """The most micro-batches, counted in each stage, whose activations a rank holds at once.

    From F on, to the end of B or of W, which needs them to the last.
    """
    live = peak = 0
    for action in actions:
        live += (action.kind == "F") - (action.kind in ("B", "W"))
        peak = max(peak, live)
    return peak


def backward_takes_twice(action: Action) -> float:
    """Durations for a picture: the backward pass has two products for each of the forward pass."""
    return 2.0 if action.kind == "B" else 1.0


def simulate(schedule: Schedule, seconds: Callable[[Action], float], travel: float = 0.0) -> Run:
    """Each rank begins its next action when it is free and what it needs has come.

    seconds: of an action. travel: seconds of a message from rank to rank.
    Raises ScheduleError if ranks wait for each other.
    """
    ends: dict[Action, float] = {}
    times: list[list[tuple[float, float]]] = [[] for _ in schedule.actions]
    moving = True
    while moving:
        moving = False
        for rank, actions in enumerate(schedule.actions):
            for action in actions[len(times[rank]) :]:
                source = schedule.fed_by(action)
                if source and source not in ends:
                    break
                begin = times[rank][-1][1] if times[rank] else 0.0
                if source:
                    away = schedule.rank_of[source.stage] != rank
                    begin = max(begin, ends[source] + travel * away)
                ends[action] = begin + seconds(action)
                times[rank].append((begin, ends[action]))
                moving = True
    stuck = [a[len(t)] for a, t in zip(schedule.actions, times, strict=True) if len(t) < len(a)]
    if stuck:
        text = "; ".join(f"{action} waits for {schedule.fed_by(action)}" for action in stuck)
        raise ScheduleError(f"ranks wait for each other: {text}")
    return Run(tuple(map(tuple, times)))

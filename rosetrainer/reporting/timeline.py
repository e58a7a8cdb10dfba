"""When each rank of a pipeline did what in one step: a trace, a picture and the bubble."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch

from rosetrainer.config import TrainConfig
from rosetrainer.durable_files import write_json, write_whole
from rosetrainer.parallel.comm import all_gather
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.pipeline.schedule import Schedule
from rosetrainer.parallel.pipeline.simulation import (
    ActionTime,
    Run,
    backward_takes_twice,
    checked_schedule,
    simulate,
)
from rosetrainer.reporting.profiler import WARM_UP
from rosetrainer.reporting.timeline_picture import picture
from rosetrainer.validation import ConfigError

Times = list[list[tuple[float, float, float]]]
"""Of each rank's actions: when it began and ended, and how long it waited, in seconds."""


def check_timeline(config: TrainConfig) -> None:
    """Raises ConfigError if a run has no such step, or nothing can be written there."""
    path, steps, pp_size = config.monitor.timeline, config.run.steps, config.parallel.pp_size
    if path is None:
        return
    if pp_size == 1:
        raise ConfigError(
            f"timeline={path} is of a pipeline, and pp_size=1 is none; pp_size can be 2 or more, "
            f"or use --profile"
        )
    if steps <= WARM_UP:
        raise ConfigError(
            f"timeline={path} shows step {WARM_UP + 1} and steps={steps}; steps must be at least "
            f"{WARM_UP + 1}"
        )
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"timeline={path} should be a file whose name ends in .json")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"timeline={path} cannot be written into {there}; choose another folder")


class Timeline:
    """Records the sixth step of a run on each rank; the first one writes what all have noted."""

    name = "timeline"

    def __init__(
        self, config: TrainConfig, model: Any, context: ParallelContext, world: Axis
    ) -> None:
        assert config.monitor.timeline
        self.path, self.model = config.monitor.timeline, model
        self.context, self.world = context, world
        micro_batches = config.optim.accumulation(context.dp.size)
        self.schedule = checked_schedule(context.parallel, micro_batches)
        self.steps = 0

    def after_step(self) -> str:
        """Once, where the timeline is and what it says of the bubble."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.model.action_times = []
        if self.steps != WARM_UP + 1:
            return ""
        times = gather_times(self.model.action_times, self.world, self.context.device)
        self.close()
        if self.world.rank:
            return ""
        try:
            return self.write(times)
        except OSError as error:  # training is worth more than its picture
            return f"no timeline: {self.path}: {error.strerror}"

    def close(self) -> bool:
        """Ends recording; whether it was not complete, in which case nothing is written."""
        self.model.action_times = None
        return self.steps <= WARM_UP

    def write(self, times: Times) -> str:
        """Writes trace and picture; a text for the user."""
        apart = len(times) // len(self.schedule.actions)  # one stage's ranks are neighbours
        first = times[::apart]
        runs = {
            "theory": theory(self.schedule, measured(first).busy),
            "simulated": simulated(self.schedule, first),
            "measured": measured(first),
        }
        image = self.path.with_suffix(".svg")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, trace(self.schedule, times))
        drawn = picture(self.schedule, runs)
        write_whole(image, lambda part: part.write_text(drawn, encoding="utf-8"))
        name = self.context.parallel.pp_schedule
        line = (
            f"timeline of step {WARM_UP + 1} with {name}: {self.path}, which "
            f"https://ui.perfetto.dev and chrome://tracing open, and {image}"
        )
        return "\n".join([line, *bubbles(runs)])


def gather_times(notes: list[ActionTime], world: Axis, device: torch.device) -> Times:
    """What each rank of the world has noted, by the clock, which all of a machine share."""
    to_clock = time.time() - time.perf_counter()
    own = [[note.began + to_clock, note.ended + to_clock, note.waited] for note in notes]
    table = torch.tensor([own], dtype=torch.float64, device=device)
    every = all_gather(table, world, "timeline", dim=0)  # (ranks, actions, 3)
    return [[tuple(one) for one in rank] for rank in every.tolist()]


def theory(schedule: Schedule, busy: float) -> Run:
    """The schedule with F = I = W and B = I + W, in which a rank computes `busy` seconds."""
    of_one = simulate(schedule, backward_takes_twice).busy
    return simulate(schedule, lambda action: backward_takes_twice(action) * busy / of_one)


def simulated(schedule: Schedule, times: Times) -> Run:
    """The schedule with each stage's F, B, I and W as measured: the medians of its micro-batches.

    Messages take no time, and a rank begins as soon as it can.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for actions, own in zip(schedule.actions, times, strict=True):
        for action, (began, ended, waited) in zip(actions, own, strict=True):
            found.setdefault(action[:2], []).append(ended - began - waited)
    medians = {key: statistics.median(seconds) for key, seconds in found.items()}
    return simulate(schedule, lambda action: medians[action[:2]])


def measured(times: Times) -> Run:
    """As it ran: an action begins where its waiting ends."""
    start = min(began for own in times for began, _, _ in own)
    return Run(
        tuple(
            tuple((began + waited - start, ended - start) for began, ended, waited in own)
            for own in times
        )
    )


def bubbles(runs: dict[str, Run]) -> list[str]:
    """A table of both definitions of the bubble for each run."""
    rows = [
        ("share of the step: of 1F1B (p-1)/(m+p-1)", [run.bubble_share for run in runs.values()]),
        ("ratio to the ideal: of 1F1B (p-1)/m", [run.bubble_ratio for run in runs.values()]),
    ]
    lines = [f"{'bubble':42}" + "".join(f"{name:>11}" for name in runs)]
    return lines + [f"{name:42}" + "".join(f"{n:11.1%}" for n in found) for name, found in rows]


def trace(schedule: Schedule, times: Times) -> dict[str, Any]:
    """Chrome's format of traces: an event for each action of each rank, in microseconds."""
    start = min(began for own in times for began, _, _ in own)
    apart = len(times) // len(schedule.actions)
    events: list[dict[str, Any]] = []
    for rank, own in enumerate(times):
        name = {"name": f"rank {rank}, pp rank {rank // apart}"}
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": name})
        for action, (began, ended, waited) in zip(
            schedule.actions[rank // apart], own, strict=True
        ):
            events.append(
                {
                    "name": f"{action.kind}{action.micro_batch}",
                    "cat": action.kind,
                    "ph": "X",
                    "pid": rank,
                    "tid": 0,
                    "ts": (began + waited - start) * 1e6,
                    "dur": (ended - began - waited) * 1e6,
                    "args": {
                        "stage": action.stage,
                        "micro_batch": action.micro_batch,
                        "waited_us": waited * 1e6,
                    },
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}

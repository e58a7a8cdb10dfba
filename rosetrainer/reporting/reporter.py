"""What the training loop reports of its steps, evaluations and checkpoints. Rank 0 prints it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rosetrainer.config import TrainConfig
from rosetrainer.data.span_corruption import lengths
from rosetrainer.launch.rank import STOP
from rosetrainer.model_flops import flops_per_token
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.reporting.run_log import RunLog, traffic
from rosetrainer.reporting.slow_ranks import SlowRanks


class Recorder(Protocol):
    """What records some steps of a run, for their own sake: all ranks call it alike."""

    name: str

    def after_step(self) -> str:
        """A text for the user, or ""."""
        ...

    def close(self) -> bool:
        """Ends it; whether it was not complete."""
        ...


class Reporter:
    """Times each step. All ranks call it alike; `log` is rank 0's."""

    def __init__(
        self,
        config: TrainConfig,
        context: ParallelContext,
        world: Axis,
        log: RunLog | None,
        peak: float,
        recorders: Sequence[Recorder],
    ) -> None:
        """peak: FLOP/s of all ranks together."""
        self._context, self._log, self._recorders = context, log, recorders
        self._tokens = config.optim.global_batch_size * config.model.context_length
        model = config.model
        sides = lengths(model.context_length) if model.architecture == "t5" else None
        self._utilization = flops_per_token(model, sides) / peak
        self._slow_ranks = SlowRanks(world, (*context.axes, world), context.device)

    def begin_step(self) -> None:
        traffic(self._context)  # what an evaluation or a start has moved is not this step's
        self._slow_ranks.begin_step()
        STOP.step_began = time.monotonic()
        self._started = time.perf_counter()

    def step(self, step: int, figures: dict[str, float]) -> None:
        """A step, counted from 1, that has updated the model; its figures by TensorBoard tag."""
        speed = self._tokens / (time.perf_counter() - self._started)
        performance = {"perf/tokens_per_s": speed, "perf/mfu": speed * self._utilization}
        if self._log:
            self._log.step(step, figures | performance | traffic(self._context))

    def skipped(self, step: int, count: int, why: str) -> None:
        if self._log:
            self._log.skipped(step, count, why)

    def end_step(self) -> None:
        self.say(STOP.end_step(time.monotonic()))
        self.say(self._slow_ranks.end_step())
        for recorder in self._recorders:
            self.say(recorder.after_step())

    def evaluation(self, step: int, figures: dict[str, float], remark: str) -> None:
        if self._log:
            self._log.evaluation(step, figures, remark)

    def checkpoints(self, saved: list[tuple[int, float, float]]) -> None:
        """Takes what Saver.saved holds: (step, seconds blocked, seconds until it was saved)."""
        for step, blocked, seconds in saved:
            STOP.save_seconds = seconds
            if self._log:
                self._log.checkpoint(step, blocked, seconds)
        saved.clear()

    def close(self) -> str:
        """Ends what goes on beside training, however that has ended; gives a line to say, or ""."""
        return "\n".join(
            f"no {recorder.name}: training ended before its steps were recorded"
            for recorder in self._recorders
            if recorder.close()
        )

    def say(self, line: str) -> None:
        if line and self._log:
            self._log.say(line)

"""The training loop: steps, evaluations and checkpoints, until the end or a wish to stop."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import torch

from rosetrainer.checkpoint.manifest import Progress
from rosetrainer.checkpoint.saver import Saver
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.hardware.performance import flops_per_token
from rosetrainer.heartbeat import HEARTBEAT
from rosetrainer.launch.stop import STOP
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.non_finite import NonFiniteGradientError, check_finite, check_skipped
from rosetrainer.optim.precision import Autocast
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.replicas import check_replicas
from rosetrainer.training.agreement import agree_to_stop
from rosetrainer.training.evaluation import evaluate
from rosetrainer.training.pace import Pace
from rosetrainer.training.profiler import StepProfile
from rosetrainer.training.run_log import RunLog, traffic
from rosetrainer.training.step import train_step


@dataclass
class TrainingLoop:
    """One run on this rank. `log` is rank 0's."""

    config: TrainConfig
    corpus: Corpus
    model: GPTModel
    optimizer: AdamW
    context: ParallelContext
    world: Axis
    autocast: Autocast
    dtype: torch.dtype
    saver: Saver
    log: RunLog | None
    peak: float
    """FLOP/s of all ranks together."""
    profile: StepProfile | None = None
    step: int = 0
    skipped: int = 0
    saved: int = 0
    """The step of the newest checkpoint."""
    evaluated: bool = False
    """Whether the step from which the run goes on has had its evaluation."""
    stopped: signal.Signals | None = None
    """What has asked to stop."""

    def run(self) -> None:
        """From the step that is reached to the last, or to a signal; then all is on the disk."""
        try:
            self._steps()
        finally:
            unfinished = self.profile is not None and self.profile.close()
            self.saver.join()  # what goes on behind training is worth finishing, whatever happened
        self.saver.check()
        self.tell_of_saves()
        if unfinished:
            self.say("no profile: training ended before its steps were recorded")

    def _steps(self) -> None:
        pace = Pace(self.world, (*self.context.axes, self.world), self.context.device)
        traffic(self.context)  # what came before the first step is not a step's
        if self.step and not self.evaluated and self.due(self.config.evaluation.eval_every):
            self.evaluate()  # a run that was killed may not have come to it
        while self.step < self.config.run.steps and not self.wants_to_stop():
            pace.begin()
            STOP.time.begin_step(time.monotonic())
            self.one_step()
            STOP.time.end_step(time.monotonic())
            self.say(pace.end())
            self.say(STOP.time.warning())
            if self.profile:
                self.say(self.profile.after_step())
            every = self.config.monitor.check_replicas
            if every and self.step % every == 0:
                check_replicas(self.model, self.context, self.step)
            if self.due(self.config.checkpoint.checkpoint_every):
                self.save()
            if self.due(self.config.evaluation.eval_every):
                self.evaluate()
            traffic(self.context)  # what was no step's
        if self.stopped and self.step > self.saved:
            self.save()

    def one_step(self) -> None:
        started = time.perf_counter()
        try:
            figures = train_step(
                self.config,
                self.corpus,
                self.model,
                self.optimizer,
                self.context,
                self.autocast,
                self.step,
            )
        except NonFiniteGradientError as error:
            self.skipped += 1
            check_skipped(self.skipped, error, self.step, self.config)
            self.optimizer.zero_grad()
            if self.log:
                self.log.skipped(self.step + 1, self.skipped, str(error))
        else:
            tokens = self.config.optim.global_batch_size * self.config.model.context_length
            speed = tokens / (time.perf_counter() - started)
            figures["perf/tokens_per_s"] = speed
            figures["perf/mfu"] = speed * flops_per_token(self.config.model) / self.peak
            if self.log:
                self.log.step(self.step + 1, figures | traffic(self.context))
        self.step += 1

    def due(self, every: int) -> bool:
        """Whether something that comes every so many steps, and at the end, comes now."""
        return self.step == self.config.run.steps or bool(every and self.step % every == 0)

    def wants_to_stop(self) -> bool:
        self.saver.check()
        HEARTBEAT.beat()
        self.stopped = agree_to_stop(STOP.signal, self.world, self.context.device)
        STOP.wait_for_steps()
        return self.stopped is not None

    def evaluate(self) -> None:
        """Says what an evaluation finds, unless a signal breaks it off."""
        found = evaluate(
            self.config, self.corpus, self.model, self.context, self.autocast, self.wants_to_stop
        )
        if found is None:
            return
        figures, remark = found
        check_finite("validation loss", figures["val/loss"], self.step - 1, self.config)
        if self.log:
            self.log.evaluation(self.step, figures, remark)

    def save(self) -> None:
        self.saver.save(self.progress())
        self.saved = self.step
        self.tell_of_saves()

    def tell_of_saves(self) -> None:
        for saved in self.saver.saved:
            STOP.time.save = saved[2]
            if self.log:
                self.log.checkpoint(*saved)
        self.saver.saved.clear()

    def say(self, line: str) -> None:
        if line and self.log:
            self.log.say(line)

    def progress(self) -> Progress:
        rows = self.step * self.config.optim.global_batch_size
        return Progress(
            step=self.step,
            updates=self.step - self.skipped,
            skipped=self.skipped,
            tokens_seen=rows * self.config.model.context_length,
            dtype=str(self.dtype).removeprefix("torch."),
            data=self.corpus.meta.sha256,
            config=self.config,
        )

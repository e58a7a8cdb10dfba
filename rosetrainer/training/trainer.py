"""The training loop: steps, evaluations and checkpoints, until the end or a signal to stop."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from rosetrainer.checkpoint.manifest import Progress
from rosetrainer.checkpoint.saver import Saver
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.launch.rank import STOP
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.non_finite import (
    NonFiniteGradientError,
    check_finite,
    check_norm,
    check_skipped,
)
from rosetrainer.optim.optimizer import set_learning_rates
from rosetrainer.optim.precision import Autocast
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.replicas import check_replicas
from rosetrainer.parallel.zero.frozen import gather_outside
from rosetrainer.parallel.zero.sharded_model import sharding_of
from rosetrainer.reporting.reporter import Reporter
from rosetrainer.training.agreement import agree_to_stop
from rosetrainer.training.evaluation import evaluate
from rosetrainer.training.step import compute_gradients, micro_batches


@dataclass
class TrainingState:
    """How far a run is."""

    step: int = 0
    skipped: int = 0
    saved: int = 0
    """The step of the newest checkpoint."""
    stopped: signal.Signals | None = None
    """What has asked to stop."""


@dataclass(frozen=True)
class Trainer:
    """One run on this rank, with what setup.py has built for it."""

    config: TrainConfig
    corpus: Corpus
    model: GPTModel
    optimizer: AdamW
    context: ParallelContext
    world: Axis
    autocast: Autocast
    saver: Saver
    reporter: Reporter
    state: TrainingState

    def train(self, evaluated: bool) -> None:
        """To the last step, or to a signal; then everything is on the disk.

        evaluated: the step from which the run goes on has had its evaluation.
        """
        try:
            if self.state.step and not evaluated and self.due(self.config.evaluation.eval_every):
                self.evaluate()  # a run that was killed may have missed it
            while self.state.step < self.config.run.steps and not self.wants_to_stop():
                self.train_one_step()
                every = self.config.monitor.check_replicas
                if every and self.state.step % every == 0:
                    check_replicas(self.model, self.context, self.state.step)
                if self.due(self.config.checkpoint.checkpoint_every):
                    self.save()
                if self.due(self.config.evaluation.eval_every):
                    self.evaluate()
            if self.state.stopped and self.state.step > self.state.saved:
                self.save()
        finally:
            remark = self.reporter.close()
            self.saver.join()  # a checkpoint under way is worth finishing, whatever has happened
        self.saver.check()
        self.reporter.checkpoints(self.saver.saved)
        self.reporter.say(remark)

    def due(self, every: int) -> bool:
        """Whether something that comes every so many steps, and at the end, comes now."""
        step = self.state.step
        return step == self.config.run.steps or bool(every and step % every == 0)

    def wants_to_stop(self) -> bool:
        """The same on all ranks. Raises CheckpointError if a checkpoint could not be written."""
        self.saver.check()
        self.state.stopped = agree_to_stop(STOP.signal, self.world, self.context.device)
        STOP.waits_for_step = True
        return self.state.stopped is not None

    def train_one_step(self) -> None:
        """Updates the model, or skips the update if a gradient is not finite."""
        config, model, optimizer, state = self.config, self.model, self.optimizer, self.state
        self.reporter.begin_step()
        try:
            figures = train_step(
                config, self.corpus, model, optimizer, self.context, self.autocast, state.step
            )
        except NonFiniteGradientError as error:
            state.skipped += 1
            check_skipped(state.skipped, error, state.step, config)
            optimizer.zero_grad()
            self.reporter.skipped(state.step + 1, state.skipped, str(error))
        else:
            self.reporter.step(state.step + 1, figures)
        state.step += 1
        self.reporter.end_step()

    def evaluate(self) -> None:
        """Reports the validation loss, unless a signal to stop comes first."""
        sharded = sharding_of(self.model)
        if sharded:
            gather_outside(sharded)
        found = evaluate(
            self.config, self.corpus, self.model, self.context, self.autocast, self.wants_to_stop
        )
        if sharded:
            sharded.release()
        if found is not None:
            loss = found[0]["val/loss"]
            check_finite("validation loss", loss, self.state.step - 1, self.config)
            self.reporter.evaluation(self.state.step, *found)

    def save(self) -> None:
        config, step = self.config, self.state.step
        progress = Progress(
            step=step,
            updates=step - self.state.skipped,
            skipped=self.state.skipped,
            tokens_seen=step * config.optim.global_batch_size * config.model.context_length,
            dtype=str(config.precision.compute_dtype),
            data=self.corpus.meta.sha256,
            config=config,
        )
        self.saver.save(progress)
        self.state.saved = step
        self.reporter.checkpoints(self.saver.saved)


def train_step(
    config: TrainConfig,
    corpus: Corpus,
    model: GPTModel,
    optimizer: AdamW,
    context: ParallelContext,
    autocast: Autocast,
    step: int,
) -> dict[str, float]:
    """One update; its figures by TensorBoard tag. Raises ConfigError if the loss is not finite.

    Raises NonFiniteGradientError, on every rank and before anything is updated, if a gradient or
    the norm of all is not, or is too large for the optimizer.
    """
    rate = set_learning_rates(optimizer, config.optim, step, config.run.steps)
    batches = micro_batches(config, corpus, context, step)
    seed = DropoutSeed(config.run.seed, step)
    loss = compute_gradients(model, batches, context, autocast, seed)
    check_finite("loss", loss, step, config)
    norm = clip_gradients(model, context, config.optim.grad_clip)
    check_norm(norm, next(model.parameters()).dtype, config)
    optimizer.step()
    optimizer.zero_grad()
    return {"train/loss": loss, "train/lr": rate, "train/grad_norm": norm}

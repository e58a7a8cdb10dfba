"""What a run says before its first step and after its last one."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from rosetrainer.checkpoint.manifest import Progress, folder_name
from rosetrainer.checkpoint.run_folder import CONFIG, describe_run
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.environment import gpus_are_own, world_from_environment
from rosetrainer.launch.rank import report_stop
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.optimizer import learning_rate
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.training.loss_curve import CURVE, NARROWEST
from rosetrainer.training.run_log import RunLog
from rosetrainer.training.screen import Screen

SAID_ELSEWHERE = ("out", "vocab_size", "compute_dtype")


def describe(context: ParallelContext, dtype: torch.dtype, wanted: str) -> str:
    """One line: what the ranks are and what they run on."""
    where = "CUDA with nccl" if context.device.type == "cuda" else "CPU with gloo"
    if context.world_size == 1:
        where = context.device.type.upper()
    if remark := gpu_remark(context.device, wanted):
        where += f" ({remark})"
    threads = torch.get_num_threads()
    ranks = f"{context.world_size} rank{'s' if context.world_size > 1 else ''}"
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    return (
        f"{ranks}: tensor parallel {context.tp.size} x data parallel {context.dp.size}, "
        f"on {where}, {each}, {str(dtype).removeprefix('torch.')}"
    )


def introduce(
    folder: Path, config: TrainConfig, corpus: Corpus, model: GPTModel, context: ParallelContext
) -> None:
    """Says what the run is, once, and writes all of it to its folder."""
    describe_run(folder, config, corpus.folder)
    optim, tokens = config.optim, config.model.context_length
    held = sum(p.numel() for p in model.parameters())
    accumulation, micro = (f(context.dp.size) for f in (optim.accumulation, optim.micro_batch))
    shares = f" = {context.dp.size} dp ranks x {accumulation} micro-batches x {micro} sequences"
    print(
        f"{held:,} parameters on this rank, vocabulary {config.model.vocab_size:,}; a step is "
        f"{optim.global_batch_size} sequences x {tokens} tokens"
        f"{shares if context.dp.size * accumulation > 1 else ''}"
    )
    changed = " ".join(changes(config)) or "none"
    print(f"not as by default: {changed}; all settings: {shown(folder / CONFIG)}")


def changes(config: TrainConfig) -> list[str]:
    """Each setting that is not the default: "steps=300", ...

    But for those that other lines say: the folder, the vocabulary, what dtype came to.
    """
    default = asdict(TrainConfig())
    return [
        f"{key}={value}"
        for name, component in asdict(config).items()
        for key, value in component.items()
        if value != default[name][key] and key not in SAID_ELSEWHERE
    ]


def schedule_notes(config: TrainConfig, reached: Progress | None) -> list[str]:
    """What may surprise of the learning rate: a line each, before the first step."""
    optim, steps = config.optim, config.run.steps
    notes = []
    if reached and reached.config.run.steps != steps and reached.step < steps:
        before = reached.config.run.steps
        was = learning_rate(optim, max(reached.step - 1, 0), before)
        now = learning_rate(optim, reached.step, steps)
        notes.append(
            f"the {optim.schedule} schedule ends at step {steps} now, not at {before}: the "
            f"learning rate was {was:.2e} in step {reached.step} and is {now:.2e} in step "
            f"{reached.step + 1}"
        )
    if optim.warmup_steps > steps:
        notes.append(
            f"warning: warmup_steps={optim.warmup_steps} is more than steps={steps}: the learning "
            f"rate ends at {learning_rate(optim, steps - 1, steps):.2e} and never reaches "
            f"{optim.learning_rate:.2e}; warmup_steps can be 0 to {steps}"
        )
    return notes


def going_on(checkpoint: Path | None, reached: Progress | None) -> str:
    """A line, or "" for a run that begins."""
    if checkpoint is None or reached is None:
        return ""
    return (
        f"going on from {shown(checkpoint)}: {reached.step} steps, {reached.tokens_seen:,} tokens; "
        f"--resume never begins a new run"
    )


def show_curve(log: RunLog) -> None:
    """On a terminal with room for it; loss.svg shows it too."""
    screen, curves = sys.stdout, log.curves()
    if isinstance(screen, Screen) and screen.is_terminal and curves.can_be_drawn:
        columns = screen.columns()
        if columns >= NARROWEST:
            print(f"\n{curves.plot(columns, screen.encoding)}\n")


def say_goodbye(folder: Path, steps: int, saved: int, stopped: bool, finished: bool) -> None:
    """saved: the step of the newest checkpoint. finished: before this start."""
    where = shown(folder)
    checkpoint = f"{where}/{folder_name(saved)}"
    if finished:
        print(
            f"finished: {steps} steps of {steps} are in {where}; give more --steps to go on, or a "
            f"new --out"
        )
    elif not stopped:
        print(f"saved in {checkpoint}; {CURVE}, log.jsonl and TensorBoard's events are beside it")
    elif saved:
        report_stop(f"saved in {checkpoint}; the same command goes on from there")
    else:
        report_stop("before it went a step, so there is nothing to save")


def shown(path: Path) -> str:
    """As a user would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def gpu_remark(device: torch.device, wanted: str) -> str:
    """Of the GPUs that this rank sees and does not use; "" if there is none."""
    gpus, (_, _, _, local_world_size) = torch.cuda.device_count(), world_from_environment()
    if device.type == "cpu":
        too_few = gpus and wanted == "auto"
        return f"GPUs: {gpus}, fewer than the {local_world_size} local ranks" if too_few else ""
    own = gpus_are_own(gpus, local_world_size)
    idle = gpus - (1 if own else local_world_size)
    return f"{'its own ' * own}GPUs: {gpus}, {idle} idle: a rank uses one" if idle > 0 else ""

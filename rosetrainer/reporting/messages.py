"""What a run prints before its first step and after its last one."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from rosetrainer.checkpoint.manifest import Manifest, Progress, folder_name
from rosetrainer.checkpoint.run_folder import CONFIG
from rosetrainer.config import TrainConfig
from rosetrainer.environment import gpus_are_own, world_from_environment
from rosetrainer.launch.errors import report_stop
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.optimizer import learning_rate
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import shard_spec
from rosetrainer.parallel.zero.sharded_model import sharding_of
from rosetrainer.reporting.loss_curve import CURVE, NARROWEST
from rosetrainer.reporting.run_log import RunLog
from rosetrainer.reporting.screen import Screen

IN_OTHER_LINES = ("out", "vocab_size", "compute_dtype", "compute_kernels")


def describe(context: ParallelContext, dtype: torch.dtype, wanted: str, shared: str) -> str:
    """One line: what the ranks are and what they run on. shared: open_sums of tp."""
    where = "CUDA with nccl" if context.device.type == "cuda" else "CPU with gloo"
    if context.device.type == "cpu" and context.tp.size > 1:
        where += f" (no shared memory for tp: {shared})" if shared else ", tp in shared memory"
    if context.world_size == 1:
        where = context.device.type.upper()
    if remark := gpu_remark(context.device, wanted):
        where += f" ({remark})"
    threads = torch.get_num_threads()
    ranks = f"{context.world_size} rank{'s' if context.world_size > 1 else ''}"
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    stages = f" x pipeline parallel {context.pp.size}" if context.pp.size > 1 else ""
    return (
        f"{ranks}: tensor parallel {context.tp.size} x data parallel {context.dp.size}{stages}, "
        f"on {where}, {each}, {str(dtype).removeprefix('torch.')}"
    )


def introduce(folder: Path, config: TrainConfig, model: GPTModel, dp_size: int) -> None:
    """Prints what the run is."""
    optim, tokens = config.optim, config.model.context_length
    own = f"{sum(p.numel() for p in model.parameters()):,}"
    held = f"{own} parameters on this rank"
    if sharding_of(model):
        shapes = [getattr(shard_spec(p), "gathered_shape", p.shape) for p in model.parameters()]
        whole = sum(map(math.prod, shapes))
        held = f"{own} of {whole:,} parameters are this rank's slices"
    if frozen := sum(p.numel() for p in model.parameters() if not p.requires_grad):
        held += f", {frozen:,} of them frozen"
    accumulation, micro = optim.accumulation(dp_size), optim.micro_batch(dp_size)
    parts = f" = {dp_size} dp ranks x {accumulation} micro-batches x {micro} sequences"
    print(
        f"{held}, vocabulary {config.model.vocab_size:,}; a step "
        f"is {optim.global_batch_size} sequences x {tokens} tokens"
        f"{parts if dp_size * accumulation > 1 else ''}"
    )
    changed = " ".join(changes(config)) or "none"
    print(f"not as by default: {changed}; all settings: {shown(folder / CONFIG)}")


def changes(config: TrainConfig) -> list[str]:
    """Each setting that is not the default: "steps=300", ...

    But for those in other lines: the folder, the vocabulary, the dtype that auto resolved to.
    """
    default = asdict(TrainConfig())
    return [
        f"{key}={value}"
        for name, component in asdict(config).items()
        for key, value in component.items()
        if value != default[name][key] and key not in IN_OTHER_LINES
    ]


def schedule_notes(config: TrainConfig, reached: Progress | None) -> list[str]:
    """Lines about a learning rate that may be unexpected."""
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


def start_notes(config: TrainConfig, checkpoint: tuple[Path, Manifest] | None) -> list[str]:
    """Where the run is resumed, and schedule_notes."""
    if checkpoint is None:
        return schedule_notes(config, None)
    folder, manifest = checkpoint
    reached = manifest.progress
    resumed = (
        f"going on from {shown(folder)}: {reached.step} steps, {reached.tokens_seen:,} tokens; "
        f"--resume never begins a new run"
    )
    return [resumed, *schedule_notes(config, reached)]


def show_curve(log: RunLog) -> None:
    """Plots the loss on a terminal that is wide enough; loss.svg has it too."""
    screen, curves = sys.stdout, log.curves()
    if isinstance(screen, Screen) and screen.is_terminal and curves.can_be_drawn:
        columns = screen.columns()
        if columns >= NARROWEST:
            print(f"\n{curves.plot(columns, screen.encoding)}\n")


def report_end(folder: Path, steps: int, saved: int, stopped: bool, finished: bool) -> None:
    """saved: the step of the newest checkpoint. finished: already before this start."""
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
    """About GPUs that this rank sees and does not use, or ""."""
    gpus, (_, _, _, local_world_size) = torch.cuda.device_count(), world_from_environment()
    if device.type == "cpu":
        too_few = gpus and wanted == "auto"
        return f"GPUs: {gpus}, fewer than the {local_world_size} local ranks" if too_few else ""
    own = gpus_are_own(gpus, local_world_size)
    idle = gpus - (1 if own else local_world_size)
    return f"{'its own ' * own}GPUs: {gpus}, {idle} idle: a rank uses one" if idle > 0 else ""

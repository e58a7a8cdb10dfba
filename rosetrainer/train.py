"""The training loop.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m rosetrainer train --tp-size 2
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rosetrainer.checkpoint import check_run_folder, describe_run, new_run_folder, save_weights
from rosetrainer.clip import clip_gradients
from rosetrainer.comm import all_reduce
from rosetrainer.config import TrainConfig
from rosetrainer.data import Corpus, open_corpus
from rosetrainer.data_parallel import accumulate_gradients
from rosetrainer.dropout import DropoutSeed
from rosetrainer.environment import under_torchrun, world_from_environment
from rosetrainer.evaluation import evaluate
from rosetrainer.fields import ConfigError, Count, check_fields
from rosetrainer.flags import parse_flags, ranks_to_start
from rosetrainer.launch import launch
from rosetrainer.model import GPTModel
from rosetrainer.optim import build_optimizer, learning_rate
from rosetrainer.parallel_context import (
    ParallelContext,
    choose_device,
    end_parallel,
    init_parallel,
)
from rosetrainer.parity import show_proof
from rosetrainer.performance import choose_dtype, flops_per_token, matmul_peak, set_threads
from rosetrainer.precision import Autocast, NonFiniteGradientError, autocast_for
from rosetrainer.replicas import check_replicas
from rosetrainer.run_log import RunLog, describe, traffic
from rosetrainer.tensor_parallel import init_weights


@dataclass(frozen=True)
class TrainCommand:
    """Trains a GPT on a corpus that data/prepare.py wrote."""

    config: TrainConfig = field(default_factory=TrainConfig)
    nproc: Count | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""
    prove: bool = False
    """First show who holds what, and that this layout computes what one process does."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_flags(TrainCommand, argv, "python -m rosetrainer train")
    check_fields(command)
    parallel = command.config.parallel
    world_size, starts = ranks_to_start("train", argv, command.nproc, parallel)
    config, corpus = check_config(command.config, world_size)
    if starts:
        return launch(world_size, ["train", *argv], config.run.threads)
    train(config, corpus, command.prove)
    return 0


def check_config(config: TrainConfig, world_size: int) -> tuple[TrainConfig, Corpus]:
    """The config with the corpus's vocabulary, all of it checked. Raises ConfigError."""
    config.check(world_size)
    _, _, local_rank, local_world_size = world_from_environment()
    local_ranks = local_world_size if under_torchrun() else world_size
    choose_device(config.run.device, local_rank, local_ranks)
    if local_rank == 0:
        check_run_folder(config.run.out)
    corpus = open_corpus(config.run.data, config.model.context_length)
    corpus.tokenizer()  # better found broken now than by whoever wants text of the trained model
    model = replace(config.model, vocab_size=corpus.meta.vocab_size)
    return replace(config, model=model), corpus


def train(config: TrainConfig, corpus: Corpus, prove_first: bool = False) -> GPTModel:
    """Trains on every rank of the world; rank 0 writes the run folder."""
    set_threads(config.run.threads)
    context = init_parallel(config.parallel, config.run.device)
    dtype = choose_dtype(config.run.dtype, context.device)
    autocast = autocast_for(dtype, context.device)
    model = GPTModel(config.model, context)
    if dtype == torch.float64:
        model.double()
    init_weights(model, config.run.seed)
    speaks = context.rank == 0
    if speaks:
        print(describe(context, dtype, config.run.device))
    if prove_first:
        show_proof(config.model, context, dtype)
    folder = new_run_folder(config.run.out) if speaks else None
    if folder is not None:
        introduce(config, corpus, model, context, folder)
    train_loop(config, corpus, model, context, autocast, folder)
    if folder is not None:
        print(f"saved in {folder}: weights, config, log.jsonl, TensorBoard events")
    end_parallel()
    return model


def train_loop(
    config: TrainConfig,
    corpus: Corpus,
    model: GPTModel,
    context: ParallelContext,
    autocast: Autocast,
    folder: Path | None,
) -> None:
    """Every step, evaluation and save; only the rank that has the folder writes and speaks."""
    run = config.run
    optimizer = build_optimizer(model, config.optim)
    own_peak = matmul_peak(context.device, choose_dtype(run.dtype, context.device))
    peak = sum_over_ranks(own_peak, context)
    tokens = config.optim.global_batch_size * config.model.context_length
    traffic(context)  # what came before the first step is not a step's
    skipped = 0
    with RunLog(folder, run.steps) if folder is not None else nullcontext() as log:
        for step in range(run.steps):
            started = time.perf_counter()
            try:
                figures = train_step(config, corpus, model, optimizer, context, autocast, step)
            except NonFiniteGradientError as error:
                skipped += 1
                check_skipped(skipped, error, step, config)
                optimizer.zero_grad()
                if log:
                    log.skipped(step + 1, skipped, str(error))
            else:
                speed = tokens / (time.perf_counter() - started)
                figures["perf/tokens_per_s"] = speed
                figures["perf/mfu"] = speed * flops_per_token(config.model) / peak
                if log:
                    log.step(step + 1, figures | traffic(context))
            if run.check_replicas and (step + 1) % run.check_replicas == 0:
                check_replicas(model, context, step + 1)
            last = step + 1 == run.steps
            if last or (run.eval_every and (step + 1) % run.eval_every == 0):
                validation, remark = evaluate(config, corpus, model, context, autocast)
                check_finite("validation loss", validation["val/loss"], step, config)
                if log:
                    log.evaluation(step + 1, validation, remark)
                save_weights(folder, model, context)
            traffic(context)  # what was no step's


def train_step(
    config: TrainConfig,
    corpus: Corpus,
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    autocast: Autocast,
    step: int,
) -> dict[str, float]:
    """One update; its figures by TensorBoard tag. Raises ConfigError if the loss is not finite.

    Raises NonFiniteGradientError, on every rank and before anything is updated, if a gradient or
    the norm of all is not.
    """
    rate = learning_rate(config.optim, step, config.run.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    batches = micro_batches(config, corpus, context, step)
    seed = DropoutSeed(config.run.seed, step)
    loss = accumulate_gradients(model, batches, context, autocast, seed)
    check_finite("loss", loss, step, config)
    norm = clip_gradients(model, context.tp, config.optim.grad_clip)
    if not math.isfinite(norm):
        raise NonFiniteGradientError(f"the gradients' norm is {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return {"train/loss": loss, "train/lr": rate, "train/grad_norm": norm}


def check_finite(what: str, value: float, step: int, config: TrainConfig) -> None:
    """Raises ConfigError, before anything is saved, if training has diverged."""
    if not math.isfinite(value):
        raise ConfigError(
            f"the {what} is {value} at step {step + 1}; try a learning_rate below "
            f"{config.optim.learning_rate:g}; weights saved by earlier evaluations are kept"
        )


def check_skipped(
    skipped: int, error: NonFiniteGradientError, step: int, config: TrainConfig
) -> None:
    """Raises ConfigError if more steps were skipped than config.run.max_skipped."""
    if skipped > config.run.max_skipped:
        raise ConfigError(
            f"step {step + 1}: {error}; skipped {skipped}, max_skipped={config.run.max_skipped}; "
            f"try a learning_rate below {config.optim.learning_rate:g}; weights saved by earlier "
            f"evaluations are kept"
        )


def micro_batches(
    config: TrainConfig, corpus: Corpus, context: ParallelContext, step: int
) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the step's global batch: by dp rank alone, so a tp group shares it."""
    optim, dp = config.optim, context.dp
    size = optim.micro_batch(dp.size)
    batches = []
    for index in range(optim.accumulation(dp.size)):
        first = (index * dp.size + dp.rank) * size
        rows = range(first, first + size)
        arrays = corpus.train_batch(config.run.seed, step, optim.global_batch_size, rows)
        input_ids, labels = (torch.from_numpy(a).to(context.device) for a in arrays)
        batches.append((input_ids, labels))
    return batches


def introduce(
    config: TrainConfig, corpus: Corpus, model: GPTModel, context: ParallelContext, folder: Path
) -> None:
    """Prints the resolved config and the work of a step, once, and writes them to the folder."""
    describe_run(folder, config, corpus.folder)
    for name, component in asdict(config).items():
        print(f"{name}: " + " ".join(f"{key}={value}" for key, value in component.items()))
    optim = config.optim
    accumulation, micro = (f(context.dp.size) for f in (optim.accumulation, optim.micro_batch))
    held = sum(p.numel() for p in model.parameters())
    print(
        f"{held:,} parameters on this rank; a step is {optim.global_batch_size} sequences x "
        f"{config.model.context_length} tokens = {context.dp.size} dp ranks x {accumulation} "
        f"micro-batches x {micro} sequences",
        flush=True,
    )


def sum_over_ranks(value: float, context: ParallelContext) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=context.device)
    for axis in context.axes:
        total = all_reduce(total, axis, "start")
    return total.item()

"""What training needs, checked and built once on each rank, and how a run begins and ends."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from rosetrainer.checkpoint.run_folder import check_unlocked, describe_run
from rosetrainer.checkpoint.saver import Saver, load_checkpoint
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus, open_corpus
from rosetrainer.data.objectives import objective_of
from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.hardware.performance import (
    be_deterministic,
    choose_dtype,
    matmul_peak,
    set_threads,
)
from rosetrainer.launch.errors import ERROR_REPORT
from rosetrainer.launch.process_group import (
    WATCH_MARGIN_SECONDS,
    init_process_group,
    open_store,
)
from rosetrainer.launch.watch import HangWatch
from rosetrainer.model_size import check_memory
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.frozen import freeze
from rosetrainer.optim.optimizer import build_optimizer, whole_matrices
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import Axis, ParallelContext, end_parallel, init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.parallel.zero.groups import in_slices, shard_model
from rosetrainer.reporting.messages import (
    describe,
    introduce,
    report_end,
    show_curve,
    shown,
    start_notes,
)
from rosetrainer.reporting.profiler import StepProfile, check_profile
from rosetrainer.reporting.reporter import Recorder, Reporter
from rosetrainer.reporting.run_log import LOG, RunLog, has_evaluation
from rosetrainer.reporting.screen import own_screen
from rosetrainer.reporting.timeline import Timeline, check_timeline
from rosetrainer.training.agreement import check_same_settings, gather_texts, world_axis
from rosetrainer.training.memory_need import bytes_of_a_number, frozen_share
from rosetrainer.training.open_run import RunLocation, open_run
from rosetrainer.training.resume_plan import ResumePlan, find_resume_plan
from rosetrainer.training.run_identity import settle
from rosetrainer.training.step import open_sums
from rosetrainer.training.trainer import Trainer, TrainingState

# What only some runs need is imported where they need it: each import is time to the first step.


def check_config(
    config: TrainConfig, world_size: int
) -> tuple[TrainConfig, Corpus, ResumePlan, tuple[bool, str]]:
    """What `train` takes. Raises ConfigError.

    The config with the corpus's vocabulary, all of it checked; what the run is resumed from, which
    rank 0 alone looks for; and whether the blocks are compiled, as `compiles` says.
    """
    config.check(world_size)
    rank, _, local_rank, local_world_size = world_from_environment()
    tp_size, dp_size = config.parallel.resolve(world_size)
    device = choose_device(config.hardware.device)
    config.parallel.check_device(device.type)
    compiled = compiles(config, tp_size, device)
    check_profile(config.monitor.profile, config.run.steps)
    check_timeline(config)
    corpus = open_corpus(config.run.data, config.model.context_length, read_all=local_rank == 0)
    corpus.tokenizer()  # better found broken now than by whoever wants text of the trained model
    if config.run.init_from:
        from rosetrainer.checkpoint.huggingface.run_from import check_tokens

        check_tokens(config.run.init_from, config.model.vocab_size, corpus)
    if objective := objective_of(config.model.architecture):
        model, corpus = objective(corpus, config.model, config.run.init_from is not None)
        config = replace(config, model=model)
    elif not config.run.init_from:
        config = config.with_settings(vocab_size=corpus.meta.vocab_size)
    frozen = frozen_share(config)
    if device.type == "cpu":
        each = bytes_of_a_number(config, dp_size, frozen)
        copies = local_world_size / tp_size / config.parallel.pp_size
        check_memory(config.model, each, "weights, gradients and moments", copies)
    plan = find_resume_plan(config, corpus) if rank == 0 else ResumePlan()
    if rank == 0 and config.run.init_from and not plan.candidates:
        from rosetrainer.checkpoint.huggingface.load import find_weights

        find_weights(config.run.init_from, config.model)  # better found lacking now than by all
    if plan.folder:
        check_unlocked(plan.folder)
    return config, corpus, plan, compiled


def train(
    config: TrainConfig, corpus: Corpus, plan: ResumePlan, compiled: tuple[bool, str]
) -> tuple[GPTModel, signal.Signals | None]:
    """Trains on every rank; rank 0 writes the run folder. The arguments are check_config's.

    Gives the model, and the signal that stopped training before its end.
    """
    if config.precision.deterministic:
        be_deterministic()
    set_threads(config.hardware.threads)
    world, timeout = world_axis(), config.monitor.timeout
    store = open_store(timedelta(seconds=timeout))
    watch = None
    if store:
        watch = HangWatch(store, world.rank, world.size, timeout)
        watch.collectives_started = lambda: world.ledger.collectives_started
    with own_screen() if world.rank == 0 else nullcontext():
        limit = timedelta(seconds=timeout + WATCH_MARGIN_SECONDS)
        device = init_process_group(config.hardware.device, limit, store)
        resumed = gather_texts(" ".join(plan.came_to), world, device)[0].partition(" ")[::2]
        config, remarks = settle(config, resumed, device)
        check_same_settings(config, corpus, compiled[0], world, device)
        location = open_run(config.run.out, plan, world, device)
        ERROR_REPORT.folder = location.folder
        for remark in remarks if world.rank == 0 else []:
            print(remark)
        with location.lock or nullcontext():
            context = init_parallel(config.parallel, config.hardware.device, limit.total_seconds())
            if watch:
                ledgers = [axis.ledger for axis in (world, *context.axes)]
                watch.collectives_started = lambda: sum(one.collectives_started for one in ledgers)
                watch.comparable = context.pp.size == 1
            trained = train_in_layout(config, corpus, location, context, world, compiled)
            if watch:
                watch.close()
            end_parallel()
            return trained


def train_in_layout(
    config: TrainConfig,
    corpus: Corpus,
    location: RunLocation,
    context: ParallelContext,
    world: Axis,
    compiled: tuple[bool, str],
) -> tuple[GPTModel, signal.Signals | None]:
    """Builds what the loop needs, reports what it is, and runs the loop. compiled: of compiles."""
    dtype = choose_dtype(str(config.precision.compute_dtype), context.device)
    folder, is_first = location.folder, context.rank == 0
    shared = open_sums(context, config.hardware.shared_memory == "auto")
    if is_first:
        print(describe(context, dtype, config.hardware.device, shared))
    model, optimizer, state = build(config, location, context, dtype)
    if compiled[0]:
        compile_blocks(model.blocks)
    # Whether rank 0's log has the evaluation of the step that is resumed; the same on all ranks.
    found = is_first and state.step > 0 and has_evaluation(folder / LOG, state.step)
    evaluated = bool(gather_texts("yes" if found else "", world, context.device)[0])
    finished = evaluated and state.step == config.run.steps
    if is_first and not finished:
        describe_run(folder, config, corpus.folder)
        introduce(folder, config, model, context.dp.size)
        for note in filter(None, [compiled[1], *start_notes(config, location.checkpoint)]):
            print(note)
    kernels = partial(
        fast_kernels, dtype, context.device, config.precision.compute_kernels or "torch"
    )
    with kernels():
        peak = sum_over_ranks(matmul_peak(context.device, dtype), context)
    recorders: list[Recorder] = []
    if config.monitor.profile:
        own = (Path(shown(folder)), context.rank, context.device)
        recorders.append(StepProfile(config.monitor.profile, *own))
    if config.monitor.timeline:
        recorders.append(Timeline(config, model, context, world))
    with RunLog(folder, config.run.steps, state.step) if is_first else nullcontext() as log:
        trainer = Trainer(
            config,
            corpus,
            model,
            optimizer,
            context,
            world,
            autocast_for(dtype, context.device),
            Saver(folder, location.attempt, model, optimizer, context, config.checkpoint),
            Reporter(config, context, world, log, peak, recorders),
            state,
        )
        with kernels():
            trainer.train(evaluated)
        if log and not finished:
            show_curve(log)
    if is_first:
        report_end(folder, config.run.steps, state.saved, bool(state.stopped), finished)
    return model, state.stopped


def build(
    config: TrainConfig, location: RunLocation, context: ParallelContext, dtype: torch.dtype
) -> tuple[GPTModel, AdamW, TrainingState]:
    """The model and its optimizer, as the checkpoint has them, or with their initial weights: those
    of --init-from, or random ones."""
    # No rank ever holds all of what is in slices: shard_model makes a unit at a time whole.
    device = torch.device("meta") if in_slices(context) else context.device
    model = build_model(config.model, replace(context, device=device))
    if dtype == torch.float64:
        model.double()
    freeze(model, config.optim.freeze)
    timeout = config.monitor.timeout + WATCH_MARGIN_SECONDS
    # A pipeline adds up its micro-batches' gradients as they are: in the weights' own dtype.
    products = dtype if context.pp.size == 1 else None
    shard_model(model, context, whole_matrices(model, config.optim), products, timeout)
    optimizer = build_optimizer(model, config.optim)
    if location.checkpoint is None:
        if config.run.init_from:
            from rosetrainer.checkpoint.huggingface.load import find_weights, load_weights

            load_weights(model, find_weights(config.run.init_from, config.model, config.run.seed))
        else:
            init_weights(model, config.run.seed)
        return model, optimizer, TrainingState()
    folder, manifest = location.checkpoint
    load_checkpoint(folder, manifest, model, optimizer, dtype)
    reached = manifest.progress
    return model, optimizer, TrainingState(reached.step, reached.skipped, reached.step)


def sum_over_ranks(value: float, context: ParallelContext) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=context.device)
    for axis in context.axes:
        total = all_reduce(total, axis, "start")
    return total.item()

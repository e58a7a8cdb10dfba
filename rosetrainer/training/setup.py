"""What training sets up on a rank before the loop begins."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from rosetrainer.checkpoint.run_folder import check_unlocked
from rosetrainer.checkpoint.saver import Saver, load_checkpoint
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus, open_corpus
from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.hardware.onednn import fast_products
from rosetrainer.hardware.performance import (
    be_deterministic,
    choose_dtype,
    matmul_peak,
    set_threads,
)
from rosetrainer.launch.failures import report_first_error
from rosetrainer.launch.process_group import (
    WATCH_MARGIN_SECONDS,
    init_process_group,
    open_store,
)
from rosetrainer.launch.watch import HangWatch
from rosetrainer.model_size import check_memory
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.layers import build_model
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel import comm
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import Axis, ParallelContext, end_parallel, init_parallel
from rosetrainer.parallel.tensor_parallel import init_weights
from rosetrainer.training.agreement import check_same_settings, gather_texts, world_axis
from rosetrainer.training.introduction import (
    describe,
    going_on,
    introduce,
    say_goodbye,
    schedule_notes,
    show_curve,
    shown,
)
from rosetrainer.training.open_run import find_beginning
from rosetrainer.training.profiler import StepProfile, check_profile
from rosetrainer.training.resume import Place, begin
from rosetrainer.training.run_identity import settle_dtype
from rosetrainer.training.run_log import LOG, RunLog, has_evaluation
from rosetrainer.training.screen import own_screen
from rosetrainer.training.trainer import TrainingLoop


def check_config(config: TrainConfig, world_size: int) -> tuple[TrainConfig, Corpus]:
    """The config with the corpus's vocabulary, all of it checked. Raises ConfigError."""
    config.check(world_size)
    rank, _, local_rank, local_world_size = world_from_environment()
    compiles(config, config.parallel.resolve(world_size)[0], choose_device(config.hardware.device))
    check_profile(config.monitor.profile, config.run.steps)
    corpus = open_corpus(config.run.data, config.model.context_length, read_all=local_rank == 0)
    corpus.tokenizer()  # better found broken now than by whoever wants text of the trained model
    config = config.with_settings(vocab_size=corpus.meta.vocab_size)
    if choose_device(config.hardware.device).type == "cpu":
        each = 12 if config.optim.optimizer == "muon" else 16  # moments: one, or two
        each *= 2 if config.precision.dtype == "float64" else 1
        copies = local_world_size / config.parallel.resolve(world_size)[0]
        check_memory(config.model, each, "weights, gradients and moments", copies)
    if rank == 0 and (folder := find_beginning(config, corpus).folder):
        check_unlocked(folder)
    return config, corpus


def train(config: TrainConfig, corpus: Corpus) -> tuple[GPTModel, signal.Signals | None]:
    """Trains on every rank; rank 0 writes the run folder.

    Gives the model, and the signal that stopped training before its end. Raises RankError.
    """
    if config.precision.deterministic:
        be_deterministic()
    set_threads(config.hardware.threads)
    world, timeout = world_axis(), config.monitor.timeout
    store = open_store(timedelta(seconds=timeout))
    watch = None
    if store:
        watch = HangWatch(store, world.rank, world.size, timeout, comm.__file__)
        watch.follow([world.ledger])
    was_asked = watch.was_asked if watch else lambda: False
    once = report_first_error(store, world.rank, world.size, was_asked)
    with own_screen() if world.rank == 0 else nullcontext(), once as failures:
        limit = timedelta(seconds=timeout + WATCH_MARGIN_SECONDS)
        device = init_process_group(config.hardware.device, limit, store)
        begun = find_beginning(config, corpus).dtype if world.rank == 0 else None
        begun = gather_texts(begun or "", world, device)[0]
        config, remark = settle_dtype(config, begun, device)
        check_same_settings(config, corpus, world, device)
        place = begin(config, corpus, world, device)
        if remark and world.rank == 0:
            print(remark)
        failures.folder = place.folder
        with place.lock or nullcontext():
            return run_here(config, corpus, place, watch, world)


def run_here(
    config: TrainConfig,
    corpus: Corpus,
    place: Place,
    watch: HangWatch | None,
    world: Axis,
) -> tuple[GPTModel, signal.Signals | None]:
    """Sets up what the loop needs, and runs it."""
    timeout = config.monitor.timeout + WATCH_MARGIN_SECONDS
    context = init_parallel(config.parallel, config.hardware.device, timeout)
    if watch:
        watch.follow((axis.ledger for axis in context.axes), context.device.type == "cuda")
    assert config.precision.compute_dtype
    dtype = choose_dtype(config.precision.compute_dtype, context.device)
    speaks = context.rank == 0
    if speaks:
        print(describe(context, dtype, config.hardware.device))
    model = build_model(config.model, context)
    if dtype == torch.float64:
        model.double()
    optimizer = build_optimizer(model, config.optim)
    if place.checkpoint is not None and place.manifest is not None:
        load_checkpoint(place.checkpoint, place.manifest, model, optimizer, dtype)
    else:
        init_weights(model, config.run.seed)
    compiled, remark = compiles(config, context.tp.size, context.device)
    if compiled:
        compile_blocks(model)
    reached = place.manifest.progress if place.manifest else None
    step = reached.step if reached else 0
    evaluated = log_has_evaluation(place, step, world, context.device)
    finished = evaluated and step == config.run.steps
    if speaks and not finished:
        introduce(place.folder, config, corpus, model, context)
        for line in (remark, going_on(place.checkpoint, reached), *schedule_notes(config, reached)):
            if line:
                print(line)
    peak = sum_over_ranks(matmul_peak(context.device, dtype), context)
    profile = None
    if config.monitor.profile:
        where = Path(shown(place.folder))
        profile = StepProfile(config.monitor.profile, where, context.rank, context.device)
    with RunLog(place.folder, config.run.steps, step) if speaks else nullcontext() as log:
        loop = TrainingLoop(
            config=config,
            corpus=corpus,
            model=model,
            optimizer=optimizer,
            context=context,
            world=world,
            autocast=autocast_for(dtype, context.device),
            dtype=dtype,
            saver=Saver(place.folder, place.attempt, model, optimizer, context, config.checkpoint),
            log=log,
            peak=peak,
            profile=profile,
            step=step,
            skipped=reached.skipped if reached else 0,
            saved=step,
            evaluated=evaluated,
        )
        with fast_products(dtype, context.device):
            loop.run()
        if log and not finished:
            show_curve(log)
    if speaks:
        say_goodbye(place.folder, config.run.steps, loop.saved, bool(loop.stopped), finished)
    if watch:
        watch.close()
    end_parallel()
    return model, loop.stopped


def log_has_evaluation(place: Place, step: int, world: Axis, device: torch.device) -> bool:
    """Whether the run goes on where rank 0's log tells of an evaluation; the same on all ranks."""
    found = world.rank == 0 and step > 0 and has_evaluation(place.folder / LOG, step)
    return bool(gather_texts("yes" if found else "", world, device)[0])


def sum_over_ranks(value: float, context: ParallelContext) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=context.device)
    for axis in context.axes:
        total = all_reduce(total, axis, "start")
    return total.item()

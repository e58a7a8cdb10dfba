"""Saves a run in slices, each by one rank, and brings it back in any layout."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosetrainer.checkpoint.manifest import CheckpointError, Manifest, Progress, SavedTensor
from rosetrainer.checkpoint.ownership import own_box, owned_slices
from rosetrainer.checkpoint.slices import Draft, retain
from rosetrainer.config import CheckpointConfig
from rosetrainer.heartbeat import HEARTBEAT
from rosetrainer.optim.adamw import AdamW
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import shard_spec, whole_specs


class Saver:
    """Saves the model and its optimizer, before training goes on or in a thread beside it.

    run: the run folder, the same on every rank. attempt: a name that no other
    process of this run has used, the same on every rank. All ranks call `save` at the same steps.
    """

    def __init__(
        self,
        run: Path,
        attempt: str,
        model: nn.Module,
        optimizer: AdamW,
        context: ParallelContext,
        config: CheckpointConfig,
    ) -> None:
        self._run, self._attempt, self._config = run, attempt, config
        self._model, self._optimizer, self._context = model, optimizer, context
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self.saved: list[tuple[int, float, float]] = []
        """(step, seconds that training was blocked, seconds until on the disk), not yet reported"""

    def save(self, progress: Progress) -> None:
        """Raises CheckpointError if this save, or the one before it, could not be written."""
        started = time.perf_counter()
        # After the last step there is no training for it to overlap with.
        behind = self._config.async_checkpoint and progress.step < progress.config.run.steps
        self.join()
        self.check()
        tensors, slices, need = owned_slices(self._model, self._optimizer, self._context, behind)
        blocked = time.perf_counter() - started

        def write() -> None:
            draft = Draft(self._run, progress.step, self._attempt)
            draft.write_part(self._context.rank, tensors, slices, need)
            if not behind:
                # Rank 0 now waits for the others as in a collective: the hang watch counts those.
                self._context.dp.ledger.collectives_started += 1
            if self._context.rank == 0:
                written = draft.complete(self._context.world_size, progress)
                retain(self._run, self._config.keep, written)
            seconds = time.perf_counter() - started
            self.saved.append((progress.step, blocked if behind else seconds, seconds))

        if behind:
            self._saving = self._executor.submit(write)
        else:
            write()

    def join(self) -> None:
        """Waits until what is being saved is on the disk."""
        if self._saving is not None:
            wait([self._saving])

    def check(self) -> None:
        """Raises the error of a save in the thread."""
        if self._saving is not None and self._saving.done():
            self._saving.result()


def load_checkpoint(
    folder: Path,
    manifest: Manifest,
    model: nn.Module,
    optimizer: AdamW,
    dtype: torch.dtype,
) -> None:
    """Fills this rank's parameters and moments from the slices, whatever layout wrote them.

    dtype: that of the run. Raises CheckpointError if the checkpoint does not hold exactly what
    the model needs, or ran in another dtype.
    """
    ran_in, runs_in = manifest.progress.dtype, str(dtype).removeprefix("torch.")
    if ran_in != runs_in:
        raise CheckpointError(f"{folder} ran in {ran_in}, not in {runs_in}; use --dtype {ran_in}")
    load_parameters(folder, manifest, model)
    parameters = dict(model.named_parameters())
    for key in (key for key in manifest.tensors if "/" in key):
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            continue  # on another stage of a pipeline
        parameter = parameters[name]
        state = optimizer.state[parameter]
        state[moment] = own_part(folder, manifest, key, parameter)
        state["step"] = torch.tensor(float(manifest.progress.updates), device=parameter.device)


@torch.no_grad()
def load_parameters(folder: Path, manifest: Manifest, model: nn.Module) -> None:
    """Fills this rank's parameters; it reads nothing of the slices but its own part.

    Raises CheckpointError if the checkpoint does not hold exactly this model.
    """
    parameters, every = dict(model.named_parameters()), whole_specs(model)
    for key in manifest.tensors:
        if key.partition("/")[0] not in every:
            raise CheckpointError(f"{folder} holds {key}, which this model has not")
    for name, parameter in parameters.items():
        parameter.copy_(own_part(folder, manifest, name, parameter))


def own_part(folder: Path, manifest: Manifest, name: str, parameter: nn.Parameter) -> Tensor:
    """This rank's slice of the tensor `name`, shaped like its parameter, the pad zero."""
    spec = shard_spec(parameter)
    saved = manifest.tensors.get(name)
    if saved is None:
        raise CheckpointError(f"{folder} does not hold {name}")
    dtype = str(parameter.dtype).removeprefix("torch.")
    if (saved.shape, saved.dtype) != (spec.shape, dtype):
        raise CheckpointError(
            f"{folder}: {name} is {saved.dtype} {saved.shape}, the model's {dtype} {spec.shape}"
        )
    local = torch.zeros_like(parameter)
    first, size = own_box(spec)
    if 0 not in size:
        local[tuple(map(slice, size))] = read_box(folder, name, saved, first, size)
    return local


def read_box(
    folder: Path, name: str, saved: SavedTensor, first: Sequence[int], size: Sequence[int]
) -> Tensor:
    """The part of a whole tensor with this first index and size, out of its slices."""
    box, missing = torch.empty(0), math.prod(size)
    for piece in saved.slices:
        sides = list(zip(first, size, piece.first, piece.size, strict=True))
        common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in sides]
        if any(start >= stop for start, stop in common):
            continue
        path = folder / piece.file
        HEARTBEAT.beats += 1
        try:
            with safe_open(path, "pt") as file:
                view = file.get_slice(name)
                if tuple(view.get_shape()) != piece.size:
                    found = view.get_shape()
                    raise CheckpointError(f"{path}: {name} is {found}, not {list(piece.size)}")
                here, there = (
                    tuple(slice(a - o, b - o) for (a, b), o in zip(common, origin, strict=True))
                    for origin in (first, piece.first)
                )
                part = view[there]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not len(box):
            box = part.new_empty(tuple(size))
        box[here] = part
        missing -= part.numel()
    if missing:
        raise CheckpointError(f"{folder}: its slices do not hold each number of {name} once")
    return box


def read_whole(folder: Path, manifest: Manifest, name: str) -> Tensor:
    """A whole tensor, as its layer would hold it alone."""
    saved = manifest.tensors[name]
    return read_box(folder, name, saved, (0,) * len(saved.shape), saved.shape)

"""Saves a run in slices, each by one rank, and brings it back in any layout.

out/step_000100/ holds a file of each rank and a manifest, and is there whole or not at all; nothing
is pickled. Batches and dropout masks follow from (seed, step), so no generator's state is saved.
All ranks see one file system.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from comm import all_gather
from config import ConfigError
from parallel_context import ParallelContext
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from sharding import ShardSpec, shard_spec
from torch import Tensor, nn
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(out: Path, step: int, model: nn.Module, adamw: AdamW, context: ParallelContext) -> None:
    """Writes out/step_NNNNNN, under a hidden name until the manifest, the last file, is there."""
    draft = out / f".step_{step:06d}.part"
    draft.mkdir(parents=True, exist_ok=True)
    tensors, own = {}, {}
    for index, (name, local, spec) in enumerate(state_of(model, adamw)):
        slices = list(writers(local, spec, index, context))
        tensors[name] = {"whole": facts(local, spec), "slices": slices}
        for file, start, stop in slices:
            if file == file_of(context.rank):
                own[name] = local.narrow(dim_of(spec), 0, stop - start).contiguous().cpu()
    content = to_bytes(own)
    write(draft / file_of(context.rank), content)
    words = enumerate(meet(context, len(content), *bytes.fromhex(sha256(content))))
    files = {file_of(rank): [size, bytes(digest).hex()] for rank, (size, *digest) in words}
    if context.rank == 0:
        for path in {*draft.iterdir()} - {draft / file for file in files}:
            path.unlink()  # a save that was killed had more ranks
        updates = max((int(state["step"]) for state in adamw.state.values()), default=0)
        manifest = {"step": step, "updates": updates, "files": files, "tensors": tensors}
        sealed = {"sha256": sha256(json.dumps(manifest).encode()), "manifest": manifest}
        write(draft / "manifest.json", json.dumps(sealed, indent=1).encode())
        draft.rename(out / f"step_{step:06d}")
    meet(context, 0)


def state_of(model: nn.Module, adamw: AdamW) -> Iterator[tuple[str, Tensor, ShardSpec]]:
    """(global name, this rank's tensor, spec) of each parameter and of the moments that it has."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach(), shard_spec(parameter)
        for moment in MOMENTS if parameter in adamw.state else ():
            yield f"{name}/{moment}", adamw.state[parameter][moment], shard_spec(parameter)


def facts(local: Tensor, spec: ShardSpec) -> dict:
    return {"shape": list(spec.shape), "dim": dim_of(spec), "dtype": str(local.dtype)}


def dim_of(spec: ShardSpec) -> int:
    """The dimension along which tp cuts the tensor."""
    return spec.cuts[0].dim if spec.cuts else 0


def writers(local: Tensor, spec: ShardSpec, index: int, context: ParallelContext) -> Iterator:
    """(file, start, stop) along dim_of(spec), without the pad: who writes what of tensor `index`.

    Of the ranks that hold the same part one writes it, a different one from tensor to tensor.
    """
    alike, dim = len(spec.holders(context.tp)), dim_of(spec)  # neighbours in a tp group
    dp_rank, neighbour = divmod(index % (context.dp.size * alike), alike)
    for part, start in enumerate(range(0, spec.shape[dim], local.shape[dim])):
        rank = dp_rank * context.tp.size + part * alike + neighbour
        yield file_of(rank), start, min(start + local.shape[dim], spec.shape[dim])


def file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def meet(context: ParallelContext, *numbers: int) -> list[list[int]]:
    """Waits for all ranks; each one's numbers, in the order of the ranks."""
    own = torch.tensor([numbers], device=context.device)
    group = all_gather(own, context.tp, "checkpoint", dim=0)
    return all_gather(group, context.dp, "checkpoint", dim=0).tolist()


def write(path: Path, content: bytes) -> None:
    """The bytes are on the disk when this returns, not in the system's memory alone."""
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load(folder: Path, model: nn.Module, adamw: AdamW) -> int:
    """Fills this rank's parameters and moments, whatever layout wrote them; returns the step.

    Raises ConfigError for a damaged file, and where names, shapes or dtypes are not the model's.
    """
    step, updates, _, tensors = read_manifest(folder).values()
    for parameter in model.parameters() if updates else ():
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        adamw.state[parameter] = {"step": torch.tensor(float(updates)), **moments}
    held = {name: tensor["whole"] for name, tensor in tensors.items()}
    ours = {name: facts(local, spec) for name, local, spec in state_of(model, adamw)}
    for name in sorted(held.keys() | ours.keys()):
        if held.get(name) != ours.get(name):
            raise ConfigError(f"{folder}: {name} is {held.get(name)}, the model's {ours.get(name)}")
    for name, local, spec in state_of(model, adamw):
        local.zero_()  # and so the pad is
        own = spec.index[dim := dim_of(spec)]
        for file, start, stop in tensors[name]["slices"]:
            first, last = max(own.start, start), min(own.stop, stop)
            if first < last:
                index = (slice(None),) * dim + (slice(first - start, last - start),)
                saved = safe_open(folder / file, "pt").get_slice(name)
                local.narrow(dim, first - own.start, last - first).copy_(saved[index])
    return step


def read_manifest(folder: Path) -> dict:
    """Raises ConfigError, with the file's name, unless every file is as it was written."""
    path = folder / "manifest.json"
    try:
        own, manifest = json.loads(path.read_bytes()).values()
        if sha256(json.dumps(manifest).encode()) != own:
            raise ValueError("its SHA-256 does not fit it")
        for name, facts_of_file in manifest["files"].items():
            path = folder / name
            content = path.read_bytes()
            if [len(content), sha256(content)] != facts_of_file:
                raise ValueError("its size or SHA-256 is not the manifest's")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    return manifest


def find_start(out: Path, resume: bool, save_every: int) -> Path | None:
    """The newest checkpoint, by looking, if the run goes on from it; None if it begins anew.

    What a killed save left has another name. Raises ConfigError if it can neither go on nor begin.
    """
    found = max(out.glob("step_" + "[0-9]" * 6), default=None)
    if resume and not found:
        raise ConfigError(f"no checkpoint in out={out}; begin without --resume, or change --out")
    if save_every and found and not resume:
        raise ConfigError(f"{found} is there: go on from it with --resume, or change --out")
    if save_every and out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
        raise ConfigError(f"out={out} is no folder to write in; change --out")
    return found if resume else None

"""Fills a model of ours from a folder of theirs: each rank reads its own slices alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rosetrainer.checkpoint.huggingface.families import family_of
from rosetrainer.checkpoint.huggingface.folder import (
    CONFIG,
    Stored,
    read_their_config,
    stored_tensors,
)
from rosetrainer.checkpoint.huggingface.source import DTYPES, Source
from rosetrainer.checkpoint.ownership import own_box
from rosetrainer.config import GPTConfig
from rosetrainer.heartbeat import HEARTBEAT
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, shard_spec
from rosetrainer.validation import ConfigError, one_of


@dataclass(frozen=True)
class Weights:
    """Where each parameter of a model of ours lies in a folder of theirs; of that only headers."""

    folder: Path
    specs: dict[str, ShardSpec]
    """By our names, on one rank."""
    sources: dict[str, Source]
    stored: dict[str, Stored]
    unused: tuple[str, ...]
    """Their tensors that follow from others."""

    def read(
        self, name: str, spec: ShardSpec, first: Sequence[int], size: Sequence[int], to: torch.dtype
    ) -> Tensor:
        """A part of ours, in the dtype `to`; see Source.read."""
        HEARTBEAT.beat()
        return self.sources[name].read(self.stored, spec, first, size, to)

    def read_whole(self, name: str, to: torch.dtype = torch.float32) -> Tensor:
        """The whole parameter, of spec.shape."""
        spec = self.specs[name]
        return self.read(name, spec, (0,) * len(spec.shape), spec.shape, to)


def find_weights(folder: Path, config: GPTConfig) -> Weights:
    """Raises ConfigError, with the tensor's name, unless the folder has exactly config's model."""
    theirs = read_their_config(folder)
    model_type = theirs.get("model_type")
    family, stored = family_of(model_type, folder / CONFIG), stored_tensors(folder)
    shapes_only = build_model(config, ParallelContext(device=torch.device("meta")))
    specs = {name: shard_spec(p) for name, p in shapes_only.named_parameters()}
    sources: dict[str, Source] = {}
    for name, spec in specs.items():
        source = family.source_of(name, model_type)
        names = tuple(present(one, family.PREFIX, stored) for one in source.names)
        sources[name] = replace(source, names=names)
        for one in names:
            check_tensor(folder, one, stored.get(one), source.shape_of_each(spec))
    used = {one for source in sources.values() for one in source.names}
    unused = [one for one in stored if one not in used]
    for one in unused:
        tied = one == "lm_head.weight" and config.tied
        if not (tied or family.DERIVED.fullmatch(one)):
            raise ConfigError(
                f"{stored[one].file} holds {one} {stored[one].shape}, for which the model of "
                f"{folder / CONFIG} has no place; is that file of another model?"
            )
    return Weights(folder, specs, sources, stored, tuple(unused))


def present(name: str, prefix: str, stored: dict[str, Stored]) -> str:
    """The name as the file has it: a model without a head is saved without the prefix."""
    bare = name.removeprefix(prefix)
    return bare if name not in stored and bare in stored else name


def check_tensor(folder: Path, name: str, found: Stored | None, shape: tuple[int, ...]) -> None:
    if found is None:
        raise ConfigError(
            f"{folder} lacks the tensor {name} {shape}, which the model of its {CONFIG} needs; "
            f"is a file of another model, or of a part of one?"
        )
    if found.shape != shape:
        raise ConfigError(
            f"{found.file}: {name} has shape {found.shape}, and the model needs {shape}; do the "
            f"flags or {CONFIG} describe another model?"
        )
    if found.dtype not in DTYPES:
        raise ConfigError(
            f"{found.file}: {name} is {found.dtype}, as quantised weights are; only "
            f"{one_of(DTYPES)} are read"
        )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Fills this rank's parameters, the pad with zeros; at the peak it holds one slice more."""
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        first, size = own_box(spec)
        parameter.zero_()
        if 0 not in size:
            own = parameter[tuple(map(slice, size))]
            own.copy_(weights.read(name, spec, first, size, parameter.dtype))

"""Fills a model of ours from a folder of theirs: each rank reads its own slices alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

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
from rosetrainer.config import GPTConfig, RunConfig
from rosetrainer.heartbeat import HEARTBEAT
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, draw_whole, shard_spec
from rosetrainer.validation import ConfigError, one_of


@dataclass(frozen=True)
class Weights:
    """Where each parameter of a model of ours lies in a folder of theirs; of that only headers."""

    folder: Path
    specs: dict[str, ShardSpec]
    """By our names, on one rank."""
    sources: dict[str, Source]
    stored: dict[str, Stored]
    derived: tuple[str, ...]
    """Their tensors that follow from others."""
    no_place: tuple[str, ...]
    """Those that our model does not have."""
    new: tuple[str, ...]
    """Ours that the folder lacks, and may lack: they begin with random numbers."""
    seed: int
    """Of these."""

    def read(self, name: str, spec: ShardSpec, first: Sequence[int], part: Tensor) -> None:
        """Fills a part of ours, in its dtype; see Source.read."""
        HEARTBEAT.beats += 1
        if name in self.new:
            whole = draw_whole(spec, self.seed, name).reshape(spec.shape)
            box = tuple(slice(a, a + n) for a, n in zip(first, part.shape, strict=True))
            part.copy_(whole[box])
        else:
            self.sources[name].read(self.stored, spec, first, part)

    def read_whole(self, name: str) -> Tensor:
        """The whole parameter, of spec.shape, in fp32."""
        spec = self.specs[name]
        whole = torch.empty(spec.shape)
        self.read(name, spec, (0,) * len(spec.shape), whole)
        return whole


def find_weights(folder: Path, config: GPTConfig, seed: int = RunConfig.seed) -> Weights:
    """Raises ConfigError, with the tensor's name, unless the folder has exactly config's model.

    seed: of parameters that may be missing, and are.
    """
    theirs = read_their_config(folder)
    model_type = theirs.get("model_type")
    family, stored = family_of(model_type, folder / CONFIG), stored_tensors(folder)
    shapes_only = build_model(config, ParallelContext(device=torch.device("meta")))
    specs = {name: shard_spec(p) for name, p in shapes_only.named_parameters()}
    found: dict[str, Source] = {}
    for name in specs:
        source = family.source_of(name, model_type)
        found[name] = replace(source, names=tuple(present(n, family, stored) for n in source.names))
    may_lack = [name for name in specs if name.startswith(family.MAY_LACK)]
    lacks_all = not any(one in stored for name in may_lack for one in found[name].names)
    new = tuple(may_lack) if lacks_all else ()
    sources = {name: source for name, source in found.items() if name not in new}
    for name, source in sources.items():
        for one in source.names:
            check_tensor(folder, one, stored.get(one), source.shape_of_each(specs[name]), name)
    used = {one for source in sources.values() for one in source.names}
    derived, no_place = [], []
    for one in stored.keys() - used:
        if family.NO_PLACE.fullmatch(one):
            no_place.append(one)
        elif (one == family.HEAD and config.tied) or family.DERIVED.fullmatch(one):
            derived.append(one)
        else:
            raise ConfigError(
                f"{stored[one].file} holds {one} {stored[one].shape}, for which the model of "
                f"{folder / CONFIG} has no place; is that file of another model?"
            )
    unread = tuple(sorted(derived)), tuple(sorted(no_place))
    return Weights(folder, specs, sources, stored, *unread, new, seed)


def present(name: str, family: ModuleType, stored: dict[str, Stored]) -> str:
    """The name as the file has it: a model without a head is saved without the prefix, and an old
    one may have other words."""
    old = name
    for new_word, old_word in family.OLD.items():
        old = old.replace(new_word, old_word)
    spelled = [name, old, name.removeprefix(family.PREFIX), old.removeprefix(family.PREFIX)]
    return next((one for one in spelled if one in stored), name)


def check_tensor(
    folder: Path, name: str, found: Stored | None, shape: tuple[int, ...], ours: str
) -> None:
    """ours: what it is here. Of a position table a shorter context takes the first rows."""
    if found is None:
        raise ConfigError(
            f"{folder} lacks the tensor {name} {shape}, which the model of its {CONFIG} needs; "
            f"is a file of another model, or of a part of one?"
        )
    if ours == "position_embedding.weight" and found.shape[0] > shape[0]:
        shape = (found.shape[0], *shape[1:])
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
        if tuple(size) != parameter.shape:
            parameter.zero_()
        if 0 not in size:
            weights.read(name, spec, first, parameter[tuple(map(slice, size))])

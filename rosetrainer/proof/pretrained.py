"""A proof on the weights of a checkpoint, instead of random ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rosetrainer.checkpoint.huggingface.load import Weights
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import shard_spec
from rosetrainer.proof.trajectory import Proof


@dataclass(frozen=True)
class PretrainedProof(Proof):
    """A layout on given weights; of learned positions it takes the first T."""

    weights: Weights | None = None

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        assert self.weights
        model = build_model(self.config, ParallelContext(device=torch.device("meta")))
        found = {}
        for name, parameter in model.named_parameters():
            spec = shard_spec(parameter)
            whole = torch.empty(spec.shape)
            self.weights.read(name, spec, (0,) * len(spec.shape), whole)
            found[name] = whole.reshape(spec.dense_shape)
        return found

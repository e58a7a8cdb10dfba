"""The stages of a model: which layers each has, and what of the model a rank keeps.

Shape letters: B batch, T sequence, D d_model; tp = tp.size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.model_flops import flops_of_block, flops_of_head
from rosetrainer.parallel.comm import first_token
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.pipeline.schedule import ranks_of_stages
from rosetrainer.parallel.sharding import Cut, new_parameter, shard_spec
from rosetrainer.parallel_config import ParallelConfig


class Elsewhere(nn.Module):
    """In the place of a layer that another rank has, so that the others keep their names."""


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers of a model, run by one rank."""

    model: Any
    layers: range
    is_first: bool
    is_last: bool

    def hidden(self, x: Tensor | None, ids: Tensor, seed: Seed) -> Tensor:
        """What the next stage reads, or the output head: (B, T, D), or (B, T/tp, D).

        x: of the stage before, in that shape; the first one reads ids, (B, T).
        """
        model, positions = self.model, torch.arange(ids.shape[1], device=ids.device)
        if self.is_first:
            x = model.embed(ids, positions)
            x = model.embedding_dropout(x, seed, (first_token(x, model.tp),))
        inputs = model.attention_inputs(positions, None)
        for layer in self.layers:
            x = model.blocks[layer](x, *inputs, seed=seed)
        assert x is not None
        return model.final_norm(x) if self.is_last else x

    def input_buffer(self, ids: Tensor) -> Tensor:
        """For what the stage before sends, whose shape follows from ids and the layout."""
        B, T = ids.shape
        tp = self.model.tp
        T = T // tp.size if tp.sequence_parallel else T
        return self._like.new_empty(B, T, self.model.config.d_model)

    @cached_property
    def _like(self) -> Tensor:
        """A tensor of the device and the type in which activations travel."""
        parameter: Tensor = next(self.model.parameters())
        return parameter


def layers_of_stages(config: GPTConfig, parallel: ParallelConfig) -> list[range]:
    """The layers of each stage: as stage_layers says, or spread so that the stages cost alike."""
    stages = parallel.pp_size * parallel.stages_of_rank
    counts = parallel.given_layers() or spread_layers(config, stages)
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def spread_layers(config: GPTConfig, stages: int) -> tuple[int, ...]:
    """How many blocks each stage has, so that the one that costs most costs as little as can be.

    By floating-point operations: the last stage has the output head too, the embedding costs none.
    Of stages that cost alike a later one has more, for earlier ones hold more activations.
    """
    counts = [1] * stages
    costs = [flops_of_block(config)] * stages
    costs[-1] += flops_of_head(config)
    for _ in range(config.n_layers - stages):
        cheapest = min(range(stages), key=lambda stage: (costs[stage], -stage))
        counts[cheapest] += 1
        costs[cheapest] += flops_of_block(config)
    return tuple(counts)


def owners_of_stages(parallel: ParallelConfig) -> tuple[int, ...]:
    """The pp rank of each stage."""
    stages = parallel.pp_size * parallel.stages_of_rank
    return ranks_of_stages(parallel.pp_schedule, parallel.pp_size, stages)


def stages_of_rank(model: Any, context: ParallelContext) -> dict[int, Stage]:
    """This rank's stages of a model, by number."""
    every = layers_of_stages(model.config, context.parallel)
    owners = owners_of_stages(context.parallel)
    return {
        number: Stage(model, layers, number == 0, number == len(every) - 1)
        for number, layers in enumerate(every)
        if owners[number] == context.pp.rank
    }


def cut_model(model: Any, context: ParallelContext) -> None:
    """Leaves of a model on the meta device what this rank runs, with empty parameters.

    Names and the sites of dropout stay as they are. A tied table lies at both ends. Into
    action_times, where it is a list, the runner notes each action.
    """
    config, pp = model.config, context.pp
    every = layers_of_stages(config, context.parallel)
    owners = owners_of_stages(context.parallel)
    first, last = owners[0], owners[-1]
    table = {first, last} if config.tied else {first}
    holders = {"token_embedding": table, "position_embedding": {first}, "final_norm": {last}}
    holders["output_head"] = table if config.tied else {last}
    for layers, owner in zip(every, owners, strict=True):
        holders |= {f"blocks.{layer}": {owner} for layer in layers}
    for part, ranks in holders.items():
        for module in model.get_submodule(part).modules():
            for name, parameter in module.named_parameters(recurse=False):
                if pp.name not in [cut.axis.name for cut in shard_spec(parameter).cuts]:
                    _place(module, name, tuple(sorted(ranks)), context)
    model.action_times = None
    model.whole_specs = {name: shard_spec(p) for name, p in model.named_parameters()}
    for part, ranks in holders.items():
        if pp.rank not in ranks:
            model.set_submodule(part, Elsewhere())


def _place(module: nn.Module, name: str, ranks: tuple[int, ...], context: ParallelContext) -> None:
    """Says in a parameter's spec which ranks have it, and makes it on this one if it is one."""
    spec = shard_spec(module.get_parameter(name))
    spec = replace(spec, cuts=(*spec.cuts, Cut(context.pp, ranks=ranks)))
    here = context.device if context.pp.rank in ranks else torch.device("meta")
    with here:
        setattr(module, name, new_parameter(spec))

"""A model's layers divided among ranks, and one loop that runs any schedule of them.

Shape letters: B batch, T sequence, D d_model; m micro-batches; tp = tp.size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from comm import all_reduce, first_token, start_receive, start_send
from config import IGNORED, GPTConfig
from dropout import Seed
from model import GPTModel
from parallel_context import Axis, ParallelContext
from schedule import make_schedule
from sharding import Cut, shard_spec
from split_backward import split_backward
from torch import Tensor, nn

PHASES = {1: "forward", -1: "backward"}  # on the way to the next rank, to the one before


def layers_of(rank: int, config: GPTConfig, pp: Axis) -> range:
    return range(*(r * config.n_layers // pp.size for r in (rank, rank + 1)))


def build_model(config: GPTConfig, context: ParallelContext) -> GPTModel:
    """The model; in a pipeline, what this rank runs of it. A tied table lies on both ends.

    What is elsewhere leaves a gap, so that the layers keep their names, weights and masks.
    """
    model, pp = GPTModel(config, context), context.pp
    if pp.size == 1:
        return model
    first, last = (0,), (pp.size - 1,)
    table, head = (first + last, first + last) if config.tied else (first, last)
    holders = {"token_embedding": table, "position_embedding": first, "output_head": head}
    holders |= {"final_norm": last}
    for rank in range(pp.size):
        holders |= {f"blocks.{layer}": (rank,) for layer in layers_of(rank, config, pp)}
    for part, ranks in holders.items():
        for parameter in model.get_submodule(part).parameters():
            spec = shard_spec(parameter)
            if not spec.is_cut_over(pp):  # a tied table comes twice
                parameter.shard_spec = replace(spec, cuts=(*spec.cuts, Cut(pp, ranks=ranks)))
    model.whole_specs = {name: shard_spec(p) for name, p in model.named_parameters()}
    for part in (part for part, ranks in holders.items() if pp.rank not in ranks):
        model.set_submodule(part, nn.Identity())
    if context.parallel.pp_schedule == "zero-bubble":
        split_backward(model)
    return model


class Runner:
    """A step of this rank's stage: what of it has not yet been used or sent lies here."""

    def __init__(
        self, model: GPTModel, batch: tuple, tokens: Tensor, context: ParallelContext, seed: Seed
    ) -> None:
        """batch: ids and labels (rows, T) of this dp rank, which are cut into m micro-batches.

        tokens: of the global batch, those whose label counts.
        """
        self.model, self.pp, self.schedule = model, context.pp, context.parallel.pp_schedule
        self.is_last, self.loss = self.pp.rank == self.pp.size - 1, batch[0].new_zeros(()).double()
        self.kept: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.sending, self.batches = [], []
        self.put_off: dict[int, list[Callable[[], None]]] = {}  # of I, until W
        for rows in torch.arange(len(batch[0])).tensor_split(context.parallel.micro_batches):
            ids, labels = (t[rows] for t in batch)
            own = seed and replace(seed, first_row=seed.first_row + int(rows[0]))
            share = (labels != IGNORED).sum() / tokens  # not 1/m: some have more than others
            self.batches.append((ids, labels, own, share))

    def run(self) -> Tensor:
        """The sum of the losses times their shares, on every rank. No B where no gradient is."""
        most = 0
        schedule = make_schedule(self.schedule, self.pp.size, len(self.batches))
        for kind, _, n in schedule[self.pp.rank]:
            if kind == "F":
                self.forward(n)
            elif kind == "W" and torch.is_grad_enabled():
                self.make_weight_gradients(n)
            elif torch.is_grad_enabled():
                self.backward(n, kind)
            most = max(most, len(self.kept) + len(self.put_off))
        for pending in self.sending:
            pending.wait()
        self.model.most_kept = most
        return all_reduce(self.loss, self.pp, "forward")  # the last stage's, and zeros

    def forward(self, n: int) -> None:
        """From ids (B, T), or x (B, T, D) of the stage before, to what the next one reads."""
        (ids, labels, seed, share), model, x = self.batches[n], self.model, None
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.pp.rank:
            y = x = self.receive(n, 1).requires_grad_()
        else:
            y = model.embed(ids, positions)
            y = model.embedding_dropout(y, seed, (first_token(y, model.tp),))
        for layer in layers_of(self.pp.rank, model.config, self.pp):
            y = model.blocks[layer](y, *model.attention_inputs(positions, None), seed=seed)
        if self.is_last:
            y = model.output_head.loss(model.final_norm(y), labels)[0] * share
            self.loss += y.detach()
        else:
            self.send(y, 1)
        self.kept[n] = x, y

    def backward(self, n: int, kind: str) -> None:
        """B, or I, which leaves the gradients of the linear layers' weights to W."""
        x, y = self.kept.pop(n)
        with torch.autocast(y.device.type, enabled=False):  # as without stages
            torch.autograd.backward(y, None if self.is_last else self.receive(n, -1))
        if kind == "I":
            self.put_off[n] = self.model.weight_gradients.take()
        if x is not None:
            self.send(x.grad, -1)

    @torch.no_grad()
    def make_weight_gradients(self, n: int) -> None:
        for product in self.put_off.pop(n):
            product()

    def send(self, tensor: Tensor, way: int) -> None:
        self.sending.append(start_send(tensor, self.pp, self.pp.rank + way, PHASES[way]))

    def receive(self, n: int, way: int) -> Tensor:
        """(B, T, D), or (B, T/tp, D): messages of a neighbour come in the order of sending."""
        (B, T), tp, like = self.batches[n][0].shape, self.model.tp, next(self.model.parameters())
        T = T // tp.size if tp.sequence_parallel else T
        buffer = like.new_empty(B, T, self.model.config.d_model)
        return start_receive(buffer, self.pp, self.pp.rank - way, PHASES[way]).wait()


def sum_tied_gradients(model: GPTModel, pp: Axis) -> None:
    """Adds up the gradients of a table that both ends of a pipeline hold, each for its own use."""
    for parameter in model.parameters():
        for other in set(shard_spec(parameter).holders(pp)) - {pp.rank}:
            theirs = start_receive(torch.empty_like(parameter.grad), pp, other, "backward")
            start_send(parameter.grad, pp, other, "backward").wait()
            parameter.grad += theirs.wait()

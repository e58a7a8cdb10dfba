"""One loop that runs any schedule: the gradient of a global batch, stage by stage.

Shape letters: B batch, T sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rosetrainer.parallel.comm import (
    Pending,
    all_reduce,
    gather_from_tensor_parallel_region,
    start_receive,
    start_send,
)
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.data_parallel import count_tokens, sum_over_dp
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.pipeline.schedule import Action, Schedule
from rosetrainer.parallel.pipeline.simulation import ActionTime, checked_schedule
from rosetrainer.parallel.pipeline.stage import owners_of_stages, stages_of_rank
from rosetrainer.parallel.sharding import shard_spec

PHASES = {"F": "forward", "B": "backward", "I": "backward"}
Autocast = Callable[[], AbstractContextManager[object]]


def accumulate_in_stages(
    model: Any,
    micro_batches: Sequence[tuple[Any, ...]],
    context: ParallelContext,
    autocast: Autocast = nullcontext,
    seed: Seed = None,
) -> float:
    """As accumulate_gradients, of a model that cut_model has cut: each rank runs its stages.

    A tied table's gradient is that of this rank's uses, see sum_tied_gradients.
    """
    counts, tokens = count_tokens(micro_batches, context)
    schedule = checked_schedule(context.parallel, len(micro_batches))
    run = _Run(model, schedule, context, autocast)
    for (first_row, ids, labels), count in zip(micro_batches, counts, strict=True):
        own = seed and replace(seed, first_row=first_row)
        run.batches.append(_MicroBatch(ids, labels, own, count / tokens))
    run.run()
    total = all_reduce(run.loss.to(context.device), context.pp, "optimizer")  # the last stage's
    return float(sum_over_dp(total, context))


class _MicroBatch(NamedTuple):
    ids: Tensor
    labels: Tensor
    seed: Seed
    share: float  # of the global batch's tokens that count


class _Kept(NamedTuple):
    """What a micro-batch leaves in a stage until its backward pass."""

    x: Tensor | None
    end: GradientEdge  # of its graph: the result itself is gone when it has been sent


class _Run:
    """One step of this rank. What it has not yet used or sent lies here."""

    def __init__(
        self, model: Any, schedule: Schedule, context: ParallelContext, autocast: Autocast
    ) -> None:
        self.schedule, self.pp, self.autocast = schedule, context.pp, autocast
        self.model, self.stages = model, stages_of_rank(model, context)
        self.batches: list[_MicroBatch] = []
        self.loss = torch.zeros((), dtype=torch.float64)
        self.kept: dict[tuple[int, int], _Kept] = {}
        self.put_off: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.handed: dict[Action, Tensor] = {}  # from one of this rank's stages to another
        self.sent: defaultdict[int, deque[tuple[Action, Pending]]] = defaultdict(deque)  # by rank

    def run(self) -> None:
        self.inbox = _Inbox(self)
        notes = self.model.action_times
        for action in self.schedule.actions[self.pp.rank]:
            if notes is None:
                self.make(action)
            else:
                notes.append(self.timed(action))
        for _, pending in chain(*self.sent.values()):
            pending.wait()
        assert not (self.kept or self.put_off or self.handed or self.inbox.posted)

    def make(self, action: Action) -> None:
        if action.kind == "F":
            self.forward(action)
        elif action.kind == "W":
            self.make_weight_gradients(action)
        else:
            self.backward(action)

    def timed(self, action: Action) -> ActionTime:
        began, waited = perf_counter(), self.pp.ledger.wait_seconds
        self.make(action)
        return ActionTime(began, perf_counter(), self.pp.ledger.wait_seconds - waited)

    def forward(self, action: Action) -> None:
        stage, batch = self.stages[action.stage], self.batches[action.micro_batch]
        x = None if stage.is_first else self.receive(action).requires_grad_()
        with self.autocast():
            y = stage.hidden(x, batch.ids, batch.seed)
            if stage.is_last:
                y, _ = stage.model.output_head.loss(y, batch.labels)
        if stage.is_last:
            y = y * batch.share
            self.loss += y.detach().to("cpu", torch.float64)
        self.kept[action[1:]] = _Kept(x, get_gradient_edge(y))
        self.pass_on(action, y)

    def backward(self, action: Action) -> None:
        """B, or I, which leaves the gradients of the linear layers' weights to W."""
        upstream = None if self.stages[action.stage].is_last else self.receive(action)
        x, end = self.kept.pop(action[1:])
        torch.autograd.backward(end, upstream)
        if action.kind == "I":
            self.put_off[action[1:]] = self.model.weight_gradients.take()
        if x is not None:
            assert x.grad is not None
            self.pass_on(action, x.grad)

    @torch.no_grad()
    def make_weight_gradients(self, action: Action) -> None:
        for product in self.put_off.pop(action[1:]):
            product()

    def pass_on(self, action: Action, result: Tensor) -> None:
        """To the action that needs it, on this rank or another."""
        fed = self.schedule.feeds(action)
        if fed is None:
            return
        target = self.schedule.rank_of[fed.stage]
        if target == self.pp.rank:
            self.handed[fed] = result.detach()
        else:
            sending = start_send(result, self.pp, target, PHASES[action.kind])
            self.sent[target].append((fed, sending))

    def receive(self, action: Action) -> Tensor:
        """What the action needs of another stage."""
        if action in self.handed:
            return self.handed.pop(action)
        fed_by = self.schedule.fed_by(action)
        assert fed_by is not None
        source = self.schedule.rank_of[fed_by.stage]
        received = self.inbox.take(action, source)
        # What its rank had used before it made this has arrived there, and is held no longer.
        sent, place = self.sent[source], self.schedule.place
        while sent and place[sent[0][0]] < place[fed_by]:
            sent.popleft()[1].wait()
        return received


class _Inbox:
    """Messages to this rank. Each is received in the order of sending, whatever is needed first."""

    def __init__(self, run: _Run) -> None:
        self._run, pp = run, run.pp
        pairs = run.schedule.messages.items()
        self._expected = {source: deque(m) for (source, to), m in pairs if to == pp.rank}
        self.posted: dict[Action, Pending] = {}
        for source in self._expected:
            self._post(source)

    def take(self, action: Action, source: int) -> Tensor:
        """Posts the next receive too, so that it is under way when its turn comes."""
        while action not in self.posted:
            self._post(source)
        pending = self.posted.pop(action)
        self._post(source)
        return pending.wait()

    def _post(self, source: int) -> None:
        if not self._expected[source]:
            return
        action = self._expected[source].popleft()
        stage, batch = self._run.stages[action.stage], self._run.batches[action.micro_batch]
        buffer = stage.input_buffer(batch.ids)
        pending = start_receive(buffer, self._run.pp, source, PHASES[action.kind])
        self.posted[action] = pending


@torch.no_grad()
def sum_tied_gradients(model: Any, context: ParallelContext) -> None:
    """Adds up the gradients of a parameter that two stages' ranks hold: bitwise alike on both."""
    pp = context.pp
    for parameter in model.parameters():
        for other in set(shard_spec(parameter).holders(pp)) - {pp.rank}:
            assert parameter.grad is not None
            theirs = torch.empty_like(parameter.grad)
            receiving = start_receive(theirs, pp, other, "backward")
            start_send(parameter.grad, pp, other, "backward").wait()
            parameter.grad += receiving.wait()


def last_hidden(
    model: Any, ids: Tensor, *others: Tensor, context: ParallelContext, seed: Seed = None
) -> Any:
    """What the output head reads, on the last stage's ranks; None on others. No gradient.

    others: what a model beside ids takes; none in a pipeline.
    """
    if context.pp.size == 1:
        return model.hidden(ids, *others, seed=seed)
    pp = context.pp
    stages, owners = stages_of_rank(model, context), owners_of_stages(context.parallel)
    x, sending = None, []
    for number, stage in sorted(stages.items()):
        if number and owners[number - 1] != pp.rank:
            buffer = stage.input_buffer(ids)
            x = start_receive(buffer, pp, owners[number - 1], "forward").wait()
        x = stage.hidden(x, ids, seed)
        if not stage.is_last and owners[number + 1] != pp.rank:
            sending.append(start_send(x, pp, owners[number + 1], "forward"))
    for pending in sending:
        pending.wait()
    return x if owners[-1] == pp.rank else None


def last_logits(
    model: Any, ids: Tensor, *others: Tensor, context: ParallelContext, seed: Seed = None
) -> Any:
    """(B, T, V) on the last stage's ranks; None on others. others: as of last_hidden."""
    if context.pp.size == 1:
        return model(ids, *others, seed=seed)[0]
    x = last_hidden(model, ids, context=context, seed=seed)
    if x is None:
        return None
    logits = gather_from_tensor_parallel_region(model.output_head.logits(x), context.tp)
    return logits[..., : model.config.vocab_size]

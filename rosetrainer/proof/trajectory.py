"""The same few updates in a layout and by the oracle: logits, gradients, and how weights move.

The oracle is dense and runs in float64. Results in a shorter dtype are compared with it, and with
the same dtype on one process, which rounds as often in another order.
Shape letters: R rows of the global batch, T tokens that are proven, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rosetrainer.config import IGNORED, GPTConfig, OptimConfig
from rosetrainer.data.batches import rows_of_rank
from rosetrainer.hardware.attention_blocks import BLOCK, MAX_SAVED_QUERIES
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import build_optimizer, whole_matrices
from rosetrainer.optim.precision import Autocast, autocast_for
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.pipeline.runner import last_logits
from rosetrainer.parallel.sharding import draw_whole, gather_whole, load_whole, shard_spec
from rosetrainer.parallel.zero.groups import shard_model
from rosetrainer.proof.batches import (
    ROWS,
    UPDATES,
    Batch,
    micro_batches_of,
    random_batches,
    with_another_end,
)
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.reference import ReferenceDropout
from rosetrainer.training.step import compute_gradients

LONGEST = MAX_SAVED_QUERIES + BLOCK  # the shortest length on which attention takes each path
RATE = 1e-3  # of the optimizer's updates: with larger ones rounding errors soon grow
NOISE = 1e-3  # of the largest gradient of all: one below it may be zero but for rounding
MOVED = 0.2  # of its norm: how far the SGD step moves each weight

LOGITS, AHEAD, LOSS = "logits", "effect on earlier tokens", "loss"
GRADIENTS, NORM = "gradients", "gradient norm"
AFTER_SGD, UPDATED, MOVES = "after an SGD step", "after updates", "moved by updates"
STAGES = (LOGITS, AHEAD, LOSS, GRADIENTS, NORM, AFTER_SGD, UPDATED, MOVES)
CHANGE = (AHEAD, "logits before a token that changed")
Results = dict[tuple[str, str], Tensor]  # by stage and name


@dataclass(frozen=True)
class Calibration:
    """Measured by the oracle, and used by all: the norm to clip to, and a rate for each weight."""

    clip_norms: list[float] = field(default_factory=list)  # by step
    sgd_rates: dict[str, float] = field(default_factory=dict)  # by the weight's name


@dataclass(frozen=True)
class Proof:
    """A layout on random weights, with biases that are not zero, and random batches.

    config.context_length is T. Every rank runs the oracle first, for the calibration.
    """

    config: GPTConfig
    context: ParallelContext
    optim: OptimConfig
    seed: int = 0
    calibration: Calibration = field(default_factory=Calibration)
    kernels: str = "auto"  # of fast_kernels

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        model = build_model(self.config, ParallelContext(device=torch.device("meta")))
        specs = {name: shard_spec(p) for name, p in model.named_parameters()}
        noisy = {name: replace(spec, init_std=spec.init_std or 0.1) for name, spec in specs.items()}
        return {name: draw_whole(spec, self.seed, name) for name, spec in noisy.items()}

    @cached_property
    def batches(self) -> list[Batch]:
        return random_batches(self.config, self.context, self.seed)

    def parts(self, context: ParallelContext) -> list[slice]:
        """The rows of each micro-batch of a rank; one process takes those of all ranks."""
        dp, own = context.dp, micro_batches_of(self.context.parallel)
        count = own * self.context.dp.size // dp.size
        return [slice(r.start, r.stop) for r in rows_of_rank(dp.rank, dp.size, count, ROWS)]

    @cached_property
    def oracle(self) -> Results:
        """The dense model's results in float64; our optimizer moves its weights, on one process."""
        carrier = self.model(ParallelContext(device=self.context.device), torch.float64)
        dense = build_reference(self.config, self.whole).to(self.context.device).double()
        own = [row for rows in self.parts(self.context) for row in range(rows.start, rows.stop)]
        logits: dict[int, Tensor] = {}

        def gradient(step: int) -> float:
            dense.load_state_dict(gather_whole(carrier))
            dense.zero_grad()
            dropout = ReferenceDropout(self.config.dropout, self.seed, step)
            whole = self.batches[step]
            tokens, total = int((whole[-1] != IGNORED).sum()), 0.0
            for row in range(len(whole[-1])):  # one at a time: its activations are large
                *inputs, labels = (tensor[row : row + 1] for tensor in whole)
                found, mean = dense(*inputs, labels=labels, dropout=dropout, first_row=row)
                part = mean * (int((labels != IGNORED).sum()) / tokens)
                part.backward()
                total += float(part.detach())
                if step == 0 and row in own:
                    logits[row] = found.detach()
            gradients = dict(dense.named_parameters())
            for name, parameter in carrier.named_parameters():
                gradient = gradients[name].grad
                assert gradient is not None
                parameter.grad = shard_spec(parameter).shard(gradient)
            return total

        def clip(step: int) -> float:
            gradients = {n: p.grad for n, p in carrier.named_parameters() if p.grad is not None}
            norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
            self.calibration.clip_norms.append(norm / 2)
            torch._foreach_mul_(list(gradients.values()), 0.5)
            if step == 0:
                for name, weight in carrier.named_parameters():
                    least = max(float(gradients[name].norm()), NOISE * norm)
                    size = float(weight.detach().norm())
                    self.calibration.sgd_rates[name] = MOVED * size / least if least else 0.0
            return norm

        found = self.trajectory(carrier, ParallelContext(), gradient, clip)
        return {(LOGITS, "logits"): torch.cat([logits[row] for row in own])} | found

    def jittered(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The whole weights, each off by up to half of dtype's eps: as if they had been rounded."""
        generator = torch.Generator().manual_seed(self.seed)
        eps = torch.finfo(dtype).eps
        return {
            name: w * (1 + eps * (torch.rand(w.shape, generator=generator).double() - 0.5))
            for name, w in self.whole.items()
        }

    def model(
        self, context: ParallelContext, dtype: torch.dtype, whole: dict[str, Tensor] | None = None
    ) -> GPTModel:
        model = build_model(self.config, context)
        if dtype == torch.float64:
            model.double()
        whole = whole or self.whole
        load_whole(model, {name: whole[name] for name, _ in model.named_parameters()})
        shard_model(model, context, whole_matrices(model, self.optim), dtype)
        return model

    def trajectory(
        self,
        model: GPTModel,
        context: ParallelContext,
        gradient: Callable[[int], float],
        clip: Callable[[int], float],
    ) -> Results:
        """One SGD step on the long batch, then updates of the optimizer on the short ones.

        gradient: leaves a step's gradient in the model, returns the loss. clip: halves it, returns
        its norm.
        """
        found: Results = {}
        optimizer = build_optimizer(model, self.optim)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        for step in range(1 + UPDATES):
            loss = gradient(step)
            of_loss, of_gradients, of_norm = (
                (LOSS, GRADIENTS, NORM) if step == 0 else [AFTER_SGD if step == 1 else UPDATED] * 3
            )
            found[of_loss, f"loss of step {step + 1}"] = self.scalar(loss)
            if step < 2:
                for name, whole in gather_whole(model, gradients=True).items():
                    found[of_gradients, f"gradient of {name}"] = whole.clone()
            found[of_norm, f"gradient norm of step {step + 1}"] = self.scalar(clip(step))
            if step:
                optimizer.step()
                optimizer.zero_grad()
                continue
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=self.calibration.sgd_rates[name])
                    parameter.grad = None
            before = {n: w.clone() for n, w in gather_whole(model).items()}
        for name, after in gather_whole(model).items():
            found[MOVES, f"move of {name}"] = after - before[name]
        return found

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.context.device)

    def results(
        self, context: ParallelContext, dtype: torch.dtype, whole: dict[str, Tensor] | None = None
    ) -> Results:
        """What our model finds in dtype, in the layout of context."""
        model, autocast = self.model(context, dtype, whole), autocast_for(dtype, context.device)

        def gradient(step: int) -> float:
            whole = self.batches[step]
            own = [(rows.start, *(t[rows] for t in whole)) for rows in self.parts(context)]
            return compute_gradients(model, own, context, autocast, DropoutSeed(self.seed, step))

        def clip(step: int) -> float:
            return clip_gradients(model, context, self.calibration.clip_norms[step])

        with fast_kernels(dtype, context.device, self.kernels):
            found = self.logits(model, context, autocast)
            return found | self.trajectory(model, context, gradient, clip)

    @torch.no_grad()
    def logits(self, model: GPTModel, context: ParallelContext, autocast: Autocast) -> Results:
        """Those of the rows of this rank in the layout, and what they see of tokens to come.

        Nothing on ranks of a pipeline that have no output head.

        Each row is computed twice, from its own place on with other tokens: before that place the
        logits of a causal model must not change, not by a bit.
        """
        batch, masks = self.batches[0], DropoutSeed(self.seed, 0)
        again, before = with_another_end(self.config, batch)
        whole, changes = [], []
        for part in self.parts(self.context):
            seed = replace(masks, first_row=part.start)
            with autocast():
                some, other = (
                    last_logits(model, *(t[part] for t in one[:-1]), context=context, seed=seed)
                    for one in (batch, again)
                )
            if some is None:
                continue
            whole.append(some.double())
            changes.append((other - some)[before[part]].abs().max().double())
        if not whole:
            return {}
        logits = torch.cat(whole)
        if not self.config.is_causal:
            return {(LOGITS, "logits"): logits}
        change = torch.stack(changes).max() / logits.abs().max()
        return {(LOGITS, "logits"): logits, CHANGE: change}

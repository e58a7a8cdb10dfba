"""How far a layout's results differ from those of one process, and how far they may."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rosetrainer.launch.errors import RankError
from rosetrainer.optim.non_finite import NonFiniteGradientError
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.proof.trajectory import (
    AFTER_SGD,
    AHEAD,
    CHANGE,
    GRADIENTS,
    LOSS,
    MOVES,
    NOISE,
    NORM,
    STAGES,
    UPDATED,
    Proof,
    Results,
)

BOUND = 1e-10  # in float64, of the largest expected value; rounding stays near 1e-15
MARGIN = 8  # times what rounding does; right layouts of 32 features or more need 0.1 to 3 times
ZERO = 1e-12  # of the largest gradient of all: one below it is exactly zero but for rounding
NOTHING = {AHEAD: 0.0}
WIDE = 32  # features; over fewer, errors do not average out, and a norm subtracts near equals


class ParityError(RankError):
    """This layout does not compute what one process does."""


@dataclass(frozen=True)
class Difference:
    """The worst |ours - expected| over all ranks, as a fraction of the largest expected value.

    For how weights moved: the norm of the difference, as a fraction of the norm.
    """

    stage: str
    what: str
    worst: float


@dataclass(frozen=True)
class Column:
    """Our model's results in dtype against the oracle's in float64, or its own on one process."""

    dtype: torch.dtype
    against: Literal["oracle", "1 process"]
    differences: list[Difference]
    allowed: dict[str, float]
    """By stage."""

    @property
    def wrong(self) -> list[Difference]:
        """Of the first stage that has some: differences beyond rounding, or nan, worst first."""
        for stage, differences in by_stage(self.differences).items():
            if wrong := [d for d in differences if not d.worst <= self.allowed[stage]]:
                return sorted(wrong, key=lambda d: -d.worst)
        return []


def by_stage(differences: list[Difference]) -> dict[str, list[Difference]]:
    return {stage: [d for d in differences if d.stage == stage] for stage in STAGES}


def prove(proof: Proof, dtype: torch.dtype = torch.float64) -> list[Column]:
    """A column in float64; in another dtype two more, or one where there is one process.

    The same on all ranks. Raises ParityError, on every rank, if nothing moves over an axis of
    several ranks, or a gradient is nan or inf.
    """
    oracle, context, exact = proof.oracle, proof.context, torch.float64
    for axis in context.axes:
        axis.ledger.clear()
    try:
        ours, allowed = proof.results(context, exact), dict.fromkeys(STAGES, BOUND) | NOTHING
        check_traffic(context)
        columns = [Column(exact, "oracle", differences(ours, oracle, proof), allowed)]
        if dtype == exact:
            return columns
        allowed, ours = allowance(proof, dtype, ours), proof.results(context, dtype)
        columns.append(Column(dtype, "oracle", differences(ours, oracle, proof), allowed))
        if context.world_size > 1:
            alone = proof.results(ParallelContext(device=context.device), dtype)
            columns.append(Column(dtype, "1 process", differences(ours, alone, proof), allowed))
        return columns
    except NonFiniteGradientError as error:
        raise ParityError(f"not the same as one process: {error}") from None


def not_proven(proof: Proof) -> list[str]:
    """The weights of which a proof says nothing, because their true gradient is zero."""
    names = [key for key in proof.oracle if key[0] == GRADIENTS]
    idle = [name for name in names if not has_gradient(proof.oracle, name).any()]
    return [what.removeprefix("gradient of ") for _, what in idle]


def allowance(proof: Proof, dtype: torch.dtype, exact: Results) -> dict[str, float]:
    """By stage, the tolerance in dtype: MARGIN times what rounding does.

    That depends on a model's depth, width and weights, so it is measured: the layout's results in
    float64, `exact`, against those with every weight off by what dtype would round away. It is at
    least eps, or an eighth of it for a loss or a norm, in which errors cancel; and at least the
    error of sums in fp32, of which norms are made. Where a gradient is smaller than its rounding,
    in about an eps of all elements, Adam steps either way: that moves weights by the root of eps.
    """
    jittered = proof.results(proof.context, torch.float64, proof.jittered(dtype))
    eps, narrow = torch.finfo(dtype).eps, max(WIDE / proof.config.d_model, 1)
    sums = 32 * narrow**3 * torch.finfo(torch.float32).eps
    least = dict.fromkeys(STAGES, eps) | dict.fromkeys((LOSS, NORM, UPDATED), eps / 8)
    least[MOVES] = math.sqrt(eps)
    found = by_stage(differences(jittered, exact, proof))
    allowed = {
        stage: MARGIN * max(narrow * least[stage], sums, *(d.worst for d in differences))
        for stage, differences in found.items()
    }
    if narrow > 1:  # a scalar's change can be small by chance, where its tensors' is not
        allowed[NORM] = max(allowed[NORM], allowed[GRADIENTS])
        allowed[UPDATED] = max(allowed[UPDATED], allowed[AFTER_SGD])
    return allowed | NOTHING


def check_traffic(context: ParallelContext) -> None:
    """Raises ParityError, on every rank, if nothing was sent over an axis of several ranks."""
    for axis in context.axes:
        moved = [
            traffic.payload_bytes
            for (_, phase), traffic in axis.ledger.entries.items()
            if phase in ("forward", "backward")
        ]
        least = torch.tensor(sum(moved), device=context.device)
        for over in context.axes:
            least = all_reduce(least, over, "checkpoint", dist.ReduceOp.MIN)
        if axis.size > 1 and least == 0:
            raise ParityError(f"{axis.name}_size={axis.size}, but nothing moves over {axis.name}")


def differences(ours: Results, expected: Results, proof: Proof) -> list[Difference]:
    """Of each result the worst over all ranks; every rank gets the same.

    A rank of a pipeline has those of its own stages.
    """
    keys, ratios = [*proof.oracle, *[CHANGE] * proof.config.is_causal], []
    for stage, what in keys:
        tensor = ours.get((stage, what))
        if tensor is None:
            ratios.append(torch.tensor(-1.0, dtype=torch.float64, device=proof.context.device))
            continue
        if stage == AHEAD:  # a difference already
            ratios.append(tensor.nan_to_num(nan=torch.inf, posinf=torch.inf))
            continue
        right = expected[stage, what].double()
        off = tensor.double() - right
        if stage == MOVES:
            name = GRADIENTS, f"gradient of {what.removeprefix('move of ')}"
            moves = has_gradient(proof.oracle, name)
            if moves.any():  # a row that no token reads stands still, or decays
                moves |= (ours[name] == 0) & (expected[name] == 0)
            error, size = (off * moves).norm(), (right * moves).norm()
        else:
            error, size = off.abs().max(), right.abs().max()
            if what.startswith("gradient of "):
                size = size.clamp(min=NOISE * largest_gradient(expected, stage))
        # inf where ours is not finite, which a maximum would lose; 0 of 0 is equal
        ratios.append(
            (error / size if error else error).nan_to_num(nan=torch.inf, posinf=torch.inf)
        )
    worst = torch.stack(ratios)
    for axis in proof.context.axes:
        worst = all_reduce(worst, axis, "checkpoint", dist.ReduceOp.MAX)
    assert (worst >= 0).all(), "no rank has it"
    return [Difference(*key, ratio) for key, ratio in zip(keys, worst.tolist(), strict=True)]


def has_gradient(oracle: Results, name: tuple[str, str]) -> Tensor:
    """Where a weight's true gradient is not zero: elsewhere Adam turns rounding into whole steps.

    A key bias has none without rotary positions: it moves no attention weight.
    """
    return oracle[name].abs() > ZERO * largest_gradient(oracle, GRADIENTS)


def largest_gradient(results: Results, stage: str) -> float:
    names = [key for key in results if key[0] == stage and key[1].startswith("gradient of ")]
    return max(float(results[name].abs().max()) for name in names)

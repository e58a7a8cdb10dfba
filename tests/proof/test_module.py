"""A proof for any module: green where it is right, and red, with the reason, where it is not."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from once import Once
from ranks import run_ranks
from torch import Tensor, nn

from rosetrainer.launch.errors import RankError
from rosetrainer.parallel.comm import reduce_from_tensor_parallel_region
from rosetrainer.parallel.context import Axis, ParallelContext, init_tensor_parallel
from rosetrainer.parallel.replicated import mark_replicated
from rosetrainer.parallel.sharding import ShardSpec, new_parameter, shard_spec
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.proof.module import prove_module
from rosetrainer.validation import ConfigError

IN, WIDE = 8, 24


class Dense(nn.Module):
    """A norm, an MLP, and what it reads is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.first, self.second = nn.Linear(IN, WIDE), nn.Linear(WIDE, IN)
        self.drop = nn.Dropout(0.5)

    def hidden(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.first(self.norm(x))))

    def forward(self, x: Tensor) -> Any:
        return x + self.second(self.hidden(x))


class Parallel(Dense):
    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.first = ColumnParallelLinear(IN, WIDE, tp=tp)  # type: ignore[assignment]
        self.second = RowParallelLinear(WIDE, IN, tp=tp)  # type: ignore[assignment]
        mark_replicated(self)


class BiasOfAll(Parallel):
    def forward(self, x: Tensor) -> Any:
        partial = F.linear(self.hidden(x), self.second.weight, self.second.bias)
        return x + reduce_from_tensor_parallel_region(partial, self.tp)


class WithoutF(Parallel):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(self.norm(x), self.first.weight, self.first.bias))


class OtherTwin(Parallel):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(self.norm(x)))


class OwnSlice(Parallel):
    def forward(self, x: Tensor) -> Any:
        return super().hidden(x)


class CountedTwice(Parallel):
    """Its spec says that the norm's weight is cut, so that its square counts on each rank."""

    def __init__(self, tp: Axis) -> None:
        super().__init__(tp)
        spec = shard_spec(self.norm.weight)
        bias = shard_spec(self.first.bias)
        object.__setattr__(spec, "is_cut_over", bias.is_cut_over)
        object.__setattr__(spec, "holders", bias.holders)


class LossOfASlice(Parallel):
    """Its output is right, and its loss is of half of the output."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, (y[..., : IN // self.tp.size] ** 2).sum()


class DenseLoss(Dense):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, (y**2).sum()


class DenseScaled(Dense):
    """All groups of features share a scale, as heads share a norm of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def hidden(self, x: Tensor) -> Tensor:
        return (super().hidden(x).unflatten(-1, (-1, 3)) * self.scale).flatten(-2)


class Scaled(DenseScaled):
    """Its gradient is a partial sum on each rank, and its spec says so."""

    def __init__(self, tp: Axis, told: bool = True) -> None:
        super().__init__()
        self.first = ColumnParallelLinear(IN, WIDE, tp=tp)  # type: ignore[assignment]
        self.second = RowParallelLinear(WIDE, IN, tp=tp)  # type: ignore[assignment]
        if told:
            self.scale = new_parameter(ShardSpec((3,), partial_over=("tp",)))
        mark_replicated(self)


class Unread(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Parameter(torch.ones(3))


class Renamed(Parallel):
    def __init__(self, tp: Axis) -> None:
        super().__init__(tp)
        self.third = self.second
        del self.second


class Unmarked(Dense):
    pass


def whole(tp: Axis) -> nn.Module:
    module = Dense()
    mark_replicated(module)
    return module


CASES: dict[str, tuple[Callable[[Axis], nn.Module], type[nn.Module]]] = {
    "right": (Parallel, Dense),
    "bias": (BiasOfAll, Dense),
    "f": (WithoutF, Dense),
    "twin": (OtherTwin, Dense),
    "slice": (OwnSlice, Dense),
    "norm": (CountedTwice, Dense),
    "loss": (LossOfASlice, DenseLoss),
    "scaled": (Scaled, DenseScaled),
    "scaled alone": (partial(Scaled, told=False), DenseScaled),
    "whole": (whole, Dense),
    "unread": (Parallel, Unread),
    "renamed": (Renamed, Dense),
    "unmarked": (lambda tp: Unmarked(), Dense),
}


def told(context: ParallelContext, case: str) -> tuple[str, str]:
    """(what is printed, the error) of a case; weights and inputs differ from rank to rank."""
    build, dense = CASES[case]
    torch.manual_seed(context.rank)
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            x = torch.randn(3, 5, IN)
            prove_module(lambda part: build(part.tp), dense(), [x], context)
        except (RankError, ConfigError) as problem:
            error = f"{type(problem).__name__}: {problem}"
    return printed.getvalue(), error


def on_a_rank() -> dict[str, tuple[str, str]]:
    context = init_tensor_parallel(device="cpu")
    return {case: told(context, case) for case in CASES}


@pytest.fixture(scope="module")
def found(once: Once) -> list[dict[str, tuple[str, str]]]:
    def make(folder: Path) -> list[dict[str, tuple[str, str]]]:
        return run_ranks(4, on_a_rank)

    return once("any_module", make)


def of(found: list[dict[str, tuple[str, str]]], case: str) -> str:
    """The error, which is that of all ranks."""
    errors = {one[case][1] for one in found}
    assert len(errors) == 1, errors
    return errors.pop()


def test_a_right_module_is_proven_at_each_size_and_rank_0_shows_it(found: Any) -> None:
    assert of(found, "right") == of(found, "scaled") == ""
    assert [one["right"][0] for one in found[1:]] == [""] * 3
    lines = found[0]["right"][0].splitlines()
    assert lines[0].split() == ["tp", "1", "tp", "2", "tp", "4", "allowed"]
    assert lines[-1] == "yes: what is left is rounding"
    names = ["output", "loss", "gradients of 7 tensors", "gradient norm"]
    for line, name in zip(
        lines[1:7], [*names, "weights after a step", "gradients after it"], strict=True
    ):
        assert line.strip().startswith(name)
        *worst, allowed = map(float, line.split()[-4:])
        assert all(ratio <= 1e-14 for ratio in worst) and allowed == 1e-10
    cut, both = WIDE * (2 * IN + 1), WIDE * (2 * IN + 1) + 3 * IN  # the rest: a norm and a bias
    shares = [f"{(cut / size + 3 * IN) / both:.0%}" for size in (1, 2, 4)]
    assert lines[7].split() == ["weights", "on", "a", "rank", *shares]
    kib = f"{3 * 5 * IN * 8 * 2 / 1024:.1f}"  # forward behind `second`, backward before `first`
    assert lines[8].split()[5:] == ["0.0", "KiB", kib, "KiB", kib, "KiB"]


@pytest.mark.parametrize(
    "case, text",
    [
        ("bias", "at tp_size=2: the output differs by .*; a sum or a bias taken twice"),
        ("f", r"at tp_size=2: gradient of (input 0|norm\.\w+) differs by .* the forward pass is"),
        ("twin", "at tp_size=1: the output differs by .* before anything is divided"),
        ("norm", "at tp_size=2: the gradient norm differs by .* what is cut"),
        ("loss", "at tp_size=2: the loss differs by .* the output is right"),
        ("scaled alone", "at tp_size=2: gradient of scale differs by .* the forward pass is right"),
    ],
    ids=["bias", "f", "twin", "norm", "loss", "scaled alone"],
)
def test_a_mistake_is_told_by_the_first_thing_that_is_wrong(
    found: Any, case: str, text: str
) -> None:
    error = of(found, case)
    assert error.startswith("ParityError: not the same as the dense module ")
    assert re.search(text, error), error


@pytest.mark.parametrize(
    "case, error",
    [
        (
            "slice",
            "ParityError: the output has shape (3, 5, 24) at tp_size=1, that of the dense module "
            "(3, 5, 8)",
        ),
        ("whole", "ParityError: tp_size=2, but every rank holds every weight whole"),
        (
            "unread",
            "ParityError: the dense module's loss does not depend on unread, so nothing is proven "
            "of it",
        ),
        ("renamed", "ConfigError: weights do not fit the model: they have, and the model lacks,"),
        ("unmarked", "ConfigError: norm.weight has no shard spec; call mark_replicated(module)"),
    ],
)
def test_what_would_prove_nothing_is_refused(found: Any, case: str, error: str) -> None:
    assert of(found, case).startswith(error)


def test_a_context_whose_ranks_are_not_all_in_tp_is_refused() -> None:
    two = ParallelContext(dp=Axis("dp", 2))
    with pytest.raises(ConfigError, match="needs all 2 ranks in tp, and not sequence-parallel"):
        prove_module(lambda part: Parallel(part.tp), Dense(), [torch.randn(1, IN)], two)


def test_what_is_whole_on_each_rank_decays_as_a_weight_and_not_as_a_bias() -> None:
    layer = nn.Linear(3, 2)
    mark_replicated(layer)
    weight, bias = layer.parameters()
    assert shard_spec(weight).decay and not shard_spec(bias).decay

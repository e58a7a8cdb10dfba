"""The linear layers alone, under random upstream gradients, against plain matrix products."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_equal
from ranks import run_ranks
from torch import Tensor

from rosetrainer.optim.clip import counts_here
from rosetrainer.parallel.context import Axis, init_tensor_parallel
from rosetrainer.parallel.sharding import Cut, ShardSpec, load_whole, shard_spec
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding
from rosetrainer.validation import ConfigError

IN, OUT = 8, 24
RANKS = {
    1: 1,
    2: 4,
    4: 4,
}  # by tp_size: two groups of two, which have nothing to do with each other


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def own_features(whole: Tensor, stride: int, tp: Axis) -> Tensor:
    """The slice of (.., OUT) that a column-parallel layer of this stride gives rank tp.rank."""
    blocks = whole.chunk(stride, dim=-1)
    return torch.cat([block.chunk(tp.size, dim=-1)[tp.rank] for block in blocks], dim=-1)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> list[Tensor]:
    """[y, x.grad, weight.grad, bias.grad] of y = x Wᵀ + b."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = leaves[0] @ leaves[1].T + leaves[2]
    y.backward(upstream)
    return [y, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def check_column(tp_size: int, stride: int, gather_output: bool) -> None:
    tp = init_tensor_parallel(tp_size).tp
    x, weight, bias = random(3, 5, IN, seed=1), random(OUT, IN, seed=2), random(OUT, seed=3)
    upstream = random(3, 5, OUT, seed=4)
    y, x_grad, weight_grad, bias_grad = dense_linear(x, weight, bias, upstream)
    layer = ColumnParallelLinear(IN, OUT, True, gather_output, stride, tp=tp).double()
    load_whole(layer, {"weight": weight, "bias": bias})
    x = x.requires_grad_()
    ours = layer(x)
    if not gather_output:
        y, upstream = own_features(y, stride, tp), own_features(upstream, stride, tp)
    assert_equal("y", ours, y)
    ours.backward(upstream)
    assert_equal("x.grad", x.grad, x_grad)  # type: ignore[arg-type]
    assert_gradients(layer, tp, {"weight": weight_grad, "bias": bias_grad})


def check_row(tp_size: int, input_is_parallel: bool) -> None:
    tp = init_tensor_parallel(tp_size).tp
    x, weight, bias = random(3, 5, OUT, seed=1), random(IN, OUT, seed=2), random(IN, seed=3)
    upstream = random(3, 5, IN, seed=4)
    y, x_grad, weight_grad, bias_grad = dense_linear(x, weight, bias, upstream)
    layer = RowParallelLinear(OUT, IN, True, input_is_parallel, tp=tp).double()
    load_whole(layer, {"weight": weight, "bias": bias})
    if input_is_parallel:
        x, x_grad = own_features(x, 1, tp), own_features(x_grad, 1, tp)
    x = x.clone().requires_grad_()
    ours = layer(x)
    assert_equal("y", ours, y)
    ours.backward(upstream)
    assert_equal("x.grad", x.grad, x_grad)  # type: ignore[arg-type]
    assert_gradients(layer, tp, {"weight": weight_grad, "bias": bias_grad})


def assert_gradients(layer: torch.nn.Module, tp: Axis, dense: dict[str, Tensor]) -> None:
    """The whole gradients, gathered by production code, equal the dense ones."""
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        whole = shard_spec(parameter).unshard(parameter.grad, "checkpoint")
        assert_equal(f"{name}.grad", whole, dense[name])


@pytest.mark.parametrize("gather_output", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_column_parallel_equals_dense(tp_size: int, stride: int, gather_output: bool) -> None:
    run_ranks(RANKS[tp_size], check_column, tp_size, stride, gather_output)


@pytest.mark.parametrize("input_is_parallel", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_row_parallel_equals_dense(tp_size: int, input_is_parallel: bool) -> None:
    run_ranks(RANKS[tp_size], check_row, tp_size, input_is_parallel)


def check_few_parts() -> None:
    """Two parts over four ranks: neighbours hold the same one, as few key-value heads do."""
    tp = init_tensor_parallel().tp
    spec = ShardSpec((4, 6), (Cut(tp, 1, copies=2),))
    whole = random(4, 6, seed=5)
    local = spec.shard(whole)
    assert local.tolist() == whole[:, 3 * (tp.rank // 2) :][:, :3].tolist()
    assert torch.equal(spec.unshard(local, "checkpoint"), whole)
    assert counts_here(spec, [tp]) == (tp.rank in (0, 2))


def test_fewer_parts_than_ranks_gather_to_the_whole() -> None:
    run_ranks(4, check_few_parts)


def test_sizes_that_do_not_divide_are_refused_with_values() -> None:
    tp = Axis("tp", size=4)
    with pytest.raises(ConfigError, match="out_features=30 .* 3 x 4; .* multiple of 12"):
        ColumnParallelLinear(8, 30, stride=3, tp=tp)
    with pytest.raises(ConfigError, match="in_features=30 .* tp_size=4; .* multiple of 4"):
        RowParallelLinear(30, 8, tp=tp)


def test_load_whole_changes_nothing_when_a_weight_does_not_fit() -> None:
    layer = ColumnParallelLinear(IN, OUT, tp=Axis("tp"))
    load_whole(layer, {"weight": torch.ones(OUT, IN), "bias": torch.ones(OUT)})
    with pytest.raises(ConfigError, match=r"bias has shape \(3,\), the model's is \(24,\)"):
        load_whole(layer, {"weight": torch.zeros(OUT, IN), "bias": torch.zeros(3)})
    with pytest.raises(ConfigError, match="they lack bias"):
        load_whole(layer, {"weight": torch.zeros(OUT, IN)})
    with pytest.raises(ConfigError, match="they have, and the model lacks, extra"):
        load_whole(layer, {**dict(layer.named_parameters()), "extra": torch.zeros(3)})
    assert layer.weight.min() == 1


def test_a_layer_shows_its_whole_width_and_what_its_rank_holds() -> None:
    tp = Axis("tp", 2, 1)
    fused = ColumnParallelLinear(64, 192, stride=3, tp=tp)
    assert fused.extra_repr() == "in=64, out=3 x 64/2 (rank 1 holds 32:64), bias"
    wide = ColumnParallelLinear(64, 256, bias=False, tp=tp)
    assert wide.extra_repr() == "in=64, out=256/2 (rank 1 holds 128:256)"
    assert RowParallelLinear(256, 64, tp=tp).extra_repr() == (
        "in=256/2 (rank 1 holds 128:256), out=64, bias"
    )
    assert RowParallelLinear(256, 64, tp=Axis("tp")).extra_repr() == "in=256, out=64, bias"
    table = VocabParallelEmbedding(200, 64, tp=tp, init_std=1.0)
    assert table.extra_repr() == "ids=200/2 (rank 1 holds 128:256), padded to 256, width=64"


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
def test_unless_told_otherwise_weights_keep_the_variance_of_what_comes_in(layer: type) -> None:
    assert shard_spec(layer(64, 16, tp=Axis("tp")).weight).init_std == 1 / 8
    assert shard_spec(layer(64, 16, tp=Axis("tp"), init_std=0.5).weight).init_std == 0.5

"""Our layers beside other people's that hold the same shards: torch's DTensor, Megatron-Core.

Shape letters: B batch, T sequence, D d_model, F d_ff, V vocabulary; tp = tp.size.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.tensor.parallel as dtensor
import torch.nn.functional as F
from oracle import assert_all_equal
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rosetrainer.config import ParallelConfig
from rosetrainer.models.gpt import LayerNorm
from rosetrainer.parallel import sharding
from rosetrainer.parallel.context import Axis, ParallelContext, init_parallel
from rosetrainer.parallel.data_parallel import reduce_gradients
from rosetrainer.parallel.sharding import shard_spec
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding, linear_cross_entropy

B, T, D, D_FF, TOKENS = 3, 8, 12, 48, 256
VOCAB, COLUMNS = 17, 24  # of the logits: a pad of 7, which on 4 ranks is all that the last has
SPREAD = 8  # of the logits, at most

Function = Callable[[Tensor], Tensor]


def random(*shape: int, seed: int) -> Tensor:
    """float64, of values that fp32 holds too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def shuffled_tokens() -> Tensor:
    return torch.randperm(B * T, generator=torch.Generator().manual_seed(0)).view(B, T)


def own(whole: Tensor, tp: Axis, dim: int) -> Tensor:
    return whole.chunk(tp.size, dim)[tp.rank]


def own_tokens(whole: Tensor, tp: Axis) -> Tensor:
    """(B, T, D), or (B, T/tp, D) under sequence parallelism."""
    return own(whole, tp, 1) if tp.sequence_parallel else whole


def context_of(sequence_parallel: bool) -> ParallelContext:
    return init_parallel(ParallelConfig(sequence_parallel=sequence_parallel), "cpu")


def differentiate(function: Function, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """y = function(x), and x.grad under the gradient `upstream` of y; ids have none."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = function(x)
    y.backward(upstream)
    return {"y": y.detach()} if x.grad is None else {"y": y.detach(), "x.grad": x.grad}


def block(norm: nn.Module, up: nn.Module, down: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(norm=norm, up=up, gelu=nn.GELU(), down=down))


def dtensor_plan(sequence_parallel: bool) -> dict[str, dtensor.ParallelStyle]:
    if not sequence_parallel:
        return {"up": dtensor.ColwiseParallel(), "down": dtensor.RowwiseParallel()}
    return {
        "norm": dtensor.SequenceParallel(),
        "up": dtensor.ColwiseParallel(input_layouts=Shard(1)),
        "down": dtensor.RowwiseParallel(output_layouts=Shard(1)),
    }


def gradient_of(parameter: Tensor) -> Tensor:
    """A DTensor sums and gathers its own."""
    assert parameter.grad is not None
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def check_dtensor_block(sequence_parallel: bool) -> None:
    tp = (context := context_of(sequence_parallel)).tp
    theirs = block(nn.LayerNorm(D), nn.Linear(D, D_FF), nn.Linear(D_FF, D)).double()
    whole = {n: random(*w.shape, seed=i) for i, (n, w) in enumerate(theirs.named_parameters())}
    theirs.load_state_dict(whole)
    mesh = init_device_mesh("cpu", (tp.size,))
    dtensor.parallelize_module(theirs, mesh, dtensor_plan(sequence_parallel))
    column, row = ColumnParallelLinear(D, D_FF, tp=tp), RowParallelLinear(D_FF, D, tp=tp)
    ours = block(LayerNorm(D, bias=True, tp=tp), column, row).double()
    sharding.load_whole(ours, whole)

    x, upstream = (own_tokens(random(B, T, D, seed=seed), tp) for seed in (10, 11))
    result, expected = differentiate(ours, x, upstream), differentiate(theirs, x, upstream)
    reduce_gradients(ours, context)
    result |= sharding.gather_whole(ours, gradients=True)
    expected |= {name: gradient_of(weight) for name, weight in theirs.named_parameters()}
    assert_all_equal(result, expected)


def our_loss(tp: Axis) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Logits with -inf as pad, labels, upstream; and our result, for which pad can be anything."""
    logits = own(SPREAD / 4 * random(B, T, COLUMNS, seed=1).clamp(-2, 2), tp, -1)
    upstream = random(B, T, seed=2)
    labels = shuffled_tokens()  # each once, and the rest -100
    labels = labels.masked_fill(labels >= VOCAB, -100)
    counts, leaf = labels != -100, logits.clone().requires_grad_()
    # A head of which each token reads a row of its own: then the table's gradient is the logits'.
    x, table = torch.eye(B * T).double().view(B, T, -1), leaf.flatten(0, 1).T
    given = (labels.masked_fill(~counts, 0), upstream * counts)
    total, losses = linear_cross_entropy(x, table, *given, VOCAB, tp)
    total.backward()
    assert leaf.grad is not None
    ours = {"y": losses * counts, "x.grad": leaf.grad}
    pad = own(torch.arange(COLUMNS), tp, 0) >= VOCAB
    return logits.masked_fill(pad, -math.inf), labels, upstream, ours


def check_dtensor_loss() -> None:
    tp = context_of(sequence_parallel=False).tp
    logits, labels, upstream, ours = our_loss(tp)
    mesh = init_device_mesh("cpu", (tp.size,))

    def their_loss(x: Tensor) -> Tensor:
        cut = DTensor.from_local(x.flatten(0, 1), mesh, [Shard(1)])
        losses: Any = F.cross_entropy(cut, labels.flatten(), reduction="none")  # ignores -100
        return losses.to_local().view(B, T)

    with dtensor.loss_parallel():
        assert_all_equal(ours, differentiate(their_loss, logits, upstream))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_block_equals_dtensors(tp_size: int, sequence_parallel: bool) -> None:
    run_ranks(tp_size, check_dtensor_block, sequence_parallel)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_loss_equals_loss_parallels(tp_size: int) -> None:
    run_ranks(tp_size, check_dtensor_loss)


# Under sequence parallelism Megatron's buffers are made on the current CUDA device.
@mock.patch("torch.cuda.current_device", new=lambda: "cpu")
def check_megatron() -> None:
    """All of it in one process: the import alone takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import tells of what it misses and will remove
        import megatron.core as megatron
    tp = context_of(sequence_parallel=False).tp
    megatron.parallel_state.initialize_model_parallel(tp.size)
    with warnings.catch_warnings():
        # A variable that orders CUDA kernels, a group that it does not pass on to itself, and the
        # names that two collectives had before torch 2.13.
        warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS", UserWarning)
        warnings.filterwarnings("ignore", ".*tp_group is None", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning)
        check_megatron_loss(megatron, tp)
        check_megatron_layers(megatron, tp)
        check_megatron_layers(megatron, context_of(sequence_parallel=True).tp)


def check_megatron_layers(megatron: Any, tp: Axis) -> None:
    layers, given = megatron.tensor_parallel, options(megatron, tp)
    x, hidden = own_tokens(random(B, T, D, seed=1), tp), own(random(B, T, D_FF, seed=2), tp, -1)
    for stride in (1, 3):
        theirs = layers.ColumnParallelLinear(D, D_FF, stride=stride, **given)
        ours = ColumnParallelLinear(D, D_FF, stride=stride, tp=tp)
        compare(ours, theirs, batch_first(theirs), x, hidden)
    linear = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
    theirs = layers.RowParallelLinear(D_FF, D, **linear, **given)
    compare(RowParallelLinear(D_FF, D, tp=tp), theirs, batch_first(theirs), hidden, x)
    scatter = tp.sequence_parallel  # which gives (T/tp, B, D), and without it (B, T, D)
    theirs = layers.VocabParallelEmbedding(TOKENS, D, reduce_scatter_embeddings=scatter, **given)
    table = VocabParallelEmbedding(TOKENS, D, tp=tp, init_std=1.0)
    ids = TOKENS // 2 - 9 + shuffled_tokens()  # on both sides of where the table is cut
    compare(table, theirs, lambda i: theirs(i).transpose(0, int(scatter)), ids, x)


def batch_first(linear: Any) -> Function:
    """A linear layer of Megatron's takes (T, B, D) and gives (y, None)."""
    return lambda x: linear(x.transpose(0, 1))[0].transpose(0, 1)


def options(megatron: Any, tp: Axis) -> dict[str, Any]:
    """Of a layer of Megatron's, which fills a whole weight and cuts its own shard from it."""
    config = megatron.ModelParallelConfig(
        tensor_model_parallel_size=tp.size,
        sequence_parallel=tp.sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    group = megatron.parallel_state.get_tensor_model_parallel_group()
    fill = {"init_method": lambda whole: whole.copy_(random(*whole.shape, seed=5))}
    return {"config": config, "tp_group": group, **fill}


def compare(
    ours: nn.Module, theirs: nn.Module, forward: Function, x: Tensor, upstream: Tensor
) -> None:
    """Shards, outputs and gradients as this rank holds them: a partial sum is compared as such."""
    shapes = {name: shard_spec(w).dense_shape for name, w in ours.double().named_parameters()}
    sharding.load_whole(ours, {n: random(*shape, seed=5) for n, shape in shapes.items()})
    pairs = {name: (w, theirs.get_parameter(name)) for name, w in ours.named_parameters()}
    if "bias" in pairs:
        pairs["bias"][1].data.copy_(pairs["bias"][0].flatten())  # its own begins at zero
    result, expected = differentiate(ours, x, upstream), differentiate(forward, x, upstream)
    for name, (weight, other) in pairs.items():
        result[name], expected[name] = weight.detach().view(other.shape), other.detach()
        result[f"{name}.grad"] = gradient_of(weight).view(other.shape)
        expected[f"{name}.grad"] = gradient_of(other)
        summed_later = getattr(other, "sequence_parallel", False)  # its mark of a partial sum
        assert ("tp" in shard_spec(weight).partial_over) == summed_later, name
    assert_all_equal(result, expected)


def check_megatron_loss(megatron: Any, tp: Axis) -> None:
    """Megatron's is in fp32 whatever the logits are, so a bound of fp32's takes 1e-10's place.

    With u, the unit roundoff, and S, the spread of the logits: a shifted logit is off by S u, its
    exponential by (S + 2) u of itself, the sum of V by (S + V + 2) u of itself, its logarithm by
    that and 2 u log V, the loss by S u for the label's logit and its own (S + log V) u more. A
    softmax is off by (2 S + V + 5) u, less the one-hot and times upstream by u more each.
    """
    logits, labels, upstream, ours = our_loss(tp)
    counts = labels != -100  # masked outside, as in its trainer: it knows no ignored label
    labels = labels.masked_fill(~counts, 0)

    def their_loss(x: Tensor) -> Tensor:  # it overwrites its input
        return megatron.tensor_parallel.vocab_parallel_cross_entropy(x.clone(), labels) * counts

    theirs = differentiate(their_loss, logits.float(), upstream.float())
    bound = (3 * SPREAD + VOCAB + 3 * math.log(VOCAB) + 7) * 2**-24
    for name, scale in {"y": torch.ones(B, T), "x.grad": upstream.abs()[..., None]}.items():
        worst = ((ours[name] - theirs[name]).abs() / scale).max().item()
        assert worst <= bound, f"{name} of the loss differs by {worst:.3g}, not {bound:.3g}"


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed: requirements-dev.txt has it where it has a wheel",
)
def test_layers_and_loss_equal_megatrons() -> None:
    run_ranks(2, check_megatron)

"""The column-parallel layer against plain matrix products, under random upstream gradients.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_forward_tp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from comm import all_reduce, broadcast_, own_slice
from environment import run, say
from oracle import difference
from parallel_context import ParallelContext, end_parallel, init_tensor_parallel
from tensor_parallel import ColumnParallelLinear, draw_whole, init_weights, shard_spec
from torch import Tensor, nn

IN, OUT = 24, 48


def random(context: ParallelContext, *shape: int, seed: int) -> Tensor:
    """In float64; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(context.device)


def apart(tensor: Tensor, context: ParallelContext) -> float:
    """The largest difference between any rank's tensor and rank 0's."""
    rank0 = broadcast_(tensor.detach().clone(), context.tp, "forward")
    worst = (tensor.detach() - rank0).abs().max()
    return all_reduce(worst, context.tp, "forward", dist.ReduceOp.MAX).item()


def check_layer(context: ParallelContext, layer: nn.Module, cut_output: bool) -> None:
    """Y and the gradients of X, W and b; each rank's upstream gradient is its part of one."""
    tp = context.tp
    layer.to(context.device, torch.float64)
    w, b = random(context, OUT, IN, seed=1), random(context, OUT, seed=2)
    x, upstream = random(context, 3, 5, IN, seed=3), random(context, 3, 5, OUT, seed=4)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
    dense_y = leaves[0] @ leaves[1].T + leaves[2]
    dense_y.backward(upstream)

    for parameter, whole in ((layer.weight, w), (layer.bias, b)):
        parameter.data.copy_(shard_spec(parameter).shard(whole))
    x.requires_grad_()
    y = layer(x)
    if cut_output:
        dense_y, upstream = own_slice(dense_y, tp), own_slice(upstream, tp)
    y.backward(upstream)
    forward = difference("Y", y, dense_y)
    own = (layer.weight, layer.bias)
    ours = [shard_spec(p).unshard(p.grad, tp, "checkpoint") for p in own]
    names = ["gradient of X", "gradient of W", "gradient of b"]
    backward = list(map(difference, names, [x.grad, *ours], [leaf.grad for leaf in leaves]))
    say(f"  output shape: {tuple(y.shape)}")
    say(f"  max diff vs rank0: {apart(x.grad, context):.1e}")
    say(f"  max diff vs dense: {forward:.1e}")
    say(f"  max grad diff vs dense: X {backward[0]:.1e}, W {backward[1]:.1e}, b {backward[2]:.1e}")


def check_initial_weights(context: ParallelContext) -> None:
    """The shards are slices of one tensor, bitwise: what one process would draw."""
    layer = ColumnParallelLinear(IN, OUT, tp=context.tp).to(context.device)
    init_weights(layer, seed=1)
    spec = shard_spec(layer.weight)
    whole = spec.unshard(layer.weight.detach(), context.tp, "checkpoint").cpu()
    assert torch.equal(whole, draw_whole(spec, 1, "weight")), "initial weights"
    assert abs(whole.std() * IN**0.5 - 1) < 0.1, "the fan-in is the whole one"
    say("initial weights: those of one process, bitwise")


def main() -> None:
    context = init_tensor_parallel()
    say(f"world_size: {context.world_size}")
    for gather in (False, True):
        say(f"column-parallel, gather_output={gather}")
        layer = ColumnParallelLinear(IN, OUT, gather_output=gather, tp=context.tp)
        check_layer(context, layer, cut_output=not gather)
    check_initial_weights(context)
    end_parallel()


if __name__ == "__main__":
    run(main)

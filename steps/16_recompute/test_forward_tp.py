"""The model and its layers against dense code: logits, loss, every gradient, three updates.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_forward_tp.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import torch
import torch.distributed as dist
import torch.nn.functional as F
from clip import clip_gradients
from comm import all_gather, all_reduce, broadcast_, own_slice, reduce_scatter
from config import IGNORED, ConfigError, GPTConfig, ParallelConfig
from dropout import Dropout, DropoutSeed, Seed
from environment import run, say
from model import GPTModel, TransformerBlock
from oracle import Masks, difference, naive_loss, worst_difference
from parallel_context import (
    Axis,
    ParallelContext,
    end_parallel,
    init_parallel,
    init_tensor_parallel,
)
from sharding import draw_whole, gather_whole, init_weights, load_whole, shard_spec
from tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer
from train import global_backward, own_rows, reduce_gradients
from vocab_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy

IN, OUT = 24, 48
UPDATES_DROPOUT = 0.2
PHASES = ("forward", "backward")
V, PADDED = 139, 256  # so that four ranks hold 64, 64, 11 and 0 rows, the rest is pad


def random(context: ParallelContext, *shape: int, seed: int) -> Tensor:
    """In float64; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(context.device)


def apart(tensor: Tensor, context: ParallelContext) -> float:
    """The largest difference between any rank's tensor and rank 0's."""
    rank0 = broadcast_(tensor.detach().clone(), context.tp, "forward")
    worst = (tensor.detach() - rank0).abs().max()
    return all_reduce(worst, context.tp, "forward", dist.ReduceOp.MAX).item()


def check_layer(
    context: ParallelContext, layer: nn.Module, cut_input: bool, cut_output: bool, stride: int = 1
) -> None:
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
    x = (own_slice(x, tp) if cut_input else x).requires_grad_()
    y = layer(x)
    if cut_output:  # a slice of each of the stride's blocks
        blocks = [t.unflatten(-1, (stride, -1)) for t in (dense_y, upstream)]
        dense_y, upstream = (own_slice(block, tp).flatten(-2) for block in blocks)
    y.backward(upstream)
    forward = difference("Y", y, dense_y)
    own = (layer.weight, layer.bias)
    ours = [shard_spec(p).unshard(p.grad, "checkpoint") for p in own]
    names = ["gradient of X", "gradient of W", "gradient of b"]
    x_grad = all_gather(x.grad, tp, "checkpoint") if cut_input else x.grad
    backward = list(map(difference, names, [x_grad, *ours], [leaf.grad for leaf in leaves]))
    say(f"  input shape: {tuple(x.shape)}, output shape: {tuple(y.shape)}")
    say(f"  max diff vs rank0: {apart(x_grad, context):.1e}")
    say(f"  max diff vs dense: {forward:.1e}")
    say(f"  max grad diff vs dense: X {backward[0]:.1e}, W {backward[1]:.1e}, b {backward[2]:.1e}")


def check_embedding(context: ParallelContext) -> None:
    """Rows and the table's gradient; rows of zeros, and their gradient, stay out of the whole."""
    layer = VocabParallelEmbedding(V, IN, tp=context.tp, init_std=0.3)
    layer.to(context.device, torch.float64)
    init_weights(layer, seed=1)
    spec = shard_spec(layer.weight)
    table = draw_whole(spec, 1, "weight").double().to(context.device).requires_grad_()
    ids = torch.arange(2 * V, device=context.device).view(2, V) % V
    upstream = random(context, 2, V, IN, seed=5)
    table[ids].backward(upstream)
    y = layer(ids)
    y.backward(upstream)
    forward = difference("rows", y, table[ids])
    ours = spec.unshard(layer.weight.grad, "checkpoint")
    backward = difference("gradient of the table", ours, table.grad)
    check_pad(context, layer.weight)
    assert torch.equal(spec.unshard(layer.weight, "checkpoint"), table), "first weights"
    say(f"  max diff vs rank0: {apart(y, context):.1e}")
    say(f"  max diff vs dense: {forward:.1e}\n  max grad diff vs dense: {backward:.1e}")
    for wrong in (-1, V, PADDED - 1, PADDED):
        try:
            layer(torch.tensor([0, wrong], device=context.device))
        except ValueError as error:
            assert str(error) == f"token id {wrong} is not in the vocabulary of 0 to {V - 1}", error
        else:
            raise AssertionError(f"no error for token id {wrong}")
    say(f"  ids outside 0 to {V - 1} are refused")


def check_loss(context: ParallelContext, scale: float) -> None:
    """Each token's loss and the logits' gradient against F.cross_entropy; the bytes are counted."""
    tp = context.tp
    logits = scale * random(context, 3, 5, V, seed=6)
    labels = (torch.arange(15, device=context.device) * 46 % V).view(3, 5)
    labels[0, 0], labels[0, 1], labels[1] = V - 1, 63, IGNORED
    upstream = random(context, 3, 5, seed=7)
    leaf = logits.clone().requires_grad_()
    dense = F.cross_entropy(leaf.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    dense.backward(upstream)
    # The pad rows' logits are zero in the model. They must not count, so here they are large.
    padded = torch.cat([logits, logits.new_full((3, 5, PADDED - V), 9 * scale)], -1)
    own = own_slice(padded, tp).requires_grad_()
    tp.ledger.clear()
    losses = vocab_parallel_cross_entropy(own, labels, V, tp)
    losses.backward(upstream)
    entries = tp.ledger.entries.items()
    moved = {f"{op} {phase}": (t.calls, t.payload_bytes) for (op, phase), t in entries}
    forward = difference("losses", losses, dense)
    gradient = all_gather(own.grad, tp, "checkpoint")
    backward = difference("gradient of the logits", gradient[..., :V], leaf.grad)
    assert gradient[..., V:].eq(0).all(), "the pad has a gradient"
    say(f"  logits of {scale:g}: max diff vs rank0: {apart(losses, context):.1e}")
    say(f"  max diff vs dense: {forward:.1e}\n  max grad diff vs dense: {backward:.1e}")
    if tp.size > 1:
        few = 3 * labels.numel() * 8  # three float64 a token
        assert moved == {"all_reduce forward": (3, few)}, moved
        say(f"  bytes: {few}; gathered logits would be {padded.numel() * 8}")
    for wrong in (-1, V, PADDED):
        try:
            vocab_parallel_cross_entropy(own, labels.clone().fill_(wrong), V, tp)
        except ValueError as error:
            assert str(error).startswith(f"token id {wrong} is not in"), error
        else:
            raise AssertionError(f"no error for label {wrong}")


def check_pad(context: ParallelContext, weight: nn.Parameter) -> None:
    """Behind the last token, the table and its gradient hold zeros; together they are padded."""
    rows = len(weight)
    assert rows * context.tp.size == PADDED, rows
    own = min(max(V - context.tp.rank * rows, 0), rows)
    assert weight[:own].ne(0).all(), "a row of the vocabulary is zero"
    assert weight[own:].eq(0).all() and weight.grad[own:].eq(0).all(), "a pad row is not zero"


def check_initial_weights(context: ParallelContext, layer: nn.Module) -> None:
    """The shards are slices of one tensor, bitwise: what one process would draw."""
    init_weights(layer, seed=1)
    spec = shard_spec(layer.weight)
    whole = spec.unshard(layer.weight.detach(), "checkpoint").cpu()
    assert torch.equal(whole, draw_whole(spec, 1, "weight").to(whole)), "initial weights"
    assert abs(whole.std() * IN**0.5 - 1) < 0.1, "the fan-in is the whole one"
    say("  initial weights: those of one process, bitwise")


def check_ring(context: ParallelContext) -> None:
    """An all-reduce is a reduce-scatter and then an all-gather: that is how its traffic adds up."""
    x = random(context, 3, 8, seed=context.tp.rank)
    scattered = reduce_scatter(x, context.tp, "forward")
    gathered = all_gather(scattered, context.tp, "forward")
    difference("all-reduce", gathered, all_reduce(x, context.tp, "forward"))


def random_model(
    context: ParallelContext, dropout: float = 0.0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64 and its whole weights: no bias is zero and no norm is one."""
    shape = {"context_length": 8, "n_heads": 8, "d_model": 24, "d_head": 5, "d_ff": 40}
    model = GPTModel(GPTConfig(V, **shape, dropout=dropout), context).double()
    noisy = {n: replace(shard_spec(p), init_std=0.3) for n, p in model.named_parameters()}
    whole = {n: draw_whole(s, 2, n).double().to(context.device) for n, s in noisy.items()}
    load_whole(model, whole)
    return model, {name: tensor.requires_grad_() for name, tensor in whole.items()}


def compare(
    context: ParallelContext,
    model: nn.Module,
    whole: dict[str, Tensor],
    inputs: tuple[Tensor, ...],
    mask: Tensor,
    dense: list[Tensor],
    dense_loss: Tensor,
    seed: Seed = None,
) -> tuple[dict[str, int], int]:
    """Logits where the mask is 1, loss, and every gradient; returns collectives and elements."""
    context.tp.ledger.clear()
    _, loss = model(*inputs, return_logits=False, seed=seed)
    loss.backward()
    calls = {f"{op} {phase}": t.calls for (op, phase), t in context.tp.ledger.entries.items()}
    payload = sum(t.payload_bytes for t in context.tp.ledger.entries.values()) // 8  # of float64
    reduce_gradients(model, context)
    logits, same_loss = model(*inputs, seed=seed)
    assert torch.equal(loss, same_loss)
    say(f"max diff vs rank0: {apart(logits, context):.1e}")
    assert apart(logits, context) == 0, "logits of this rank and of rank 0"
    say(f"input_ids shape: {tuple(inputs[0].shape)}\nlogits shape: {tuple(logits.shape)}")
    say(f"loss: {loss.item():.6f}")
    difference("loss", loss, dense_loss)
    say(f"max diff vs dense: {difference('logits', logits[mask.bool()], torch.cat(dense)):.1e}")
    gradients = gather_whole(model, gradients=True)
    worst = worst_difference(gradients, {name: t.grad for name, t in whole.items()})
    say(f"max grad diff vs dense: {worst:.1e}")
    say(f"collectives: {calls}\npayload: {payload} elements")
    return calls, payload


def naive_model(context: ParallelContext, inputs: tuple[Tensor, ...], dropout: float) -> tuple:
    """(weights with their gradients, logits of each row, loss), one for all layouts."""
    model, whole = random_model(context, dropout)
    rows, loss = naive_loss(whole, model.config, *inputs, Masks(dropout, 5, 3))
    loss.backward()
    return whole, rows, loss


def check_model(
    context: ParallelContext, inputs: tuple[Tensor, ...], dropout: float, naive: tuple
) -> None:
    """With padding at both ends of a row; the collectives are counted."""
    input_ids, mask, _ = inputs
    model, _ = random_model(context, dropout)
    seed = DropoutSeed(5, 3)
    whole, rows, loss = naive
    calls, payload = compare(context, model, whole, inputs, mask, rows, loss, seed)
    same = torch.equal(model(*inputs)[1], model(*inputs, seed=seed)[1])
    assert same == (dropout == 0), "without a seed there is no dropout"
    sums = 2 * model.config.n_layers + 1  # one for the embedding, one for the head's input
    expected = {"all_reduce forward": 3}  # the loss
    if context.tp.sequence_parallel:  # an all-reduce is a reduce-scatter and an all-gather
        pairs = [f"{op} {phase}" for op in ("reduce_scatter", "all_gather") for phase in PHASES]
        expected |= dict.fromkeys(pairs, sums)
    else:
        expected |= {"all_reduce forward": sums + 3, "all_reduce backward": sums}
    assert calls == (expected if context.tp.size > 1 else {}), calls
    expected_payload = input_ids.numel() * (sum(expected.values()) - 3) * model.config.d_model
    expected_payload += 3 * input_ids.numel()
    assert payload == (expected_payload if context.tp.size > 1 else 0), payload


def dropped(shape: tuple[int, ...], site: str, seed: DropoutSeed, first: tuple = (0,)) -> Tensor:
    dropout = Dropout(0.1)
    dropout.site = site
    return dropout(torch.ones(shape), seed, first) == 0


def check_dropout(context: ParallelContext) -> None:
    """Rate, mean, and that masks share nothing; how long they take."""
    shape, seed = (8, 64, 256), DropoutSeed(1, 2)
    mask = dropped(shape, "a", seed)
    n = mask.numel()
    rate = mask.double().mean().item()
    assert abs(rate - 0.1) < 4 * math.sqrt(0.09 / n), rate
    # Of another site, another token or head, a neighbour; another step, seed, sample.
    others = [dropped(shape, "b", seed), dropped(shape, "a", seed, (64,)), mask.roll(1, -1)]
    others += [dropped(shape, "a", DropoutSeed(*own)) for own in ((1, 3), (2, 2), (1, 2, 8))]
    for other in others:
        both = (mask & other).double().mean().item()
        assert abs(both - 0.01) < 4 * math.sqrt(0.01 / n), f"two masks share {both}"
    part = dropped((2, 5, 256), "a", DropoutSeed(1, 2, first_row=3), (7,))
    assert torch.equal(part, mask[3:5, 7:12]), "a block's mask is the block of the mask"
    say(f"dropped: {rate:.4f} of {n}")
    x = torch.ones(shape, device=context.device)
    assert torch.equal(Dropout(0.1)(x, seed, (0,)).cpu(), Dropout(0.1)(x.cpu(), seed, (0,)))
    for call in ("Dropout(0.1)(x, seed, (0,))", "F.dropout(x, 0.1)"):
        took = Timer(call, globals=globals() | {"x": x, "seed": seed}).timeit(20).mean * 1e3
        say(f"  {call}: {took:.2f} ms")


def run_block(config: GPTConfig, tp: Axis, x: Tensor) -> tuple[int, int]:
    """(elements of its ring traffic x n / (n-1), whole (B, T, D) tensors saved for backward)."""
    block = TransformerBlock(config, tp).to(x)
    init_weights(block, seed=1)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tp.ledger.clear()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        own = x.chunk(tp.size, dim=1)[tp.rank] if tp.sequence_parallel else x
        y = block(own.requires_grad_())
    y.backward(torch.ones_like(y))
    ring = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    moved = sum(ring[op] * t.payload_bytes for (op, _), t in tp.ledger.entries.items())
    whole = sum(t.numel() == x.numel() and t.shape[-1] == x.shape[-1] for t in saved)
    return moved // x.element_size(), whole


def check_pair(context: ParallelContext) -> None:
    """A block's ring traffic is that of the all-reduces; the gathered inputs are still saved."""
    x, config = random(context, 2, 8, 24, seed=8), random_model(context)[0].config
    replicated, saved = run_block(config, replace(context.tp, sequence_parallel=False), x)
    divided, still_saved = run_block(config, context.tp, x)
    say(f"ring traffic of a block x n / (n-1): {replicated} elements, sequence-parallel {divided}")
    say(f"whole (B, T, D) tensors saved: {saved}, sequence-parallel {still_saved}")
    assert replicated == divided, (replicated, divided)
    assert (saved, still_saved) == (4, 2 if context.tp.size > 1 else 4), (saved, still_saved)


def kept(
    model: nn.Module, tp: Axis, input_ids: Tensor
) -> tuple[dict[str, Tensor], int, dict[str, int]]:
    """(every gradient, bytes that are kept for the backward pass, collectives that run again)"""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}  # a tensor keeps its storage's address taken

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    tp.ledger.clear()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        _, loss = model(input_ids, None, input_ids, False, DropoutSeed(1, 2))
    size = sum(n for address, (_, n) in storages.items() if address not in weights)
    loss.backward(retain_graph=True)
    again = {op: t.calls for (op, phase), t in tp.ledger.entries.items() if phase == "recompute"}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()  # a graph can be run through twice
    assert all(torch.equal(p.grad, 2 * gradients[n]) for n, p in model.named_parameters())
    return gradients, size, again


def check_recompute(parallel: ParallelConfig, input_ids: Tensor, dropout: float) -> None:
    """Gradients are bitwise the same; bytes fall as the formulas say; collectives run again."""
    first: dict[str, Tensor] = {}
    results: dict[str, list] = {}
    for mode in ("none", "attention", "block"):
        context = init_parallel(replace(parallel, recompute=mode))
        model, _ = random_model(context, dropout)
        gradients, *results[mode] = kept(model, context.tp, input_ids)
        first = first or gradients
        for name, gradient in gradients.items():
            assert torch.equal(gradient, first[name]), f"{mode}: gradient of {name}"
    (B, T), tp, config = input_ids.shape, context.tp, model.config
    D, H, K, F = config.d_model, config.n_heads, config.head_width, config.ff_width
    whole, cut = 8 * B * T, 8 * B * T // tp.size  # bytes of a number a token, in float64
    own = cut if tp.sequence_parallel else whole
    # The fused kernel keeps a logarithm for each query and head. Written out, with dropout, the
    # probabilities before and after it, and what was dropped: 8 + 8 + 1 bytes each, and the mask.
    attention = cut * H * T * 17 // 8 + T * T if dropout else cut * H
    # A norm keeps its input, mean and deviation; a linear layer its input; GELU its own.
    block = 2 * own * (D + 2) + 2 * whole * D + cut * (4 * H * K + 2 * F) + attention
    block += 2 * own * D // 8 if dropout else 0
    layers, sizes = config.n_layers, {mode: size for mode, (size, _) in results.items()}
    if context.device.type == "cpu":  # another kernel keeps other things
        assert sizes["none"] - sizes["attention"] == layers * attention, sizes
        assert sizes["none"] - sizes["block"] == layers * (block - own * D), sizes
    sums = layers * (2 if dropout else 1)  # without dropout, backward needs no last sum
    sequence = {"all_gather": 2 * layers, "reduce_scatter": sums}
    expected = sequence if tp.sequence_parallel else {"all_reduce": sums}
    assert results["block"][1] == (expected if tp.size > 1 else {}), results
    say(f"dropout {dropout}, sequence-parallel {tp.sequence_parallel}: bytes kept {sizes}")
    say(f"  again: {results['block'][1]}; gradients: bitwise the same")


def check_loading(context: ParallelContext) -> None:
    """Weights that do not fit are refused by name, before anything is changed."""
    model, whole = random_model(context)
    before = gather_whole(model)
    name = "blocks.1.attention.query_key_value.weight"
    for wrong, message in (
        ({n: w for n, w in whole.items() if n != name}, f"they lack {name}"),
        ({**whole, name: whole[name][:7]}, f"{name} has shape (7, 24)"),
    ):
        try:
            load_whole(model, {n: w * 2 for n, w in wrong.items()})
        except ConfigError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"loaded weights although {message}")
    after = gather_whole(model)
    assert all(torch.equal(before[n], after[n]) for n in before), "something was changed"


def check_mesh(context: ParallelContext, input_ids: Tensor) -> None:
    """The ranks of a tensor-parallel group hold the same rows, data-parallel ranks all rows."""
    own, _ = own_rows((input_ids, input_ids), context)
    shared = all_gather(own[None], context.tp, "checkpoint", dim=0)
    assert (shared == own).all(), "rows differ inside a tensor-parallel group"
    together = all_gather(own, context.dp, "checkpoint", dim=0)
    assert torch.equal(together, input_ids), "the data-parallel ranks' rows are not the batch"


def dense_updates(
    context: ParallelContext, input_ids: Tensor, labels: Tensor, optimizer: type, updates: int
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """(losses, norms, weights) of one process; gradients are clipped to half the first norm."""
    model, whole = random_model(context)
    theirs = optimizer(whole.values(), lr=1e-3)
    losses, norms = [], []
    for step in range(updates):
        theirs.zero_grad()
        all_real, masks = torch.ones_like(input_ids), Masks(UPDATES_DROPOUT, 1, step)
        _, loss = naive_loss(whole, model.config, input_ids, all_real, labels, masks)
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.cat([w.grad.flatten() for w in whole.values()]).norm())
        for tensor in whole.values():  # torch's own clip adds 1e-6 to the norm
            tensor.grad.mul_((norms[0] / 2 / norms[-1]).clamp(max=1.0))
        theirs.step()
    return losses, norms, whole


def check_updates(
    context: ParallelContext, input_ids: Tensor, labels: Tensor, optimizer: type, dense: tuple
) -> None:
    """SGD hides no factor of a gradient; AdamW is what trains. Token counts differ between rows."""
    model, _ = random_model(context, UPDATES_DROPOUT)
    batch = own_rows((input_ids, labels), context)
    ours = optimizer(model.parameters(), lr=1e-3)
    losses, norms, whole = dense
    limit = norms[0].item() / 2
    for step, (expected_loss, expected_norm) in enumerate(zip(losses, norms, strict=True)):
        ours.zero_grad()
        loss = global_backward(model, batch[:1], batch[1], context, DropoutSeed(1, step))
        difference("loss", expected_loss.new_tensor(loss), expected_loss)
        norm = clip_gradients(model, context, limit)
        difference("global norm", expected_norm.new_tensor(norm), expected_norm)
        ours.step()
    check_pad(context, model.token_embedding.weight)
    worst = worst_difference(gather_whole(model), whole)
    for name, parameter in model.named_parameters():
        if all(cut.parts == 1 for cut in shard_spec(parameter).cuts):
            assert apart(parameter, context) == 0, f"the replicas of {name} drifted"
    layout = f"tp {context.tp.size} x dp {context.dp.size}, {len(losses)} x {optimizer.__name__}"
    layout += ", sequence-parallel" * context.tp.sequence_parallel
    say(f"{layout}: norm {norm:.4f} to {limit:.4f}, max weight diff {worst:.1e}")


def main() -> None:
    context = init_tensor_parallel()
    say(f"world_size: {context.world_size}")
    rows = ("31415926", "27182818", "14142135", "16180339")
    input_ids = torch.tensor([[15 * int(t) for t in row] for row in rows], device=context.device)
    labels = input_ids.roll(-1, dims=1)
    ends = torch.tensor([[8], [4], [1], [2]], device=context.device)
    labels = labels.masked_fill(torch.arange(8, device=context.device) >= ends, IGNORED)
    sequence = init_parallel(ParallelConfig(context.tp.size, sequence_parallel=True))
    mask = torch.ones_like(input_ids)
    mask[1, 0] = mask[1, 5:] = 0
    inputs = (input_ids, mask, labels)
    for dropout in (0.0, 0.1):
        naive = naive_model(context, inputs, dropout)
        for ranks in (context, sequence):
            say(f"dropout {dropout}, sequence-parallel {ranks.tp.sequence_parallel}")
            check_model(ranks, inputs, dropout, naive)
    check_pair(sequence)
    for divided, dropout in product((False, True), (0.0, 0.1)):
        check_recompute(ParallelConfig(sequence_parallel=divided), input_ids, dropout)
    check_dropout(context)
    check_loading(context)
    runs = ((torch.optim.SGD, 2), (torch.optim.AdamW, 3))
    dense = [dense_updates(context, input_ids, labels, *run) for run in runs]
    world = context.world_size  # 4 rows can be shared by up to 4 data-parallel ranks
    sizes = [n for n in (1, 2, 4, 8) if world % n == 0 and 4 * n % world == 0]
    for tp_size, divided in [(n, d) for n in sizes for d in (False, True) if n > 1 or not d]:
        mesh = init_parallel(ParallelConfig(tp_size, sequence_parallel=divided))
        check_mesh(mesh, input_ids)
        for (optimizer, _), expected in zip(runs, dense, strict=True):
            check_updates(mesh, input_ids, labels, optimizer, expected)
    for gather, stride in ((False, 1), (True, 1), (False, 3), (True, 3)):
        say(f"column-parallel, gather_output={gather}, stride={stride}")
        layer = ColumnParallelLinear(IN, OUT, True, gather, stride, tp=context.tp)
        check_layer(context, layer, cut_input=False, cut_output=not gather, stride=stride)
        check_initial_weights(context, layer)
    for parallel in (True, False):
        say(f"row-parallel, input_is_parallel={parallel}")
        layer = RowParallelLinear(IN, OUT, input_is_parallel=parallel, tp=context.tp)
        check_layer(context, layer, cut_input=parallel, cut_output=False)
        check_initial_weights(context, layer)
    say(f"vocabulary-parallel embedding, {V} ids padded to {PADDED}")
    check_embedding(context)
    say("vocabulary-parallel loss")
    for scale in (1.0, 1e4):
        check_loss(context, scale)
    check_ring(context)
    end_parallel()


if __name__ == "__main__":
    run(main)

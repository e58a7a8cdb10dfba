"""The model and its layers against dense code: logits, loss, every gradient, three updates.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_forward_tp.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import train as trainer
import vocab_parallel
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
from precision import autocast_for
from sharding import draw_whole, gather_whole, init_weights, load_whole, shard_spec
from tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from train import global_backward, own_rows, reduce_gradients
from vocab_parallel import VocabParallelEmbedding

from data import MarkovCorpus

IN, OUT = 24, 48
UPDATES_DROPOUT = 0.2
UPSTREAM = -1.7
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


def check_loss(context: ParallelContext, scale: float, chunk: int) -> None:
    """Mean, losses and both gradients against F.cross_entropy; the bytes are counted.

    24 tokens, `chunk` at a time; eight labels in a row count for nothing.
    """
    tp = context.tp
    table = VocabParallelEmbedding(V, IN, tp=tp, init_std=1.0).to(context.device, torch.float64)
    rows = len(table.weight)
    x, weight = random(context, 3, 8, IN, seed=6), scale * random(context, V, IN, seed=7)
    labels = (torch.arange(24, device=context.device) * 46 % V).view(3, 8)
    labels[0, 0], labels[0, 1], labels[1] = V - 1, 63, IGNORED
    # The pad rows are zero in the model. They must not count, so here they are large.
    padded = torch.cat([weight, weight.new_full((PADDED - V, IN), 9 * scale)])
    table.weight.data.copy_(own_slice(padded, tp, 0))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    logits = (leaves[0] @ leaves[1].T).transpose(1, 2)
    dense = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    dense_mean = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    (UPSTREAM * dense_mean).backward()
    own = (own_slice(x, tp, 1) if tp.sequence_parallel else x).requires_grad_()
    tp.ledger.clear()
    with mock.patch.dict(vocab_parallel.CHUNK_BYTES, {context.device.type: chunk * rows * 8}):
        mean, losses = table.loss(own, labels)
    (UPSTREAM * mean).backward()
    entries = tp.ledger.entries.items()
    moved = {f"{op} {phase}": (t.calls, t.payload_bytes) for (op, phase), t in entries}
    forward = max(difference("mean", mean, dense_mean), difference("losses", losses, dense))
    x_gradient = all_gather(own.grad, tp, "checkpoint", 1) if tp.sequence_parallel else own.grad
    backward = difference("gradient of the input", x_gradient, leaves[0].grad)
    gradient = all_gather(table.weight.grad, tp, "checkpoint", 0)
    difference("gradient of the head", gradient[:V], leaves[1].grad)
    assert gradient[V:].eq(0).all(), "the pad has a gradient"
    how = f"sequence-parallel {tp.sequence_parallel}, {chunk} of 24 tokens at a time"
    say(f"  logits of {scale:g}, {how}:")
    say(f"  max diff vs rank0: {apart(losses, context):.1e}")
    say(f"  max diff vs dense: {forward:.1e}\n  max grad diff vs dense: {backward:.1e}")
    if tp.size > 1:
        few, own_sum = 3 * 24 * 8, (1, x.numel() * 8)
        assert moved["all_reduce forward"] == (2 * -(-24 // chunk), few), moved
        summed = "reduce_scatter" if tp.sequence_parallel else "all_reduce"
        assert moved[f"{summed} backward"] == own_sum, moved
        say(f"  {moved}; gathered logits would be {24 * PADDED * 8}")
    for wrong in (-1, V, PADDED):
        try:
            table.loss(own, labels.clone().fill_(wrong))
        except ValueError as error:
            assert str(error).startswith(f"token id {wrong} is not in"), error
        else:
            raise AssertionError(f"no error for label {wrong}")


class Peak(TorchDispatchMode):
    """The most bytes alive at once of tensors that were made while it is on."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(
        self, operation: object, _: object, inputs: tuple = (), named: dict | None = None
    ) -> object:
        result = operation(*inputs, **(named or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.made.values()))
        return result


def check_memory(context: ParallelContext) -> None:
    """At GPT-2's vocabulary: the whole logits' way by torch's functions, and ours in chunks."""
    tp, n, d = context.tp, 512, 32
    table = VocabParallelEmbedding(50257, d, tp=tp, init_std=0.02).to(context.device)
    init_weights(table, seed=1)
    rows, x = len(table.weight), random(context, 1, n, d, seed=9).float()
    labels = torch.arange(n, device=context.device)[None]
    local = labels % rows  # the whole way is on this rank alone
    ways = {
        "whole": lambda: F.cross_entropy(F.linear(x, table.weight)[0], local[0]),
        "in chunks": lambda: table.loss(x, labels)[0],
    }
    peaks = {}
    for name, loss in ways.items():
        x, table.weight.grad = x.detach().requires_grad_(), None
        with Peak(x, table.weight, labels, local) as peak:
            loss().backward()
        peaks[name] = peak.bytes
    chunk = min(vocab_parallel.rows_of_a_chunk(rows, 4, context.device.type), n)
    say(f"{rows} of 50304 rows, {n} tokens, {chunk} at a time: bytes at the peak {peaks}")
    largest = 4 * (n * d + rows * d + chunk * rows)  # both gradients, and a chunk of logits
    if chunk * rows > n * d and context.device.type == "cpu":
        assert 0 <= peaks["in chunks"] - largest < 60 * n, (peaks, largest)


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
    expected = {"all_reduce forward": 2}  # the loss: the maximum; two sums together
    if context.tp.sequence_parallel:  # an all-reduce is a reduce-scatter and an all-gather
        pairs = [f"{op} {phase}" for op in ("reduce_scatter", "all_gather") for phase in PHASES]
        expected |= dict.fromkeys(pairs, sums)
        # The inputs, once more, but not the head's: its gradients are made already.
        expected["all_gather backward"] += (sums - 1) * context.tp.overlap
    else:
        expected |= {"all_reduce forward": sums + 2, "all_reduce backward": sums}
    assert calls == (expected if context.tp.size > 1 else {}), calls
    expected_payload = input_ids.numel() * (sum(expected.values()) - 2) * model.config.d_model
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
    """A block's ring traffic is that of the all-reduces, and what it saves of the whole sequence.

    With overlap nothing: its two inputs are gathered again, half as much traffic as a sum.
    """
    x, config = random(context, 2, 8, 24, seed=8), random_model(context)[0].config
    layouts = product((False, True), (False, True))
    found = {
        how: run_block(config, replace(context.tp, sequence_parallel=how[0], overlap=how[1]), x)
        for how in layouts
    }
    for (divided, overlap), (ring, whole) in found.items():
        say(
            f"a block, sequence-parallel {divided}, overlap {overlap}: ring traffic {ring} elements"
        )
        say(f"  x (n-1) / n a rank; whole (B, T, D) tensors saved: {whole}")
    sums = 4 * 2 * x.numel()
    expected = {(False, False): (sums, 4), (True, False): (sums, 2)}
    expected |= {(False, True): (sums, 4), (True, True): (sums + 2 * x.numel(), 0)}
    assert found == (expected if context.tp.size > 1 else dict.fromkeys(found, (0, 4))), found


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
        logits = model.output_head.logits(model.hidden(input_ids, None, DropoutSeed(1, 2)))
        loss = logits.square().sum()  # not the model's, which scales its gradients but once
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
    inputs = own if tp.overlap else whole
    block = 2 * own * (D + 2) + 2 * inputs * D + cut * (4 * H * K + 2 * F) + attention
    block += 2 * own * D // 8 if dropout else 0
    layers, sizes = config.n_layers, {mode: size for mode, (size, _) in results.items()}
    if context.device.type == "cpu":  # another kernel keeps other things
        assert sizes["none"] - sizes["attention"] == layers * attention, sizes
        assert sizes["none"] - sizes["block"] == layers * (block - own * D), sizes
    sums = layers * (2 if dropout else 1)  # without dropout, backward needs no last sum
    sequence = {"all_gather": 2 * layers, "reduce_scatter": sums}
    expected = sequence if tp.sequence_parallel else {"all_reduce": sums}
    assert results["block"][1] == (expected if tp.size > 1 else {}), results
    say(f"dropout {dropout}, sequence-parallel {tp.sequence_parallel}, overlap {tp.overlap}:")
    say(f"  bytes kept {sizes}")
    say(f"  again: {results['block'][1]}; gradients: bitwise the same")


def check_short_products(context: ParallelContext) -> None:
    """60 steps in bf16 stay near those in fp32; weights and gradients are fp32, products bf16."""
    corpus = MarkovCorpus()
    config = GPTConfig(vocab_size=corpus.alphabet)
    curves = [
        torch.tensor(trainer.train(config, corpus, 60, context, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    difference = (curves[0] - curves[1]).abs()
    say(f"60 steps in bf16: every loss within {difference[:-1].max():.4f} of fp32's")
    say(f"  validation loss {curves[1][-1]:.4f}, fp32 {curves[0][-1]:.4f}")
    assert 0 < difference[:-1].max() < 0.02 and difference[-1] < 0.003, difference

    model = GPTModel(config, context)
    init_weights(model, seed=1)
    inputs, labels = (t.to(context.device) for t in corpus.batch(0, 4, 32))
    for _ in range(2):
        context.tp.ledger.clear()
        autocast = autocast_for(torch.bfloat16, context.device)
        global_backward(model, (inputs,), labels, context, autocast=autocast)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    moved = {phase: t.payload_bytes for (op, phase), t in context.tp.ledger.entries.items()}
    x, products = inputs.numel() * config.d_model, 2 * config.n_layers
    # In fp32: the embedding's sum, three numbers a token in the loss.
    expected = {"forward": 2 * products * x + 4 * x + 3 * 4 * inputs.numel()}
    expected |= {"backward": 2 * (products + 1) * x, "optimizer": 8}
    assert moved == (expected if context.tp.size > 1 else {}), (moved, expected)


def check_overlap(context: ParallelContext) -> None:
    """Gradients are bitwise the same in every dtype; a trace shows sums and products together."""
    config = GPTConfig(vocab_size=V, context_length=64, n_heads=8, d_model=96)
    ids = torch.arange(128, device=context.device).view(2, 64)
    for dtype, divided in product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        gradients = []
        for overlap in (False, True):
            tp = replace(context.tp, sequence_parallel=divided, overlap=overlap)
            model = GPTModel(config, replace(context, tp=tp))
            model.to(torch.float64 if dtype == torch.float64 else torch.float32)
            init_weights(model, seed=1)
            with autocast_for(dtype, context.device)():
                _, loss = model(ids, labels=ids, return_logits=False)
            loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *gradients)), (dtype, divided)
    say("overlap on and off: gradients bitwise the same in float64, float32 and bfloat16")
    if context.tp.size > 1 and context.device.type == "cpu":
        for divided, overlap in product((False, True), (False, True)):
            tp = replace(context.tp, sequence_parallel=divided, overlap=overlap)
            # A busy machine may have done with a sum before the product begins: three chances.
            together = set().union(*(in_flight_together(tp) for _ in range(3)))
            say(f"  sequence-parallel {divided}, overlap {overlap}: products run during {together}")
            # gloo makes its reduce-scatter of an all-reduce.
            sums = {"all_reduce", "all_gather"} if divided else {"all_reduce"}
            assert together == (sums if overlap else set()), together


def in_flight_together(tp: Axis) -> set[str]:
    """The collectives during which, a trace of a layer's backward pass says, products were run."""
    layer = ColumnParallelLinear(512, 512, tp=tp)
    init_weights(layer, seed=1)
    tokens = 512 // tp.size if tp.sequence_parallel else 512
    y = layer(torch.ones(8, tokens, 512, requires_grad=True))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        y.sum().backward()
    spans = {name: [] for name in ("gloo:", "aten::mm")}
    for event in trace.events():
        for name, found in spans.items():
            if event.name.startswith(name):
                found.append((event.time_range.start, event.time_range.end, event.name))
    return {
        name.removeprefix("gloo:")
        for start, end, name in spans["gloo:"]
        if any(start < mm_end and mm_start < end for mm_start, mm_end, _ in spans["aten::mm"])
    }


def check_skipping(context: ParallelContext, input_ids: Tensor, labels: Tensor) -> None:
    """A gradient with nan on the last rank: nobody updates, everybody knows rank and parameter."""
    real, step, name = trainer.init_weights, 0, "blocks.1.feed_forward.dense_h_to_4h.weight"
    optimizers: list[torch.optim.AdamW] = []
    seen: list[list[Tensor]] = []

    class Watched(torch.optim.AdamW):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            optimizers.append(self)

    def poison(parameter: Tensor) -> None:
        nonlocal step
        step += 1
        held = [*optimizers[-1].state.values(), dict(enumerate(whole))]
        seen.append([t.detach().clone() for tensors in held for t in tensors.values()])
        if step == 3 and context.rank == context.world_size - 1:
            parameter.grad.view(-1)[-1] = math.inf

    def init_and_watch(model: nn.Module, seed: int) -> None:
        real(model, seed)
        whole[:] = model.parameters()
        assert all(parameter.dtype == torch.float32 for parameter in whole), "masters"
        dict(model.named_parameters())[name].register_post_accumulate_grad_hook(poison)

    whole: list[Tensor] = []
    says = f"rank {context.world_size - 1} has nan or inf in a gradient: {name}"
    corpus = MarkovCorpus()
    config = GPTConfig(vocab_size=corpus.alphabet)
    with (
        mock.patch.object(trainer, "init_weights", init_and_watch),
        mock.patch.object(torch.optim, "AdamW", Watched),
    ):
        losses = trainer.train(config, corpus, 4, context, torch.bfloat16, max_skipped=1)
        assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False], losses
        assert not all(map(torch.equal, seen[1], seen[2])), "step 2 changed nothing"
        assert all(map(torch.equal, seen[2], seen[3])), "the skipped step changed something"
        step = 0
        try:
            trainer.train(config, corpus, 4, context)
        except ConfigError as error:
            assert str(error) == f"steps skipped: 1, max_skipped=0; {says}", error
        else:
            raise AssertionError("a skipped step with max_skipped=0 did not stop")
    model, _ = random_model(context)
    model.final_norm.weight.data[0] = math.nan
    try:
        global_backward(model, (input_ids,), labels, context)
    except ConfigError as error:
        assert str(error).startswith("the loss is nan"), error
    else:
        raise AssertionError("a loss of nan did not stop")


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
        for ranks, overlap in product((context, sequence), (False, True)):
            divided = ranks.tp.sequence_parallel
            say(f"dropout {dropout}, sequence-parallel {divided}, overlap {overlap}")
            ranks = replace(ranks, tp=replace(ranks.tp, overlap=overlap))
            check_model(ranks, inputs, dropout, naive)
    check_skipping(init_parallel(ParallelConfig(tp_size=1)), input_ids, labels)
    check_short_products(context)
    check_overlap(context)
    check_pair(sequence)
    for divided, overlap, dropout in product((False, True), (False, True), (0.0, 0.1)):
        parallel = ParallelConfig(sequence_parallel=divided, overlap=overlap)
        check_recompute(parallel, input_ids, dropout)
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
    for ranks, (scale, chunk) in product((context, sequence), ((1.0, 24), (1.0, 7), (1e4, 7))):
        check_loss(ranks, scale, chunk)
    check_memory(context)
    check_ring(context)
    end_parallel()


if __name__ == "__main__":
    run(main)

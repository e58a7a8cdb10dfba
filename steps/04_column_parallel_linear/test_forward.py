"""Averaged gradients against one process with the whole batch, and against DDP; earlier claims too.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_forward.py
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from comm import all_reduce, broadcast_
from config import IGNORED, ConfigError, GPTConfig
from environment import run, say
from model import GPTModel, init_weights
from oracle import difference, naive_loss, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from train import global_backward, own_rows, train

from data import MarkovCorpus, shifted


def random_model(config: GPTConfig) -> GPTModel:
    """In float64, with biases that are not zero and norms that are not one."""
    model = GPTModel(config).double()
    init_weights(model, seed=1)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def check_model(
    config: GPTConfig, input_ids: Tensor, mask: Tensor, context: ParallelContext
) -> GPTModel:
    """Logits, loss and every gradient, with padding at both ends of a row."""
    model = random_model(config).to(context.device)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    logits, loss = model(input_ids, mask, labels)
    loss.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    naive, naive_mean = naive_loss(weights, config, input_ids, mask, labels)
    naive_mean.backward()

    say(f"world_size: {context.dp.size}")
    rank0 = broadcast_(logits.detach().clone(), context.dp, "forward")
    apart = all_reduce((logits - rank0).abs().max(), context.dp, "forward", dist.ReduceOp.MAX)
    say(f"max diff vs rank0: {apart.item():.1e}")
    assert apart == 0
    say(f"input_ids shape: {tuple(input_ids.shape)}\nlogits shape: {tuple(logits.shape)}")
    say(f"loss: {loss.item():.6f}")
    ours = logits[mask.bool()]
    say(f"max diff vs dense: {difference('logits', ours, torch.cat(naive)):.1e}")
    difference("loss", loss, naive_mean)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    worst = worst_difference(gradients, {n: w.grad for n, w in weights.items()})
    say(f"max grad diff vs dense: {worst:.1e}")
    return model


def check_causality(model: GPTModel, input_ids: Tensor) -> None:
    say("logits that move when token k changes (rows: k, columns: position)")
    before = model(input_ids[:1])[0]
    for k in range(input_ids.shape[1]):
        changed = input_ids[:1].clone()
        changed[0, k] = (changed[0, k] + 1) % model.config.vocab_size
        moved = (model(changed)[0] != before).any(-1)[0].tolist()
        say("  " + " ".join("x" if m else "." for m in moved))
        assert moved == [t >= k for t in range(len(moved))], f"token {k}"


def check_data_parallel(config: GPTConfig, input_ids: Tensor, context: ParallelContext) -> None:
    """Rows with 7, 1, 3 and 2 labels, so that a mean of the ranks' means is not the mean."""
    labels = input_ids.roll(-1, dims=1)
    ends = torch.tensor([[7], [1], [3], [2]], device=context.device)
    labels = labels.masked_fill(torch.arange(7, device=context.device) >= ends, IGNORED)
    whole, ours = (random_model(config).to(context.device) for _ in range(2))
    _, whole_loss = whole(input_ids, labels=labels)
    whole_loss.backward()

    own_ids, own_labels = own_rows((input_ids, labels), context)
    loss = global_backward(ours, own_ids, own_labels, context.dp)
    difference("loss", whole_loss.new_tensor(loss), whole_loss)
    expected = {name: p.grad for name, p in whole.named_parameters()}
    models = {"by hand": ours}
    if context.dp.size > 1:  # DDP means gradients over the ranks, so the share is of the mean
        ddp = DistributedDataParallel(random_model(config).to(context.device))
        _, own_loss = ddp(own_ids, labels=own_labels)
        share = (own_labels != IGNORED).sum() / (labels != IGNORED).sum().double()
        (own_loss * share * context.dp.size).backward()
        models["DDP"] = ddp.module
    for what, model in models.items():
        worst = worst_difference({n: p.grad for n, p in model.named_parameters()}, expected)
        say(f"max grad diff vs one process, {what}: {worst:.1e}")
    means = all_reduce(ours(own_ids, labels=own_labels)[1], context.dp, "forward")
    say(f"loss {loss:.6f}, mean of the ranks' means {means.item() / context.dp.size:.6f}")


def check_training(context: ParallelContext) -> None:
    assert [t.tolist() for t in shifted(torch.tensor([[5, 6, 7]]))] == [[[5, 6]], [[6, 7]]]
    corpus = MarkovCorpus()
    losses = train(GPTConfig(vocab_size=corpus.alphabet), corpus, 100, context)
    above = losses[-1] - corpus.floor
    say(f"first loss {losses[0]:.4f}, val loss {losses[-1]:.4f}, {above:.4f} above the floor")
    assert abs(losses[0] - math.log(corpus.alphabet)) < 0.1, f"first loss is {losses[0]:.4f}"
    # The floor is the chain's own loss on these very tokens; a model may be lucky on a few.
    assert -0.01 < above < 0.05, f"val loss is {above:.4f} above the floor"


def main() -> None:
    context = init_parallel(tp_size=1)
    if 4 % context.dp.size:
        raise ConfigError(f"{context.dp.size} ranks cannot share 4 rows; start 1, 2 or 4")
    config = GPTConfig(vocab_size=11, context_length=8, n_heads=4, d_model=24, d_head=5, d_ff=40)
    rows = ("3141592", "2718281", "1414213", "1618033")
    input_ids = torch.tensor([list(map(int, row)) for row in rows], device=context.device)
    mask = torch.ones_like(input_ids)
    mask[1, 0] = mask[1, 5:] = 0
    check_causality(check_model(config, input_ids, mask, context), input_ids)
    check_data_parallel(config, input_ids, context)
    check_training(context)
    end_parallel()


if __name__ == "__main__":
    run(main)

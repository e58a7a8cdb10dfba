"""An encoder-decoder learns to reverse a line; the ranks share one model and the same batch.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 train.py
"""

from __future__ import annotations

import torch
from comm import all_reduce, all_reduce_
from config import IGNORED, GPTConfig
from encoder_decoder import EncoderDecoderModel
from environment import Flags, count, run, say, world_from_environment
from parallel_context import ParallelContext, end_parallel, init_tensor_parallel
from tensor_parallel import init_weights, shard_spec
from torch import Tensor, nn
from tqdm import tqdm

from data import BEGIN, LETTERS, LONGEST, lines

ROWS = 64  # of the global batch: the work of a step does not depend on the number of ranks
LR = 6e-3


def global_backward(
    model: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor, context: ParallelContext
) -> float:
    """Leaves the global batch's gradient in .grad and returns its mean loss, in nats.

    inputs, labels: this rank's rows. Every token of the global batch weighs the same, so a rank's
    mean counts by its share of the tokens, and gradients are summed.
    """
    own = (labels != IGNORED).sum().double()
    share = own / all_reduce(own, context.dp, "forward").clamp(min=1)
    _, loss = model(*inputs, labels=labels, return_logits=False)
    weighted = loss * share.to(loss.dtype)
    weighted.backward()
    for axis in context.axes:
        specs = {p: shard_spec(p) for p in model.parameters()}
        partial = [p.grad for p, spec in specs.items() if axis.name in spec.partial_over]
        if axis.size > 1 and partial:
            flat = torch.cat([gradient.flatten() for gradient in partial])
            parts = all_reduce_(flat, axis, "backward").split([g.numel() for g in partial])
            for gradient, summed in zip(partial, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))
    return all_reduce(weighted, context.dp, "forward").item()


def train(
    config: GPTConfig, steps: int, context: ParallelContext, dtype: torch.dtype = torch.float32
) -> tuple[EncoderDecoderModel, list[float]]:
    """The trained model and the loss of each step, in nats."""
    model = EncoderDecoderModel(config, context).to(dtype)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * shard_spec(p).decay} for p in model.parameters()],
        lr=LR,
    )
    losses = []
    bar = tqdm(range(steps), unit="step", leave=False, disable=context.rank > 0)
    for step in bar:
        *inputs, labels = (t.to(context.device) for t in lines(step, ROWS))
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / 20, (1 - step / steps))
        optimizer.zero_grad()
        losses.append(global_backward(model, inputs, labels, context))
        optimizer.step()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}")
    return model, losses


@torch.no_grad()
def exact_match(model: EncoderDecoderModel, context: ParallelContext, rows: int = 200) -> float:
    """The share of held-out lines written without a mistake, their end included, token by token."""
    source, _, mask, _, labels = (t.to(context.device) for t in lines(0, rows, held_out=True))
    written = torch.full_like(source[:, :1], BEGIN)
    for _ in range(labels.shape[1]):
        logits, _ = model(source, written, mask, torch.ones_like(written))
        written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    return ((written[:, 1:] == labels) | (labels == IGNORED)).all(1).double().mean().item()


@torch.no_grad()
def attention_map(model: EncoderDecoderModel, context: ParallelContext) -> str:
    """How much each token of a held-out line (a row) looks at each letter: 0 to 9, all heads."""
    source, target, mask, ahead, _ = (t.to(context.device) for t in lines(0, 1, held_out=True))
    attention, seen = model.decoder[-1].cross_attention, []
    for layer in (attention.query, attention.key_value):
        layer.register_forward_hook(lambda layer, x, y: seen.append(y[0]))
    model(source, target, mask, ahead)
    letters, width = int(mask.sum()), seen[0].shape[-1]  # the key is the first half
    query, key = (y[:letters, :width].unflatten(-1, (-1, attention.head_width)) for y in seen)
    scores = torch.einsum("thk,shk->hts", query, key) / attention.head_width**0.5
    shares = all_reduce(scores.softmax(-1).sum(0), context.tp, "forward") / model.config.n_heads
    return "\n".join(" ".join(str(int(share * 9.99)) for share in row) for row in shares.tolist())


def main() -> None:
    parser = Flags()
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags = parser.parse_args()
    config = GPTConfig(vocab_size=3 + LETTERS, context_length=LONGEST + 1)
    config.check(world_from_environment()[1])
    context = init_tensor_parallel(device=flags.device)
    say(f"{context.tp.size} tensor-parallel ranks: one model for all, the same {ROWS} rows")
    untrained, _ = train(config, 0, context, getattr(torch, flags.dtype))
    say(attention_map(untrained, context))
    model, losses = train(config, flags.steps, context, getattr(torch, flags.dtype))
    for step in sorted({0, flags.steps // 4, flags.steps // 2, flags.steps - 1}):
        say(f"step {step + 1:4d}/{flags.steps}  loss {losses[step]:.8f}")
    say(f"held-out lines reversed without a mistake: {exact_match(model, context):.1%}")
    say(attention_map(model, context))
    end_parallel()


if __name__ == "__main__":
    run(main)

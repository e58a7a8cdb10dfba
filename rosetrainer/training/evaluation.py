"""The loss on the validation text, each token once, and its distance from a known floor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rosetrainer.config import IGNORED, TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.data.markov import leak_report, mean_and_error
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.precision import Autocast
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.pipeline.runner import last_hidden


@torch.no_grad()
def evaluate(
    config: TrainConfig,
    corpus: Corpus,
    model: GPTModel,
    context: ParallelContext,
    autocast: Autocast,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], str] | None:
    """Figures by TensorBoard tag, and a remark where the corpus's floor is known.

    should_stop is called before each batch, and returns the same on all ranks; None if it is true.
    """
    dp = context.dp
    split = (config.evaluation.eval_tokens, config.optim.micro_batch(dp.size), dp.rank, dp.size)
    sums = torch.zeros(4, dtype=torch.float64)  # labels, loss, loss - floor, its square
    for inputs, labels, floors, *more in corpus.val_batches(*split):
        if should_stop():
            return None
        target = torch.from_numpy(labels)
        ids, *others = (torch.from_numpy(a).to(context.device) for a in (inputs, *more))
        with autocast():
            x = last_hidden(model, ids, *others, context=context)
            if x is None:
                continue  # the last stage's ranks know the losses
            _, losses = model.output_head.loss(x, target.to(context.device))
        losses = losses.flatten().to("cpu", torch.float64)  # 0 where there is no label
        above = losses - torch.from_numpy(floors).flatten()
        count = (target != IGNORED).sum().double()
        sums += torch.stack([count, losses.sum(), above.sum(), above.square().sum()])
    sums = all_reduce(sums.to(context.device), dp, "evaluation")
    count, loss, above, square = all_reduce(sums, context.pp, "evaluation").tolist()
    figures = {"val/loss": loss / count}
    if corpus.meta.bytes_per_token:  # what texts cut by different tokenizers have in common
        figures["val/bits_per_byte"] = loss / count / math.log(2) / corpus.meta.bytes_per_token
    if not corpus.has_floor:
        return figures, ""
    mean, error = mean_and_error(int(count), above, square)
    figures["val/above_floor"] = mean
    leak = leak_report(mean, error)
    remark = f"  {mean:.4f} nats above the floor" + (f"\nwarning: {leak}" if leak else "")
    return figures, remark

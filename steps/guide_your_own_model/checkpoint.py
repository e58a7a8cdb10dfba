"""Trains on 4 ranks, saves whole weights, and reads them in other layouts and in the dense model.

PYTHONPATH=../.. python checkpoint.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from dense import Speech as DenseSpeech
from dense import SpeechConfig
from model import Speech
from parity import RANKS, example
from safetensors.torch import load_file
from torch import nn

from rosetrainer.checkpoint.safetensors_file import Entry, write_safetensors
from rosetrainer.environment import is_rank
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_tensor_parallel
from rosetrainer.parallel.sharding import load_whole, shard_spec
from rosetrainer.proof.module import of_size

FILE = Path("speech.safetensors")


def save(model: nn.Module, path: Path, context: ParallelContext) -> None:
    """Whole weights under the dense model's names. All ranks gather, a tensor at a time."""
    parameters = dict(model.named_parameters())
    specs = {name: shard_spec(p) for name, p in parameters.items()}
    entries = [Entry(name, specs[name].dense_shape, p.dtype) for name, p in parameters.items()]
    whole = (specs[name].unshard(p.detach(), "checkpoint") for name, p in parameters.items())
    if context.rank == 0:
        write_safetensors(path, entries, whole, {})
    else:
        for _ in whole:
            pass
    all_reduce(torch.zeros(1), context.tp, "checkpoint")  # nobody reads before it is written


def train(model: nn.Module, inputs: list[torch.Tensor], context: ParallelContext) -> None:
    groups = [
        {"params": [p], "weight_decay": 0.1 * shard_spec(p).decay} for p in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(20):
        _, loss = model(*inputs)
        loss.backward()
        clip_gradients(model, context, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> int:
    context, config = init_tensor_parallel(device="cpu"), SpeechConfig()
    torch.manual_seed(0)
    dense, inputs = DenseSpeech(config), example(config)
    model = Speech(config, context.tp)
    load_whole(model, dict(dense.named_parameters()))
    lines = [f"before, dense:  loss {dense(*inputs)[1]:.5f}"]
    train(model, inputs, context)
    lines.append(f"trained, tp {context.tp.size}:  loss {model(*inputs)[1]:.5f}")
    save(model, FILE, context)
    weights = load_file(FILE)
    for part in (of_size(size, context) for size in (1, 2)):
        other = Speech(config, part.tp)
        load_whole(other, weights)
        lines.append(f"read, tp {part.tp.size}:     loss {other(*inputs)[1]:.5f}")
    dense.load_state_dict(weights)
    lines.append(f"read, dense:    loss {dense(*inputs)[1]:.5f}")
    if context.rank == 0:
        print("\n".join(lines))
    end_parallel()
    return 0


if __name__ == "__main__":
    if is_rank():
        run_rank(main)
    sys.exit(launch(RANKS, sys.argv[1:], module="checkpoint"))

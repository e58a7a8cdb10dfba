"""Is the model of model.py, on 1, 2 and 4 ranks, that of dense.py?

PYTHONPATH=../.. python parity.py
PYTHONPATH names the repository's root; where the package is installed it is not needed.
"""

from __future__ import annotations

import sys

import torch
from dense import IGNORED, SpeechConfig
from dense import Speech as DenseSpeech
from model import Speech
from torch import Tensor

from rosetrainer.environment import is_rank
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import end_parallel, init_tensor_parallel
from rosetrainer.proof.module import prove_module

RANKS = 4


def example(config: SpeechConfig, rows: int = 3) -> list[Tensor]:
    """Frames, letters and labels; rows have unequally many labels."""
    frames = torch.randn(rows, config.frames, config.frame_width)
    letters, labels = torch.randint(config.vocab_size, (2, rows, config.letters))
    for row in range(rows):
        labels[row, config.letters - 2 * row :] = IGNORED
    return [frames, letters, labels]


def main() -> int:
    context, config = init_tensor_parallel(device="cpu"), SpeechConfig()
    torch.manual_seed(0)
    dense, inputs = DenseSpeech(config), example(config)
    prove_module(lambda part: Speech(config, part.tp), dense, inputs, context)
    end_parallel()
    return 0


if __name__ == "__main__":
    if is_rank():
        run_rank(main)
    sys.exit(launch(RANKS, sys.argv[1:], module="parity"))

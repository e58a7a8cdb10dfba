"""The model of dense.py, tensor-parallel: each rank holds a part of it and computes that part.

Shape letters: B batch, S frames, T letters, M numbers of a frame, D width, F width of the MLP,
H heads, K width of a head, V vocabulary; tp = tp.size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.parallel.comm import gather_from_tensor_parallel_region
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.replicated import mark_replicated
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding


@dataclass(frozen=True)
class SpeechConfig:
    frames: int = 20
    frame_width: int = 12
    letters: int = 9
    vocab_size: int = 50
    width: int = 32
    heads: int = 4
    layers: int = 2


class MLP(nn.Module):
    """(B, T, D) -> (B, T, D), over F = 4D features, F/tp on a rank."""

    def __init__(self, config: SpeechConfig, tp: Axis) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(config.width, 4 * config.width, tp=tp)
        self.fc2 = RowParallelLinear(4 * config.width, config.width, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # (B, T, F/tp) -> (B, T, D)    sum over tp


class SelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D), by H heads, H/tp on a rank."""

    def __init__(self, config: SpeechConfig, causal: bool, tp: Axis) -> None:
        super().__init__()
        self.head_width, self.causal = config.width // config.heads, causal
        self.qkv = ColumnParallelLinear(config.width, 3 * config.width, stride=3, tp=tp)
        self.out = RowParallelLinear(config.width, config.width, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).unflatten(-1, (3, -1, self.head_width))  # (B, T, 3, H/tp, K)
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, T, K)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


class CrossAttention(nn.Module):
    """Letters look at frames. (B, T, D), (B, S, D) -> (B, T, D), by H/tp heads on a rank."""

    def __init__(self, config: SpeechConfig, tp: Axis) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.query = ColumnParallelLinear(config.width, config.width, tp=tp)
        self.key_value = ColumnParallelLinear(config.width, 2 * config.width, stride=2, tp=tp)
        self.out = RowParallelLinear(config.width, config.width, tp=tp)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H/tp, T, K)
        fused = self.key_value(memory).unflatten(-1, (2, -1, self.head_width))  # (B, S, 2, H/tp, K)
        k, v = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, S, K)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Each part normed before and added after; only a decoder's looks at the frames."""

    def __init__(self, config: SpeechConfig, decoder: bool, tp: Axis) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, decoder, tp)
        if decoder:
            self.norm2, self.cross = nn.LayerNorm(config.width), CrossAttention(config, tp)
        self.norm3, self.mlp = nn.LayerNorm(config.width), MLP(config, tp)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class Speech(nn.Module):
    """An encoder of frames and a decoder of letters. Weights are empty: see load_whole."""

    def __init__(self, config: SpeechConfig, tp: Axis) -> None:
        super().__init__()
        self.tp, self.vocab_size = tp, config.vocab_size
        self.project = nn.Linear(config.frame_width, config.width)
        self.frame_positions = nn.Parameter(0.1 * torch.randn(config.frames, config.width))
        self.letter_positions = nn.Parameter(0.1 * torch.randn(config.letters, config.width))
        table = (config.vocab_size, config.width)
        self.embedding = VocabParallelEmbedding(*table, tp=tp, init_std=1.0)
        self.encoder = nn.ModuleList(Block(config, False, tp) for _ in range(config.layers))
        self.memory_norm = nn.LayerNorm(config.width)
        self.decoder = nn.ModuleList(Block(config, True, tp) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = VocabParallelEmbedding(*table, tp=tp, init_std=config.width**-0.5)
        mark_replicated(self)  # norms, positions, the first projection

    def forward(self, frames: Tensor, letters: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, M) frames, (B, T) letters and the letters that follow -> (B, T, V) logits, loss"""
        memory = self.project(frames) + self.frame_positions
        for block in self.encoder:
            memory = block(memory)
        memory = self.memory_norm(memory)
        x = self.embedding(letters) + self.letter_positions
        for block in self.decoder:
            x = block(x, memory)
        x = self.norm(x)
        loss, _ = self.head.loss(x, labels)  # from slices of the logits
        local = self.head.logits(x)  # (B, T, V/tp), and what the vocabulary is padded with
        logits = gather_from_tensor_parallel_region(local, self.tp)
        return logits[..., : self.vocab_size], loss

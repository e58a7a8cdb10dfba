"""An ordinary model that is no GPT: it hears frames of sound and writes letters, on one process.

Shape letters: B batch, S frames, T letters, M numbers of a frame, D width, F width of the MLP,
H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a label that counts for nothing


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
    """(B, T, D) -> (B, T, D), over F = 4D features."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D)"""

    def __init__(self, config: SpeechConfig, causal: bool) -> None:
        super().__init__()
        self.head_width, self.causal = config.width // config.heads, causal
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).unflatten(-1, (3, -1, self.head_width))  # (B, T, 3, H, K)
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H, T, K)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, H*K) -> (B, T, D)


class CrossAttention(nn.Module):
    """Letters look at frames. (B, T, D), (B, S, D) -> (B, T, D)"""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H, T, K)
        fused = self.key_value(memory).unflatten(-1, (2, -1, self.head_width))  # (B, S, 2, H, K)
        k, v = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H, S, K)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Each part normed before and added after; only a decoder's looks at the frames."""

    def __init__(self, config: SpeechConfig, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), SelfAttention(config, decoder)
        if decoder:
            self.norm2, self.cross = nn.LayerNorm(config.width), CrossAttention(config)
        self.norm3, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class Speech(nn.Module):
    """An encoder of frames and a decoder of letters."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.frame_width, config.width)
        self.frame_positions = nn.Parameter(0.1 * torch.randn(config.frames, config.width))
        self.letter_positions = nn.Parameter(0.1 * torch.randn(config.letters, config.width))
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = nn.ModuleList(Block(config, False) for _ in range(config.layers))
        self.memory_norm = nn.LayerNorm(config.width)
        self.decoder = nn.ModuleList(Block(config, True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, frames: Tensor, letters: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, M) frames, (B, T) letters and the letters that follow -> (B, T, V) logits, loss"""
        memory = self.project(frames) + self.frame_positions
        for block in self.encoder:
            memory = block(memory)
        memory = self.memory_norm(memory)
        x = self.embedding(letters) + self.letter_positions
        for block in self.decoder:
            x = block(x, memory)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

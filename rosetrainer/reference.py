"""The dense oracle: the same GPT in plain nn.Linear and F.*, one process, no layer of ours.

Slow and obvious on purpose. Its parameters have the names and shapes that gather_whole gives, so
load_state_dict takes them. Attention is written out; a padded row is computed by cutting the
padding off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig


class ReferenceAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.n_heads = config.n_heads
        self.query_key_value = nn.Linear(config.d_model, 3 * width, bias=config.bias)
        self.dense = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = self.query_key_value(x).chunk(3, dim=-1)
        outputs = []
        for head_q, head_k, head_v in zip(
            *(t.chunk(self.n_heads, dim=-1) for t in (q, k, v)), strict=True
        ):
            scores = head_q @ head_k.transpose(1, 2) / math.sqrt(head_q.shape[-1])  # (B, T, T)
            future = torch.triu(torch.ones(T, T, device=x.device), diagonal=1) > 0
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ head_v)
        return self.dense(torch.cat(outputs, dim=-1))


class ReferenceFeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.d_model, config.ff_width, bias=config.bias)
        self.dense_4h_to_h = nn.Linear(config.ff_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ReferenceBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = ReferenceAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.feed_forward = ReferenceFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ReferenceGPT(nn.Module):
    """What GPTModel must compute in every layout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(ReferenceBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        if not config.tied:
            self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tied = config.tied

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, T) without padding -> (B, T, V)"""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        head = self.token_embedding if self.tied else self.output_head
        return self.final_norm(x) @ head.weight.T

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, loss) as GPTModel.forward defines them; logits are 0 at padding."""
        rows, losses = [], []
        for row, ids in enumerate(input_ids):
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask[row]
            real = [t for t in range(len(ids)) if mask[t]]
            short = self.logits(ids[real][None])[0]  # (tokens, V)
            padded = short.new_zeros(len(ids), short.shape[1])
            rows.append(padded.index_copy(0, torch.tensor(real, device=ids.device), short))
            for t, log_probability in zip(real, short.log_softmax(-1), strict=True):
                padding_follows = t + 1 < len(ids) and not mask[t + 1]
                if labels is not None and labels[row, t] != -100 and not padding_follows:
                    losses.append(-log_probability[labels[row, t]])
        logits = torch.stack(rows)
        if labels is None:
            return logits, None
        return logits, torch.stack(losses).mean() if losses else logits.sum() * 0

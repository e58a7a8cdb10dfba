"""The dense oracle of the original GLM, after its paper, in plain modules and token by token.

"GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (Du et al.).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import Drop, ReferenceDropout, ReferenceFeedForward, ReferenceGPT
from rosetrainer.proof.reference_llama import PLAIN

NONE = ReferenceDropout()


class ReferencePrefixAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.head_width = config.n_heads, config.head_width
        width = self.n_heads * self.head_width
        self.query_key_value = nn.Linear(config.d_model, 3 * width, bias=config.bias)
        self.dense = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, prefix: int, drop: Drop) -> Tensor:
        """Each token looks at the first ones alone: those of part A, and no more for one of it."""
        T = x.shape[1]
        heads = [part.chunk(self.n_heads, dim=-1) for part in self.query_key_value(x).chunk(3, -1)]
        probabilities = []
        for query, key in zip(heads[0], heads[1], strict=True):
            scores = query[0] @ key[0].T / math.sqrt(self.head_width)
            rows = []
            for token in range(T):
                seen = prefix if token < prefix else token + 1
                rows.append(F.pad(scores[token, :seen].softmax(-1), (0, T - seen)))
            probabilities.append(torch.stack(rows)[None])  # (1, T, T)
        dropped = drop("dropout", torch.stack(probabilities, dim=1)).unbind(1)
        results = [p @ value for p, value in zip(dropped, heads[2], strict=True)]
        return self.dense(torch.cat(results, dim=-1))


class ReferenceGlmBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = ReferencePrefixAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.feed_forward = ReferenceFeedForward(config, PLAIN[config.activation or "gelu"])

    def forward(self, x: Tensor, prefix: int, drop: Drop) -> Tensor:
        def within(site: str, t: Tensor) -> Tensor:
            return drop(f"attention.{site}", t)

        attended = self.attention(self.attention_norm(x), prefix, within)
        x = x + drop("attention_dropout", attended)
        return x + drop("feed_forward_dropout", self.feed_forward(self.feed_forward_norm(x)))


class ReferenceGlm(ReferenceGPT):
    """What Glm must compute in every layout, where no row has padding."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.span_position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(ReferenceGlmBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.tied = config.tied
        if not config.tied:
            self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        positions: Tensor,
        span_positions: Tensor,
        labels: Tensor,
        dropout: ReferenceDropout = NONE,
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(logits, loss) as Glm.forward defines them; all (B, T). first_row: of the batch in the
        global batch, for dropout."""
        rows = []
        for row, ids in enumerate(input_ids):

            def drop(site: str, x: Tensor, number: int = first_row + row) -> Tensor:
                return dropout(site, x, number)

            x = self.token_embedding(ids) + self.position_embedding(positions[row])
            x = drop(
                "embedding_dropout", (x + self.span_position_embedding(span_positions[row]))[None]
            )
            prefix = int((span_positions[row] == 0).sum())
            for n, block in enumerate(self.blocks):
                x = block(x, prefix, lambda site, t, n=n: drop(f"blocks.{n}.{site}", t))
            head = self.token_embedding if self.tied else self.output_head
            rows.append(self.final_norm(x) @ head.weight.T)
        logits = torch.cat(rows)
        asked = labels != -100
        chosen = logits[asked].log_softmax(-1).gather(-1, labels[asked][:, None])
        return logits, -chosen.mean() if len(chosen) else logits.sum() * 0

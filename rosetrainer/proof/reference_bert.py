"""The dense oracle of BERT in plain modules, head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import Drop, ReferenceDropout, ReferenceFeedForward, ReferenceGPT
from rosetrainer.proof.reference_llama import PLAIN


def norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.norm_eps or 1e-12)


class ReferenceBidirectionalAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.head_width = config.n_heads, config.head_width
        width = self.n_heads * self.head_width
        self.query_key_value = nn.Linear(config.d_model, 3 * width)
        self.dense = nn.Linear(width, config.d_model)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        heads = [part.chunk(self.n_heads, dim=-1) for part in self.query_key_value(x).chunk(3, -1)]
        scores = [query @ key.mT for query, key in zip(heads[0], heads[1], strict=True)]
        exponents = torch.stack(scores, dim=1) / math.sqrt(self.head_width)
        weights = (exponents - exponents.amax(-1, keepdim=True)).exp()  # (1, H, T, T)
        dropped = drop("dropout", weights / weights.sum(-1, keepdim=True)).unbind(1)
        results = [p @ value for p, value in zip(dropped, heads[2], strict=True)]
        return self.dense(torch.cat(results, dim=-1))


class ReferencePostNormBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norm(config), norm(config)
        self.attention = ReferenceBidirectionalAttention(config)
        self.feed_forward = ReferenceFeedForward(config, PLAIN[config.activation or "gelu"])

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        attended = self.attention(x, lambda site, t: drop(f"attention.{site}", t))
        x = self.attention_norm(x + drop("attention_dropout", attended))
        return self.feed_forward_norm(x + drop("feed_forward_dropout", self.feed_forward(x)))


class ReferenceHead(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(config.d_model, config.d_model), norm(config)
        if not config.tied:
            self.table = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.formula = PLAIN[config.activation or "gelu"]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        rows = self.table.weight if hasattr(self, "table") else embedding
        return self.norm(self.formula(self.dense(x))) @ rows.T + self.bias


class ReferenceBert(ReferenceGPT):
    """What Bert must compute in every layout, where no row has padding."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.token_type_embedding = nn.Embedding(config.token_types, config.d_model)
        self.embedding_norm = norm(config)
        self.blocks = nn.ModuleList(ReferencePostNormBlock(config) for _ in range(config.n_layers))
        self.add_module("output_head", ReferenceHead(config))

    def logits(self, input_ids: Tensor, dropout: ReferenceDropout, row: int) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(places)
        x = self.embedding_norm(x + self.token_type_embedding.weight[0])
        x = dropout("embedding_dropout", x, row)
        for number, block in enumerate(self.blocks):
            x = block(x, lambda site, t, n=number: dropout(f"blocks.{n}.{site}", t, row))
        logits: Tensor = self.get_submodule("output_head")(x, self.token_embedding.weight)
        return logits

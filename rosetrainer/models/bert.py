"""BERT: an encoder that sees the whole text and fills in the tokens that are hidden in it.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (Devlin et al.).
What is not said here is as in gpt.py, the communication too.
Shape letters: B batch, T sequence, D d_model, V vocabulary; tp = tp.size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.models.attention import positions_of
from rosetrainer.models.gpt import GPTModel, LayerNorm, PositionEmbedding, TransformerBlock
from rosetrainer.models.layers import read_out
from rosetrainer.models.llama import ACTIVATIONS, PlainFeedForward
from rosetrainer.parallel.comm import first_token, own_tokens
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.sharding import new_parameter, replicated_parameter, shard_spec
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding


class PostNormBlock(TransformerBlock):
    """Attention and feed-forward, each added to the residual stream, which is normed after it."""

    feed_forward_class = PlainFeedForward

    def layers(self, x: Tensor, seed: Seed, *inputs: Any) -> Tensor:
        first = (first_token(x, self.tp),)
        attended = self.attention(x, *inputs, seed=seed)
        x = self.attention_norm(x + self.attention_dropout(attended, seed, first))
        fed = self.feed_forward(x)
        return self.feed_forward_norm(x + self.feed_forward_dropout(fed, seed, first))


def block_of(config: GPTConfig) -> type[TransformerBlock]:
    """The class of the block, with norms of the config's eps."""

    class Norm(LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, config.eps)

    class BertBlock(PostNormBlock):
        norm_class = Norm

    return BertBlock


class ReplicatedLinear(nn.Module):
    """Y = X Wᵀ + b, (.., D) -> (.., D), the whole of it on every rank: cut, it would move more than
    it computes."""

    def __init__(self, d_model: int, tp: Axis) -> None:
        super().__init__()
        weight = replicated_parameter((d_model, d_model), tp, init_std=1 / math.sqrt(d_model))
        self.weight = new_parameter(replace(shard_spec(weight), decay=True))
        self.bias = replicated_parameter((d_model,), tp)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class TransformedHead(VocabParallelEmbedding):
    """The output head: dense, activation and norm, then the table, and a bias for each token, which
    is cut as the table's rows are.

    To the products with the table the bias is one more column, for an input that is always 1.
    """

    def __init__(self, table: VocabParallelEmbedding, norm: nn.Module, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.vocab_size, self.tp, self.table = table.vocab_size, table.tp, table
        self.dense = ReplicatedLinear(config.d_model, table.tp)
        self.function, self.norm = ACTIVATIONS[config.function], norm
        rows = shard_spec(table.weight)
        of_bias = replace(rows, shape=rows.shape[:1], pad=rows.pad[:1], init_std=0.0, decay=False)
        self.bias = new_parameter(of_bias)  # (V/tp,)

    def extra_repr(self) -> str:
        return self.table.extra_repr()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(V/tp, D+1)"""
        return torch.cat([self.table.weight, self.bias[:, None]], dim=1)

    def transformed(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D+1); under sequence parallelism (B, T/tp, D) -> (B, T/tp, D+1)"""
        x = self.norm(self.function(self.dense(x)))
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.transformed(x))

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return super().loss(self.transformed(x), labels)


class Bert(GPTModel):
    """A bidirectional encoder: the sum of three embeddings, normed, then post-norm blocks."""

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__(config, context)
        norm, size = self.block_class.norm_class, (config.d_model, True, self.tp)
        with (context or ParallelContext()).device:
            self.token_type_embedding = PositionEmbedding(
                config.token_types, config.d_model, self.tp
            )
            self.embedding_norm = norm(*size)
            self.output_head = TransformedHead(self.output_head, norm(*size), config)
        self.final_norm = nn.Identity()  # the last block's norm is its own end

    @cached_property
    def block_class(self) -> type[TransformerBlock]:  # type: ignore[override]
        return block_of(self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
        seed: Seed = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As GPTModel.forward, but for labels: (B, T), the token that truly stands in each place,
        -100 where none is asked for; at padding they are ignored.

        token_types: (B, T), of which kind each token is; 0 unless given. Raises ValueError also
        for a row that is all padding.
        """
        x = self.hidden(input_ids, attention_mask, seed, token_types)
        return read_out(self, x, labels, attention_mask, return_logits)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        seed: Seed = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """What the output head reads. (B, T) -> (B, T, D), or (B, T/tp, D)"""
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        real = torch.ones_like(input_ids[:1]) if attention_mask is None else attention_mask
        if not real.any(dim=1).all():
            raise ValueError("a row holds no token, so there is nothing to look at")
        types = torch.zeros_like(input_ids) if token_types is None else token_types
        x = self.token_embedding(input_ids)
        for table, index in (
            (self.position_embedding, positions_of(input_ids, attention_mask)),
            (self.token_type_embedding, types),
        ):
            x = x + table(own_tokens(index, self.tp))
        x = self.embedding_norm(x)
        x = self.embedding_dropout(x, seed, (first_token(x, self.tp),))
        mask = real.bool()[:, None, None, :]  # (B, 1, 1, T): not causal
        for block in self.blocks:
            x = block(x, mask, seed=seed)
        return x

"""T5: an encoder reads a text, a decoder writes what belongs to it; distances are learned.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (Raffel et al.).
What is not said here is as in gpt.py and encoder_decoder.py, the communication too.
Shape letters: B batch, S source, T target, D d_model, V vocabulary, H heads, K width of a head;
tp = tp.size.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.models.attention import causal_padding_mask
from rosetrainer.models.encoder_decoder import DecoderBlock
from rosetrainer.models.gpt import GPTModel, TransformerBlock
from rosetrainer.models.layers import read_out
from rosetrainer.models.llama import GroupedQueryAttention, RMSNorm, feed_forward_of
from rosetrainer.models.relative_bias import RelativeBias
from rosetrainer.parallel.comm import first_token
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Dropout, Seed, name_sites
from rosetrainer.parallel.recompute import recompute
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding


def attend_with_bias(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: Dropout, seed: Seed, tp: Axis
) -> Tensor:
    """(B, H/tp, T, K) queries on (B, H/tp, S, K) keys and values -> (B, H/tp, T, K).

    bias: (1 or B, H/tp, T, S), added to the scores, which are not divided by the root of K; -inf
    where a query may not look.
    """
    scores = query @ key.mT + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide)  # (B, H/tp, T, S)
    # Coordinates count from this rank's first head on.
    kept = dropout(probabilities, seed, (tp.rank * query.shape[1], 0))
    return kept.to(value.dtype) @ value


class UnscaledQuery(ColumnParallelLinear):
    """Queries for attention that divides scores by the root of K, which T5 leaves out."""

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        self.root = math.sqrt(config.head_width)
        width, std = config.n_heads * config.head_width, query_std(config)
        super().__init__(config.d_model, width, False, tp=tp, init_std=std)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.root


def query_std(config: GPTConfig) -> float:
    """What the root of K would divide by is in the initial weights."""
    return 1 / math.sqrt(config.d_model * config.head_width)


class T5SelfAttention(GroupedQueryAttention):
    """Self-attention with a bias for each distance. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__(config, tp, recompute)
        width = config.n_heads * config.head_width
        self.query = ColumnParallelLinear(
            config.d_model, width, False, tp=tp, init_std=query_std(config)
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, bias: Tensor, seed: Seed = None
    ) -> Tensor:
        heads = (part.transpose(1, 2) for part in self.project(x))  # (B, H/tp, T, K) each
        inputs = (*heads, bias, self.dropout, seed, self.tp)
        attended = recompute(attend_with_bias, *inputs, enabled=self.recompute, tp=self.tp)
        return self.dense(attended.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


def blocks_of(config: GPTConfig) -> tuple[type[TransformerBlock], type[DecoderBlock]]:
    """The classes of an encoder's and of a decoder's block."""

    class Norm(RMSNorm):
        eps = config.eps

    class EncoderBlock(TransformerBlock):
        norm_class, attention_class = Norm, T5SelfAttention
        feed_forward_class = feed_forward_of(config)

    class T5DecoderBlock(DecoderBlock):
        norm_class, attention_class = Norm, T5SelfAttention
        feed_forward_class = feed_forward_of(config)

        def __init__(self, config: GPTConfig, tp: Axis, recompute: str = "none") -> None:
            super().__init__(config, tp, recompute)
            self.cross_attention.query = UnscaledQuery(config, tp)

    return EncoderBlock, T5DecoderBlock


class ScaledHead(VocabParallelEmbedding):
    """The tied table as output head, which reads the stream divided by the root of D."""

    def __init__(self, table: VocabParallelEmbedding, d_model: int) -> None:
        nn.Module.__init__(self)
        self.vocab_size, self.tp, self.table = table.vocab_size, table.tp, table
        self.factor = 1 / math.sqrt(d_model)

    def extra_repr(self) -> str:
        return self.table.extra_repr()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.table.weight

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x * self.factor)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return super().loss(x * self.factor, labels)


class T5(GPTModel):
    """An encoder of n_layers blocks and, in the place of GPT-2's blocks, a decoder of as many.

    One token embedding for both sides and, if tied, for the output head. context_length bounds
    each side.
    """

    positions_class = nn.Identity  # no table: each side has a bias for each distance
    embedding_std = 1.0

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__(config, context)
        context, tp = context or ParallelContext(), self.tp
        with context.device:
            blocks = (self.encoder_class(config, tp, context.recompute) for _ in self.blocks)
            self.encoder = nn.ModuleList(blocks)
            self.encoder_norm = self.encoder_class.norm_class(config.d_model, False, tp)
            self.encoder_dropout = Dropout(config.dropout)
            self.encoder_bias = RelativeBias(config, False, tp)
            self.decoder_bias = RelativeBias(config, True, tp)
        if config.tied:
            self.output_head = ScaledHead(self.output_head, config.d_model)
        name_sites(self)

    @cached_property
    def encoder_class(self) -> type[TransformerBlock]:
        return blocks_of(self.config)[0]

    @cached_property
    def block_class(self) -> type[TransformerBlock]:  # type: ignore[override]
        return blocks_of(self.config)[1]

    def forward(  # type: ignore[override]
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        target_ids: Tensor,
        labels: Tensor | None = None,
        return_logits: bool = True,
        seed: Seed = None,
        target_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As EncoderDecoderModel.forward; without target_mask a target may have padding on its
        right, where its labels are -100.

        source_ids, source_mask: (B, S). target_ids, target_mask, labels: (B, T). logits: (B, T, V).
        """
        x = self.hidden(source_ids, source_mask, target_ids, seed, target_mask)
        return read_out(self, x, labels, target_mask, return_logits)

    def hidden(  # type: ignore[override]
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        target_ids: Tensor,
        seed: Seed = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """What the output head reads. -> (B, T, D), or (B, T/tp, D)"""
        memory = self.encode(source_ids, source_mask, seed)
        T = self.length_of(target_ids)
        real = torch.ones_like(target_ids[:1]) if target_mask is None else target_mask
        bias = self.decoder_bias(T) + minus_infinity(causal_padding_mask(real), memory)
        x = self.token_embedding(target_ids)
        x = self.embedding_dropout(x, seed, (first_token(x, self.tp),))
        for block in self.blocks:
            x = block(x, bias, memory, source_mask.bool()[:, None, None, :], seed=seed)
        return self.final_norm(x)

    def encode(self, source_ids: Tensor, source_mask: Tensor, seed: Seed = None) -> Tensor:
        """The source as the decoder looks at it. (B, S) -> (B, S, D), or (B, S/tp, D)"""
        S = self.length_of(source_ids)
        if not source_mask.any(dim=1).all():
            raise ValueError("a source holds no token, so there is nothing to look at")
        x = self.token_embedding(source_ids)
        x = self.encoder_dropout(x, seed, (first_token(x, self.tp),))
        real = source_mask.bool()[:, None, None, :]  # (B, 1, 1, S): not causal
        bias = self.encoder_bias(S) + minus_infinity(real, x)  # (B, H/tp, S, S)
        for block in self.encoder:
            x = block(x, bias, seed=seed)
        return self.encoder_norm(x)

    def length_of(self, ids: Tensor) -> int:
        if self.config.context_length < ids.shape[1]:
            raise ValueError(
                f"{ids.shape[1]} tokens exceed context_length={self.config.context_length}"
            )
        return ids.shape[1]


def minus_infinity(mask: Tensor, like: Tensor) -> Tensor:
    """0 where the mask is true, else -inf."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(
        ~mask, -math.inf
    )


class Answer(nn.Module):
    """A model that goes on with a target, as generate takes it, after one source."""

    def __init__(self, model: T5, source_ids: Tensor) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.source = source_ids[None], torch.ones_like(source_ids)[None]

    def forward(self, target_ids: Tensor, seed: Seed = None) -> tuple[Tensor | None, None]:
        return self.model(*self.source, target_ids, seed=seed)[0], None

"""GLM: one text is read from both sides, and what is missing in it is written after it.

"GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (Du et al.): the
original one, with positions in two dimensions; GLM-4 is of the Llama family.
What is not said here is as in gpt.py, the communication too.
Shape letters: B batch, T sequence, D d_model, V vocabulary; tp = tp.size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.models.gpt import GPTModel, PositionEmbedding, TransformerBlock
from rosetrainer.models.layers import read_out
from rosetrainer.models.llama import PlainFeedForward
from rosetrainer.parallel.comm import first_token, own_tokens
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import Seed


class GlmBlock(TransformerBlock):
    feed_forward_class = PlainFeedForward


class Glm(GPTModel):
    """A transformer over two parts: A, a text with a mask in the place of each span that is cut
    out, and behind it B, the spans. Every token sees all of A; one of B also those before it.

    Of a token's two positions the first says where it stands in A, for one of B where its mask
    does; the second is 0 in A, and in B counts a span's tokens from 1 on.
    """

    block_class = GlmBlock

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__(config, context)
        with (context or ParallelContext()).device:
            size = (config.context_length, config.d_model)
            self.span_position_embedding = PositionEmbedding(*size, self.tp)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        positions: Tensor,
        span_positions: Tensor,
        labels: Tensor | None = None,
        return_logits: bool = True,
        seed: Seed = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As GPTModel.forward. input_ids, positions, span_positions: (B, T). labels: (B, T), the
        token that should follow each one of B in its span, -100 for what is not asked.

        attention_mask: (B, T), 0 for padding, wherever it stands, at which labels are ignored.
        """
        x = self.hidden(input_ids, positions, span_positions, seed, attention_mask)
        return read_out(self, x, labels, attention_mask, return_logits)

    def hidden(  # type: ignore[override]
        self,
        input_ids: Tensor,
        positions: Tensor,
        span_positions: Tensor,
        seed: Seed = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the output head reads. (B, T) -> (B, T, D), or (B, T/tp, D)"""
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        x = self.embed(input_ids, positions)
        x = x + self.span_position_embedding(own_tokens(span_positions, self.tp))
        x = self.embedding_dropout(x, seed, (first_token(x, self.tp),))
        mask = prefix_mask(span_positions == 0, attention_mask)
        for block in self.blocks:
            x = block(x, mask, seed=seed)
        return self.final_norm(x)


def prefix_mask(prefix: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, T) -> (B, 1, T, T): a query sees the prefix and the tokens up to itself.

    prefix: which tokens all see. attention_mask: 0 for padding, which sees itself alone beside.
    """
    T = prefix.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=prefix.device).tril()
    seen = causal | prefix[:, None, :]  # (B, T, T)
    if attention_mask is not None:
        itself = torch.eye(T, dtype=torch.bool, device=prefix.device)
        seen = seen & attention_mask.bool()[:, None, :] | itself
    return seen[:, None]


Parts = tuple[Tensor, Tensor, Tensor]
"""Ids, positions and span positions of a sequence so far, (n,) each."""


def text_alone(ids: Tensor) -> Parts:
    """Part A, to which no span belongs yet."""
    return ids, torch.arange(len(ids), device=ids.device), torch.zeros_like(ids)


class Filling(nn.Module):
    """A model that goes on with a span, as generate takes it.

    before: a text with masks, and the spans that are there. place: of the new one's mask in it.
    """

    def __init__(self, model: Glm, before: Parts, place: int) -> None:
        super().__init__()
        self.model, self.config, self.before, self.place = model, model.config, before, place

    def forward(self, span_ids: Tensor, seed: Seed = None) -> tuple[Tensor | None, None]:
        """span_ids: (1, n), the start token first. Logits of all before it, and of its n."""
        parts = (part[None] for part in self.followed_by(span_ids[0]))
        return self.model(*parts, seed=seed)[0], None

    def followed_by(self, span_ids: Tensor) -> Parts:
        n = len(span_ids)
        places = torch.full_like(span_ids, self.place)
        own = (span_ids, places, torch.arange(1, n + 1, device=span_ids.device))
        ids, positions, span_positions = map(torch.cat, zip(self.before, own, strict=True))
        return ids, positions, span_positions

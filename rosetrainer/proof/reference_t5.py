"""The dense oracle of T5 in plain modules, head by head and distance by distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import Drop, ReferenceDropout, ReferenceFeedForward, ReferenceGPT
from rosetrainer.proof.reference_llama import PLAIN, ReferenceGatedFeedForward, ReferenceNorm

NONE = ReferenceDropout()


def norm(config: GPTConfig) -> ReferenceNorm:
    return ReferenceNorm("rmsnorm", config.d_model, False, config.norm_eps or 1e-6)


def bucket(distance: int, buckets: int, farthest: int) -> int:
    """Of a key so many tokens away, 0 or more, on one side."""
    exact = buckets // 2
    if distance < exact:
        return distance
    # In float32, as the paper's code has it: a distance can lie on the border of two buckets.
    ratio = torch.log(torch.tensor(distance / exact)) / math.log(farthest / exact)
    return min(exact + int(ratio * (buckets - exact)), buckets - 1)


class ReferenceDistances(nn.Module):
    """A number for each distance and head, which its scores get."""

    def __init__(self, config: GPTConfig, is_causal: bool) -> None:
        super().__init__()
        self.is_causal, self.buckets = is_causal, config.relative_buckets or 32
        self.farthest = config.relative_distance or 128
        self.weight = nn.Parameter(torch.zeros(self.buckets, config.n_heads))

    def row_of(self, query: int, key: int) -> int:
        if self.is_causal:
            return bucket(max(query - key, 0), self.buckets, self.farthest)
        half = self.buckets // 2
        return half * (key > query) + bucket(abs(key - query), half, self.farthest)

    def forward(self, length: int) -> list[Tensor]:
        """For each head (T, T), -inf where a query of a causal side may not look."""
        by_distance = [self.row_of(0, away) for away in range(1 - length, length)]
        rows = [by_distance[length - 1 - query :][:length] for query in range(length)]
        future = torch.ones(length, length).triu(1) > 0 if self.is_causal else None
        tables = self.weight[torch.tensor(rows, device=self.weight.device)].unbind(-1)
        if future is None:
            return list(tables)
        return [one.masked_fill(future.to(one.device), -math.inf) for one in tables]


class ReferenceUnscaledAttention(nn.Module):
    """Scores are no more than products, and what is added to them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, width = config.n_heads, config.n_heads * config.head_width
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * width, bias=False)
        self.dense = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor, y: Tensor, added: list[Tensor], drop: Drop) -> Tensor:
        """Queries of x (1, T, D) look at y (1, S, D). added: to each head's scores, or none."""
        heads, (keys, values) = self.n_heads, self.key_value(y).chunk(2, dim=-1)
        queries, keys = self.query(x).chunk(heads, dim=-1), keys.chunk(heads, dim=-1)
        scores = [query @ key.mT for query, key in zip(queries, keys, strict=True)]
        scores = [s + a for s, a in zip(scores, added or [torch.zeros(())] * heads, strict=True)]
        exponents = torch.stack(scores, dim=1)
        weights = (exponents - exponents.amax(-1, keepdim=True)).exp()  # (1, H, T, S)
        dropped = drop("dropout", weights / weights.sum(-1, keepdim=True)).unbind(1)
        pairs = zip(dropped, values.chunk(heads, dim=-1), strict=True)
        return self.dense(torch.cat([p @ value for p, value in pairs], dim=-1))


class ReferenceT5Block(nn.Module):
    """Of an encoder, or of a decoder, which looks at the encoder's result besides."""

    def __init__(self, config: GPTConfig, is_decoder: bool) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norm(config), norm(config)
        self.attention = ReferenceUnscaledAttention(config)
        if is_decoder:
            self.cross_attention_norm = norm(config)
            self.cross_attention = ReferenceUnscaledAttention(config)
        plain = PLAIN.get(config.activation or "relu")
        self.feed_forward: nn.Module = (
            ReferenceFeedForward(config, plain) if plain else ReferenceGatedFeedForward(config)
        )

    def forward(
        self, x: Tensor, distances: list[Tensor], drop: Drop, memory: Tensor | None = None
    ) -> Tensor:
        def within(part: str) -> Drop:
            return lambda site, t: drop(f"{part}.{site}", t)

        y = self.attention_norm(x)
        x = x + drop("attention_dropout", self.attention(y, y, distances, within("attention")))
        if memory is not None:
            y = self.cross_attention_norm(x)
            looked = self.cross_attention(y, memory, [], within("cross_attention"))
            x = x + drop("cross_attention_dropout", looked)
        return x + drop("feed_forward_dropout", self.feed_forward(self.feed_forward_norm(x)))


class ReferenceT5(ReferenceGPT):
    """What T5 must compute in every layout, for sources that may have padding on their right."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        layers, self.width = range(config.n_layers), config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleList(ReferenceT5Block(config, False) for _ in layers)
        self.blocks = nn.ModuleList(ReferenceT5Block(config, True) for _ in layers)
        self.encoder_norm, self.final_norm = norm(config), norm(config)
        self.encoder_bias = ReferenceDistances(config, False)
        self.decoder_bias = ReferenceDistances(config, True)
        if not config.tied:
            self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tied = config.tied

    def of_side(
        self, name: str, x: Tensor, drop: Drop, distances: list[Tensor], memory: Tensor | None
    ) -> Tensor:
        x = drop("embedding_dropout" if memory is not None else "encoder_dropout", x)
        for number, block in enumerate(self.get_submodule(name).children()):
            x = block(x, distances, lambda site, t, n=number: drop(f"{name}.{n}.{site}", t), memory)
        return x

    def forward(  # type: ignore[override]
        self,
        source: Tensor,
        source_mask: Tensor,
        target: Tensor,
        labels: Tensor,
        dropout: ReferenceDropout = NONE,
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(logits, loss) as T5.forward defines them. source, source_mask: (B, S). target, labels:
        (B, T). first_row: of the batch in the global batch, for dropout."""
        rows = []
        for row in range(len(source)):

            def drop(site: str, x: Tensor, number: int = first_row + row) -> Tensor:
                return dropout(site, x, number)

            ids = source[row, : int(source_mask[row].sum())][None]
            x, y = self.token_embedding(ids), self.token_embedding(target[row][None])
            x = self.of_side("encoder", x, drop, self.encoder_bias(x.shape[1]), None)
            memory = self.encoder_norm(x)
            y = self.of_side("blocks", y, drop, self.decoder_bias(y.shape[1]), memory)
            y = self.final_norm(y)
            head = self.token_embedding if self.tied else self.output_head
            rows.append((y / math.sqrt(self.width) if self.tied else y) @ head.weight.T)
        logits = torch.cat(rows)
        asked = labels != -100
        chosen = logits[asked].log_softmax(-1).gather(-1, labels[asked][:, None])
        return logits, -chosen.mean() if len(chosen) else logits.sum() * 0

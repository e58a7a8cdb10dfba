"""The dense oracle of the Llama family in plain modules, head by head and feature by feature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import Drop, ReferenceDropout, ReferenceFeedForward, ReferenceGPT

NORMS = ("rmsnorm", "layernorm", "none")


class ReferenceNorm(nn.Module):
    """Each kind written out."""

    def __init__(self, kind: str, width: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(width))
        if kind == "layernorm" and bias:
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind != "rmsnorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = x * self.weight if self.kind != "none" else x
        return x + self.bias if hasattr(self, "bias") else x


def norm(config: GPTConfig) -> ReferenceNorm:
    eps = 1e-5 if config.norm_eps is None else config.norm_eps
    return ReferenceNorm(config.norm or "rmsnorm", config.d_model, config.bias, eps)


class ReferenceGroupedAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.head_width
        bias, eps = config.bias or config.qkv_bias, config.norm_eps or 1e-5
        self.query = nn.Linear(config.d_model, config.n_heads * self.width, bias=bias)
        self.key_value = nn.Linear(config.d_model, 2 * config.kv_heads * self.width, bias=bias)
        self.dense = nn.Linear(
            config.n_heads * self.width, config.d_model, bias=config.bias or config.dense_bias
        )
        if config.qk_norm:
            self.query_norm = ReferenceNorm("rmsnorm", self.width, False, eps)
            self.key_norm = ReferenceNorm("rmsnorm", self.width, False, eps)

    def turned(self, x: Tensor) -> Tensor:
        """(1, T, K): of the first features each pair turns by position x base^(-2 i / how many)."""
        count = int(self.width * self.config.rotary_fraction)
        positions = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        columns = list(x.unbind(-1))
        for i in range(count // 2):
            first, second = i, i + count // 2
            if self.config.rotary_pairs == "neighbours":
                first, second = 2 * i, 2 * i + 1
            angle = positions * self.config.rotary_base ** (-2 * i / count)
            a, b = x[..., first], x[..., second]
            columns[first] = a * angle.cos() - b * angle.sin()
            columns[second] = a * angle.sin() + b * angle.cos()
        return torch.stack(columns, -1)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        config, T = self.config, x.shape[1]
        keys, values = self.key_value(x).chunk(2, dim=-1)
        future = torch.ones(T, T, device=x.device).triu(diagonal=1) > 0
        probabilities, looked_at = [], []
        for head, query in enumerate(self.query(x).chunk(config.n_heads, dim=-1)):
            shared = head * config.kv_heads // config.n_heads
            key = keys.chunk(config.kv_heads, dim=-1)[shared]
            if config.qk_norm:
                query, key = self.query_norm(query), self.key_norm(key)
            scores = self.turned(query) @ self.turned(key).mT / math.sqrt(self.width)
            probabilities.append(scores.masked_fill(future, -math.inf).softmax(-1))
            looked_at.append(values.chunk(config.kv_heads, dim=-1)[shared])
        dropped = drop("dropout", torch.stack(probabilities, dim=1)).unbind(1)
        results = [p @ value for p, value in zip(dropped, looked_at, strict=True)]
        return self.dense(torch.cat(results, dim=-1))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": lambda x: relu(x) * x,
}
GATED = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh, "reglu": relu}


class ReferenceGatedFeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.formula = GATED[config.activation or "swiglu"]
        self.gate_up = nn.Linear(config.d_model, 2 * config.ff_width, bias=config.bias)
        self.down = nn.Linear(config.ff_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        width = self.down.in_features
        rows, biases = self.gate_up.weight, self.gate_up.bias
        gate = F.linear(x, rows[:width], None if biases is None else biases[:width])
        up = F.linear(x, rows[width:], None if biases is None else biases[width:])
        return self.down(self.formula(gate) * up)


class ReferenceLlamaBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = ReferenceGroupedAttention(config)
        self.feed_forward_norm = norm(config)
        plain = PLAIN.get(config.activation or "")
        self.feed_forward: nn.Module = (
            ReferenceFeedForward(config, plain) if plain else ReferenceGatedFeedForward(config)
        )

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        def drop_within(site: str, x: Tensor) -> Tensor:
            return drop(f"attention.{site}", x)

        x = x + drop("attention_dropout", self.attention(self.attention_norm(x), drop_within))
        return x + drop("feed_forward_dropout", self.feed_forward(self.feed_forward_norm(x)))


class ReferenceLlama(ReferenceGPT):
    """What Llama must compute in every layout."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(ReferenceLlamaBlock(config) for _ in range(config.n_layers))
        self.final_norm = norm(config)
        self.tied = config.tied
        if not config.tied:
            self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def logits(self, input_ids: Tensor, dropout: ReferenceDropout, row: int) -> Tensor:
        x = dropout("embedding_dropout", self.token_embedding(input_ids), row)
        for number, block in enumerate(self.blocks):
            x = block(x, lambda site, t, n=number: dropout(f"blocks.{n}.{site}", t, row))
        head = self.token_embedding if self.tied else self.output_head
        return self.final_norm(x) @ head.weight.T

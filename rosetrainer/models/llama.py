"""The Llama family: a decoder out of choices, of which Mistral, Qwen and GLM-4 make others.

"LLaMA: Open and Efficient Foundation Language Models" (Touvron et al.). What is not said here is as
in gpt.py, the communication too.
Shape letters: B batch, T sequence, D d_model, F d_ff, H query heads, G heads of keys and values, K
width of a head; tp = tp.size. A rank holds h = H/tp query heads and g = max(G/tp, 1) others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.models.attention import attend
from rosetrainer.models.gpt import (
    FeedForward,
    LayerNorm,
    TransformerBlock,
    residual_std,
)
from rosetrainer.models.layers import GPTWithoutPositionTable, PlainNorm
from rosetrainer.models.positions import turn, turning
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.dropout import Dropout, Seed
from rosetrainer.parallel.overlap import column_linear
from rosetrainer.parallel.recompute import recompute
from rosetrainer.parallel.sharding import ShardSpec, new_parameter, replicated_parameter
from rosetrainer.parallel.shared_heads import KeyValueLinear
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""The function of a gate, by the name of "GLU Variants Improve Transformer" (Shazeer)."""


class RMSNorm(nn.Module):
    """(.., D): mean square 1 over D, times weights; the same on every rank.

    "Root Mean Square Layer Normalization" (Zhang and Sennrich).
    """

    eps = 1e-5

    def __init__(self, d_model: int, bias: bool, tp: Axis) -> None:
        super().__init__()
        self.weight = replicated_parameter((d_model,), tp, init_mean=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadNorm(nn.Module):
    """(.., h, K) V -> (.., h, K) V: RMSNorm of each head with the same K weights.

    A rank has its own heads alone, so that its gradient of the weights is P over tp.
    """

    def __init__(self, width: int, eps: float, tp: Axis) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(ShardSpec((width,), init_mean=1.0, partial_over=(tp.name,)))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H/G query heads look at one of G heads. (B, T, D) -> (B, T, D)

    Queries, keys and values are one product, so one sum over tp forward and one backward, as with
    as many heads of each. Under sequence parallelism (B, T/tp, D) in and out.
    """

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__()
        D, K, width = config.d_model, config.head_width, config.n_heads * config.head_width
        bias, eps = config.bias or config.qkv_bias, config.eps
        self.head_width, self.pairs = K, config.rotary_pairs
        self.tp, self.recompute = tp, recompute
        self.query = ColumnParallelLinear(D, width, bias, tp=tp)
        self.key_value = KeyValueLinear(D, config.kv_heads, K, bias, tp=tp)
        self.query_norm = HeadNorm(K, eps, tp) if config.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(K, eps, tp) if config.qk_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.dense = RowParallelLinear(
            *(width, D, config.bias or config.dense_bias),
            tp=tp,
            init_std=residual_std(width, config),
        )

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None = None, seed: Seed = None
    ) -> Tensor:
        """angles: of `turning`. mask: (B, 1, T, T), true where a query may look at a key."""
        query, key, value = self.project(x)  # (B, T, h, K), (B, T, g, K) and the same
        query, key = (
            self.placed(query, self.query_norm, angles),
            self.placed(key, self.key_norm, angles),
        )
        heads = (part.transpose(1, 2) for part in (query, key, value))
        inputs = (*heads, mask, self.dropout, seed, self.tp)
        attended = recompute(attend_in_groups, *inputs, enabled=self.recompute, tp=self.tp)
        return self.dense(attended.transpose(1, 2).flatten(2))  # (B, T, h*K) -> (B, T, D)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three: x is gathered, and its gradient summed, once."""
        layers = (self.query, self.key_value)
        weight = torch.cat([layer.weight.flatten(0, -2) for layer in layers])  # ((h+2g)*K, D)
        biases = [layer.bias.flatten() for layer in layers if layer.bias is not None]
        fused = column_linear(x, weight, torch.cat(biases) if biases else None, self.tp)
        heads = fused.unflatten(-1, (-1, self.head_width))  # (B, T, h+2g, K)
        h = len(self.query.weight) // self.head_width
        g = (heads.shape[2] - h) // 2
        query, key, value = heads.split([h, g, g], dim=2)
        return query, key, value

    def placed(self, heads: Tensor, norm: nn.Module, angles: Tensor) -> Tensor:
        """Normed, where the model does that, and turned, in fp32 or better."""
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        return turn(norm(wide), angles, self.pairs).to(heads.dtype)


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    """As attend, with (B, g, S, K) keys and values, each for h/g neighbouring query heads."""
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = (heads.repeat_interleave(times, dim=1) for heads in (key, value))
    return attend(query, key, value, *others)


class PlainFeedForward(FeedForward):
    """GPT-2's with another activation. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__(config, tp)
        self.function = ACTIVATIONS[config.function]

    def activation(self, x: Tensor) -> Tensor:
        return self.function(x)


class GatedFeedForward(nn.Module):
    """Gate and up in one product, column-parallel; gate's function times up; row. (B, T, D) twice

    Stride 2: a rank holds the same features of the gate as of what it multiplies.
    """

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.ff_width
        self.function = ACTIVATIONS[GATES[config.function]]
        self.gate_up = ColumnParallelLinear(config.d_model, 2 * width, config.bias, stride=2, tp=tp)
        self.down = RowParallelLinear(
            *(width, config.d_model, config.bias), tp=tp, init_std=residual_std(width, config)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F/tp) each
        return self.down(self.function(gate) * up)  # (B, T, D)


def feed_forward_of(config: GPTConfig) -> type[nn.Module]:
    return GatedFeedForward if config.is_gated else PlainFeedForward


def block_of(config: GPTConfig) -> type[TransformerBlock]:
    """The class of the block that the config's choices describe."""

    class Norm(RMSNorm):
        eps = config.eps

    norms = {"layernorm": LayerNorm, "none": PlainNorm}

    class LlamaBlock(TransformerBlock):
        norm_class = norms.get(str(config.norm), Norm)
        attention_class = GroupedQueryAttention
        feed_forward_class = feed_forward_of(config)

    return LlamaBlock


class Llama(GPTWithoutPositionTable):
    """A decoder-only transformer of the blocks that its config describes, with rotary positions."""

    @cached_property
    def block_class(self) -> type[TransformerBlock]:  # type: ignore[override]
        return block_of(self.config)

    def attention_inputs(self, positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return turning(positions, self.config, next(self.parameters()).dtype), mask

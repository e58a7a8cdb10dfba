"""What a model is: its sizes, and the choices of which its blocks are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from rosetrainer.model_choices import GATED, Activation, check_choices
from rosetrainer.model_size import check_exists
from rosetrainer.validation import (
    HIDDEN,
    BelowOne,
    Bounds,
    ConfigError,
    Count,
    CountOrZero,
    Positive,
    check_fields,
    divisors,
    one_of,
)


@dataclass(frozen=True)
class GPTConfig:
    """The model: shapes of a GPT."""

    vocab_size: Annotated[Count, HIDDEN] = 256
    """Number of token ids; training takes it from the data."""
    context_length: Annotated[int, Bounds(1, 2**24)] = 256
    """Tokens in a sequence."""
    n_layers: Annotated[int, Bounds(1, 2**14)] = 4
    """Transformer blocks."""
    n_heads: Count = 4
    """Attention heads."""
    d_model: Count = 256
    """Width of the residual stream."""
    d_head: Count | None = None
    """Width of one head; d_model / n_heads unless given."""
    d_ff: Count | None = None
    """Inner width of the feed-forward layer; 4 x d_model unless given."""
    bias: bool = True
    """Biases in the linear layers."""
    tied: bool = True
    """The output head shares the token embedding's weights."""
    dropout: BelowOne = 0.0
    """Share of activations that training drops: embeddings, attention, and what blocks add."""
    architecture: Literal["gpt2", "rotary", "llama", "bert", "t5", "glm", "transformer_xl"] = "gpt2"
    """rotary: rotary positions, squared ReLU, norms without weights, outputs that begin at zero.
    llama: rotary positions and the choices below, by default those of Llama.
    bert: an encoder, trained to fill in hidden tokens.
    t5: an encoder and a decoder, trained to write the spans that are cut out of a text.
    glm: the original one, that reads the text and writes the spans in one sequence.
    transformer_xl: a GPT whose attention projects how far apart two tokens stand."""
    rotary_base: Positive = 10000.0
    """Rotary positions: the slowest pair of a head turns once in about 6 times as many tokens.
    transformer_xl: the same of the pairs of a distance's sine and cosine."""
    rotary_fraction: Annotated[float, Bounds(1e-3, 1)] = 1.0
    """llama: the share of a head's features, its first ones, that turn."""
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    """llama: which features turn together: i and i + half of them, or 2i and 2i+1."""
    n_kv_heads: Count | None = None
    """llama: heads of keys and values, each for n_heads / n_kv_heads of queries; n_heads unless
    given."""
    norm: Literal["rmsnorm", "layernorm", "none"] | None = None
    """llama: rmsnorm unless given; none is layernorm without weights."""
    norm_eps: Positive | None = None
    """What a norm adds to the mean square; unless given, 1e-5 in llama's rmsnorm, 1e-12 in bert,
    1e-6 in t5."""
    activation: Activation | None = None
    """llama: swiglu unless given; the first four multiply by a gate of as many features.
    bert, glm: gelu unless given, and none of those four. t5: relu unless given."""
    qkv_bias: bool = False
    """llama: biases of queries, keys and values where --no-bias leaves out the others."""
    dense_bias: bool = False
    """llama: the bias of attention's output where --no-bias leaves out the others."""
    qk_norm: bool = False
    """llama: a norm of each query and key head before it turns."""
    token_types: Count = 2
    """bert: kinds of tokens, each with an embedding: of the first and of the second text."""
    mask_token: CountOrZero | None = None
    """bert, glm: the id that stands where a token or a span is hidden; the first behind the
    corpus's unless given."""
    relative_buckets: Annotated[int, Bounds(4)] = 32
    """t5: kinds of distances between two tokens, each with a bias a head."""
    relative_distance: Count = 128
    """t5: the distance from which on all are of one kind."""
    start_token: CountOrZero | None = None
    """t5, glm: the id that a target, or a span, begins with; the next behind the corpus's unless
    given."""
    end_token: CountOrZero | None = None
    """t5, glm: the id that ends a source and a target, or a span; the next one unless given."""
    sentinel_token: CountOrZero | None = None
    """t5: the id in the place of the first span that is cut out; those before it, downwards, are
    for the next ones. The last of 100 more ids unless given."""

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def has_position_table(self) -> bool:
        """Whether it has an embedding for each position, and so none beyond context_length."""
        return self.architecture not in ("rotary", "llama", "t5", "transformer_xl")

    @property
    def rotary_width(self) -> int:
        """Features of a head that turn."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def function(self) -> str:
        """The activation; unless given, that of the architecture."""
        by_default = {"llama": "swiglu", "t5": "relu"}.get(self.architecture, "gelu")
        return self.activation or by_default

    @property
    def eps(self) -> float:
        """What a norm adds; unless given, that of the architecture."""
        return self.norm_eps or {"bert": 1e-12, "t5": 1e-6}.get(self.architecture, 1e-5)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.function in GATED

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.architecture != "bert"

    def check(self, tp_size: int = 1, sequence_parallel: bool = False) -> None:
        """Raises ConfigError if no such model exists, or tp_size ranks cannot share it."""
        check_fields(self)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"n_heads can be {one_of(divisors(self.d_model))}, or give d_head"
            )
        check_exists(self)
        check_choices(self)
        for name, value in (("n_heads", self.n_heads), ("d_ff", self.ff_width)):
            if value % tp_size:
                possible = divisors(math.gcd(self.n_heads, self.ff_width))
                raise ConfigError(
                    f"{name}={value} is not divisible by tp_size={tp_size}; "
                    f"tp_size can be {one_of(possible)}"
                )
        if self.kv_heads % tp_size and tp_size % self.kv_heads:
            possible = [
                size
                for size in divisors(math.gcd(self.n_heads, self.ff_width))
                if not (self.kv_heads % size and size % self.kv_heads)
            ]
            raise ConfigError(
                f"n_kv_heads={self.kv_heads} and tp_size={tp_size}: one must divide the other; "
                f"tp_size can be {one_of(possible)}"
            )
        if sequence_parallel and self.context_length % tp_size:
            raise ConfigError(
                f"context_length={self.context_length} is not divisible by tp_size={tp_size}, over "
                f"which sequence parallelism divides it; it can be a multiple of {tp_size}"
            )

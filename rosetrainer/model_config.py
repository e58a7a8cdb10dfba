"""What a model is: its sizes, and the choices of which its blocks are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from tyro.conf import Suppress

from rosetrainer.model_size import check_exists
from rosetrainer.validation import (
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

CHOICES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("n_kv_heads", "norm", "qkv_bias", "dense_bias", "qk_norm"), ("llama",)),
    **dict.fromkeys(("rotary_fraction", "rotary_pairs"), ("llama",)),
    "norm_eps": ("llama", "bert", "t5"),
    "activation": ("llama", "bert", "t5", "glm"),
    "token_types": ("bert",),
    "mask_token": ("bert", "glm"),
    **dict.fromkeys(("start_token", "end_token"), ("t5", "glm")),
    **dict.fromkeys(("relative_buckets", "relative_distance", "sentinel_token"), ("t5",)),
}
"""Fields that some architectures read, and which; the others have these things fixed."""
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
Activation = Literal[
    "swiglu", "geglu", "geglu_tanh", "reglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"
]


@dataclass(frozen=True)
class GPTConfig:
    """The model: shapes of a GPT."""

    vocab_size: Suppress[Count] = 256
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
    architecture: Literal["gpt2", "rotary", "llama", "bert", "t5", "glm"] = "gpt2"
    """rotary: rotary positions, squared ReLU, norms without weights, outputs that begin at zero.
    llama: rotary positions and the choices below, by default those of Llama.
    bert: an encoder, trained to fill in hidden tokens.
    t5: an encoder and a decoder, trained to write the spans that are cut out of a text.
    glm: the original one, that reads the text and writes the spans in one sequence."""
    rotary_base: Positive = 10000.0
    """Rotary positions: the slowest pair of a head turns once in about 6 times as many tokens."""
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
        if self.architecture == "rotary" and self.tied:
            raise ConfigError("architecture=rotary has an output head of its own; add --no-tied")
        if self.architecture == "rotary" and self.head_width % 2:
            raise ConfigError(
                f"architecture=rotary turns pairs, and a head is {self.head_width} wide; "
                f"d_head can be {self.head_width + 1}"
            )
        self._check_choices()
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

    def _check_choices(self) -> None:
        """Raises ConfigError for choices that the architecture does not have, or that mean nothing
        together."""
        defaults = {f.name: f.default for f in fields(self)}
        for name, readers in CHOICES.items():
            value = getattr(self, name)
            if self.architecture not in readers and value != defaults[name]:
                raise ConfigError(
                    f"{name}={value} is a choice of architecture={one_of(readers)}, and this is "
                    f"{self.architecture}; add --architecture {readers[0]}, or leave it out"
                )
        if self.architecture == "llama":
            self._check_llama()
        elif self.architecture == "bert":
            self._check_bert()
        elif self.architecture == "t5":
            self._check_t5()
        if self.architecture in ("bert", "glm") and self.activation in GATED:
            plain = one_of(name for name in get_args(Activation) if name not in GATED)
            raise ConfigError(
                f"activation={self.activation} has a gate, and architecture={self.architecture} "
                f"has none; it can be {plain}"
            )

    def _check_llama(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.kv_heads}; "
                f"n_kv_heads can be {one_of(divisors(self.n_heads))}"
            )
        if self.rotary_width % 2 or not self.rotary_width:
            raise ConfigError(
                f"architecture=llama turns pairs, and {self.rotary_width} of a head's "
                f"{self.head_width} features (rotary_fraction={self.rotary_fraction:g}) are none; "
                f"choose d_head x rotary_fraction even"
            )
        if self.bias and (self.qkv_bias or self.dense_bias):
            which = "qkv_bias" if self.qkv_bias else "dense_bias"
            raise ConfigError(f"{which} is for models without the other biases; add --no-bias")
        if self.norm_eps is not None and self.norm not in (None, "rmsnorm"):
            raise ConfigError(f"norm_eps is rmsnorm's, and norm={self.norm}; leave it out")

    def _check_bert(self) -> None:
        if not self.bias:
            raise ConfigError("architecture=bert has biases; leave out --no-bias")

    def _check_t5(self) -> None:
        if self.bias:
            raise ConfigError("architecture=t5 has no biases; add --no-bias")
        buckets, farthest = self.relative_buckets, self.relative_distance
        if farthest <= buckets // 2:
            raise ConfigError(
                f"relative_distance={farthest} is not above half of relative_buckets={buckets}, "
                f"the distances that have one each; it can be {buckets // 2 + 1} or more"
            )
        if buckets % 4:
            raise ConfigError(
                f"relative_buckets={buckets} is not divisible by 4, the halves ahead and behind by "
                f"the halves near and far; it can be {buckets // 4 * 4 or 4}"
            )

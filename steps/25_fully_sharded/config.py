"""The shape of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

IGNORED = -100  # a label that counts for nothing, as in F.cross_entropy


class ConfigError(ValueError):
    """A mistake of the user's. The text is one line: the values, and what would work."""


@dataclass(frozen=True)
class GPTConfig:
    """Shapes of a GPT; d_head is d_model / n_heads and d_ff is 4 x d_model unless given."""

    vocab_size: int = 8
    context_length: int = 32
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    d_head: int | None = None
    d_ff: int | None = None
    bias: bool = True
    tied: bool = True
    dropout: float = 0.0

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    def check(self, tp_size: int = 1, sequence_parallel: bool = False) -> None:
        """Raises ConfigError if no such model exists, or tp_size ranks cannot share it."""
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: it can be from 0 to below 1")
        for name, value in (("n_heads", self.n_heads), ("d_ff", self.ff_width)):
            if value % tp_size:
                common = math.gcd(self.n_heads, self.ff_width)
                possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise ConfigError(
                    f"{name}={value} is not divisible by tp_size={tp_size}; "
                    f"tp_size can be {possible}"
                )
        if sequence_parallel and self.context_length % tp_size:
            raise ConfigError(
                f"context_length={self.context_length} is not divisible by tp_size={tp_size}, over "
                f"which sequence parallelism divides it; it can be a multiple of {tp_size}"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: how many ranks share one model (tp, pp), how many copies of it there are (dp)."""

    tp_size: int | None = None
    dp_size: int | None = None
    sequence_parallel: bool = False
    recompute: str = "none"
    overlap: bool = True
    pp_size: int = 1
    pp_schedule: str = "1f1b"
    micro_batches: int = 4  # of a pipeline, in a step of a dp rank
    accumulation: int = 1  # micro-batches of a dp rank without a pipeline
    zero: int = 0  # what is cut over dp: 1 the moments, 2 gradients too, 3 parameters too
    zero_keep: bool = False  # at level 3: what a forward pass gathers stays for the backward pass

    def resolve(self, world_size: int) -> tuple[int, int]:
        """(tp_size, dp_size); one that is not given takes the ranks that the others leave."""
        if self.recompute not in (modes := ("none", "attention", "block")):
            raise ConfigError(f"recompute={self.recompute}: it can be {', '.join(modes)}")
        if self.pp_size < 1 or world_size % self.pp_size:
            raise ConfigError(f"pp_size={self.pp_size} does not divide the world size {world_size}")
        world_size //= self.pp_size  # of one stage
        tp = self.tp_size if self.tp_size is not None else world_size // (self.dp_size or 1)
        dp = self.dp_size if self.dp_size is not None else max(world_size // max(tp, 1), 1)
        if min(tp, dp) < 1 or tp * dp != world_size:
            raise ConfigError(
                f"world size {world_size} is not tp_size x dp_size = {tp} x {dp}; "
                f"sizes can be from 1 on, and their product {world_size}"
            )
        return tp, dp

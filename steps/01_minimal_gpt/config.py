"""The shape of the model."""

from __future__ import annotations

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

    def check(self) -> None:
        """Raises ConfigError if there is no such model."""
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.dropout > 0:
            raise ConfigError(f"dropout={self.dropout} is not supported yet; dropout can be 0")

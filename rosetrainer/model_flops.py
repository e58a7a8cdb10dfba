"""Floating-point operations of a training step, forward and backward, over all ranks.

Six for each weight that a token is multiplied by, and 6 x keys x H x K for each of the products of
attention, not halved for causality ("PaLM: Scaling Language Modeling with Pathways", appendix B).
What is computed again counts once.
"""

from __future__ import annotations

from rosetrainer.model_config import GPTConfig


def flops_per_token(config: GPTConfig, sides: tuple[int, int] | None = None) -> float:
    """Of a token of a row of context_length.

    sides: tokens of the source and of the target that an encoder-decoder makes of such a row.
    """
    if config.architecture != "t5":
        return config.n_layers * flops_of_block(config) + flops_of_head(config)
    S, T = sides or (config.context_length, config.context_length)
    width, D = config.n_heads * config.head_width, config.d_model
    encoder = S * (flops_of_weights(config) + 12 * S * width)
    decoder = T * (flops_of_weights(config) + 12 * T * width)
    cross = 6 * (2 * T * D * width + 2 * S * D * width) + T * 12 * S * width
    row = config.n_layers * (encoder + decoder + cross) + T * flops_of_head(config)
    return row / config.context_length


def flops_of_block(config: GPTConfig) -> int:
    """Of flops_per_token, what one transformer block takes."""
    width, products = config.n_heads * config.head_width, 2
    if config.architecture == "transformer_xl":  # queries by the projected distances, too
        products = 3
    return flops_of_weights(config) + 6 * products * config.context_length * width


def flops_of_weights(config: GPTConfig) -> int:
    """Of flops_of_block, what its weights take: queries, keys, values, dense, feed-forward."""
    width = 2 * config.n_heads * config.head_width + 2 * config.kv_heads * config.head_width
    return 6 * config.d_model * (width + (2 + config.is_gated) * config.ff_width)


def flops_of_head(config: GPTConfig) -> int:
    """Of flops_per_token, what the output head takes."""
    before = config.d_model if config.architecture == "bert" else 0  # its transform
    return 6 * config.d_model * (config.vocab_size + before)

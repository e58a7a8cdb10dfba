"""What the closed forms count: the parameters of a rank, and what its blocks see.

Letters: T tokens, S tokens of a source (encoder-decoder), D d_model, F d_ff, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rosetrainer.config import GPTConfig
from rosetrainer.parallel.vocab_parallel import PADDED_TO


@dataclass(frozen=True)
class Work:
    """One rank's part of a step."""

    rows: int
    tokens: int
    micro_batches: int = 1
    source_tokens: int = 0  # of an encoder-decoder; 0 stands for a GPT
    product_bytes: int = 4
    weight_bytes: int = 4


class Parameter(NamedTuple):
    shape: tuple[int, ...]
    replicated: bool = False  # all ranks hold the same
    multiplied: bool = False  # a linear layer's matrix
    summed: int = 0  # over how many parts of tp it is summed in every layout
    block: int = 0  # its number, counted from 1; 0 outside of all

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """A transformer block: the sequence lengths that its parts see."""

    columns: tuple[int, ...]  # inputs of column-parallel layers
    rows: tuple[int, ...]  # outputs of row-parallel layers
    attentions: tuple[tuple[int, int, int], ...]  # (queries, keys, rows of the padding mask)


@dataclass(frozen=True)
class Share:
    """What of a model a rank has: so many layers, the embedding if first, the head if last."""

    layers: int
    first: bool = True
    last: bool = True


def blocks(share: Share, work: Work) -> list[Block]:
    T, S = work.tokens, work.source_tokens
    if not S:
        return [Block((T, T), (T, T), ((T, T, 0),))] * share.layers
    encoder = Block((S, S), (S, S), ((S, S, 1),))
    decoder = Block((T, T, S, T), (T, T, T), ((T, T, T), (T, S, 1)))
    return [encoder] * share.layers + [decoder] * share.layers


def parameters(
    model: GPTConfig, tp: int, encoder_decoder: bool, share: Share
) -> Iterator[Parameter]:
    """Each parameter as a rank holds it, in order. An encoder-decoder's share is all of it."""
    if model.architecture == "llama":
        yield from llama_parameters(model, tp, share)
        return
    if model.architecture == "t5":
        yield from t5_parameters(model, tp)
        return
    D, F, bias = model.d_model, model.ff_width, model.bias
    width = model.n_heads * model.head_width
    table = Parameter((padded_vocabulary(model, tp) // tp, D))
    norm = [Parameter((D,), replicated=True)] * (1 + bias)

    def column(*rows: int) -> list[Parameter]:  # with a stride before them, if there is one
        own = (*rows[:-1], rows[-1] // tp)
        return [Parameter((*own, D), multiplied=True)] + [Parameter(own)] * bias

    def row(columns: int) -> list[Parameter]:
        weight = Parameter((D, columns // tp), multiplied=True)
        return [weight] + [Parameter((D,), replicated=True)] * bias

    attention = [*norm, *column(3, width), *row(width)]
    if model.architecture == "transformer_xl":  # two vectors a head, and distances' projection
        distances = Parameter((width // tp, D), multiplied=True)
        vectors = [Parameter((width // tp,))] * 2
        attention = [*norm, *vectors, *attention[len(norm) :], distances]
    cross = [*norm, *column(width), *column(2, width), *row(width)]
    feed_forward = [*norm, *column(F), *row(F)]
    yield from [table] * (share.first or (share.last and model.tied))
    positions = Parameter((model.context_length, D), replicated=True)
    yield from [positions] * (1 + encoder_decoder) * (share.first and model.has_position_table)
    yield from in_blocks([*attention, *feed_forward], share.layers)
    if encoder_decoder:
        yield from norm
        yield from in_blocks([*attention, *feed_forward, *cross], share.layers, share.layers)
    head = [table] * (not model.tied)
    if model.architecture == "bert":  # no last norm, but what stands before its output table
        dense = [Parameter((D, D), replicated=True, multiplied=True)]
        dense += [Parameter((D,), replicated=True)]
        yield from [Parameter(table.shape[:1]), *head, *dense, *norm] * share.last
    else:
        yield from [*norm, *head] * share.last
    if model.architecture == "glm":
        yield from [positions] * share.first
    if model.architecture == "bert":
        types = ((model.token_types or 2), D)
        yield from [Parameter(types, replicated=True), *norm] * share.first


def in_blocks(own: list[Parameter], layers: int, before: int = 0) -> Iterator[Parameter]:
    """Those of so many blocks; `before` so many others."""
    for block in range(before + 1, before + layers + 1):
        yield from (one._replace(block=block) for one in own)


def heads(model: GPTConfig, tp: int) -> tuple[int, int]:
    """How many heads a rank has: of queries h, of keys and values g."""
    return model.n_heads // tp, max(model.kv_heads // tp, 1)


def llama_parameters(model: GPTConfig, tp: int, share: Share) -> Iterator[Parameter]:
    """As `parameters`; K is the width of a head."""
    D, F, K, bias = model.d_model, model.ff_width, model.head_width, model.bias
    h, g = heads(model, tp)
    table = Parameter((padded_vocabulary(model, tp) // tp, D))
    norms = {"layernorm": 1 + bias, "none": 0}.get(str(model.norm), 1)
    norm = [Parameter((D,), replicated=True)] * norms
    # Held by several ranks, a head's gradient is summed among all that there are.
    parts = model.kv_heads * (tp > model.kv_heads)
    gates = (2,) if model.is_gated else ()

    def with_bias(weight: Parameter, there: bool, of: Parameter) -> list[Parameter]:
        return [weight] + [of] * there

    def block() -> Iterator[Parameter]:
        yield from norm
        qkv, dense = bias or model.qkv_bias, bias or model.dense_bias
        yield from with_bias(Parameter((h * K, D), multiplied=True), qkv, Parameter((h * K,)))
        keys = Parameter((2, g * K, D), multiplied=True, summed=parts)
        yield from with_bias(keys, qkv, Parameter((2, g * K), summed=parts))
        yield from [Parameter((K,), summed=1)] * (2 * model.qk_norm)
        row_bias = Parameter((D,), replicated=True)
        yield from with_bias(Parameter((D, h * K), multiplied=True), dense, row_bias)
        yield from norm
        columns = (*gates, F // tp)
        yield from with_bias(Parameter((*columns, D), multiplied=True), bias, Parameter(columns))
        yield from with_bias(Parameter((D, F // tp), multiplied=True), bias, row_bias)

    yield from [table] * (share.first or (share.last and model.tied))
    yield from in_blocks(list(block()), share.layers)
    yield from norm * share.last
    yield from [table] * (share.last and not model.tied)


def t5_parameters(model: GPTConfig, tp: int) -> Iterator[Parameter]:
    """As `parameters`; the decoder's blocks stand first, and the encoder's are used first."""
    D, F, layers = model.d_model, model.ff_width // tp, model.n_layers
    h, width = model.n_heads // tp, model.n_heads // tp * model.head_width
    table = Parameter((padded_vocabulary(model, tp) // tp, D))
    norm = Parameter((D,), replicated=True)
    gates = (2,) if model.is_gated else ()

    def of(*shapes: tuple[int, ...]) -> list[Parameter]:
        return [norm, *(Parameter(shape, multiplied=True) for shape in shapes)]

    attention = of((width, D), (2, width, D), (D, width))
    feed_forward = of((*gates, F, D), (D, F))
    yield table
    yield from in_blocks([*attention, *feed_forward, *attention], layers, layers)
    yield norm
    yield from [table] * (not model.tied)
    yield from in_blocks([*attention, *feed_forward], layers)
    yield norm
    yield from [Parameter((model.relative_buckets, h))] * 2


def padded_vocabulary(model: GPTConfig, tp: int) -> int:
    multiple = math.lcm(PADDED_TO, tp)
    return -(-model.vocab_size // multiple) * multiple

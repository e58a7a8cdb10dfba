"""Heads of keys and values that several tensor-parallel ranks may hold alike.

"GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et
al.). Shape letters: B batch, T sequence, D d_model, G heads of keys and values, K width of a head;
tp = tp.size.
"""

from __future__ import annotations

from dataclasses import replace

from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.sharding import Cut, shard_spec
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear


class KeyValueLinear(ColumnParallelLinear):
    """The keys and values of G heads. (B, T, D) I -> (B, T, 2*K*max(G/tp, 1)) V

    With fewer heads than ranks, tp/G neighbours hold the same head, and each looks at it with query
    heads of its own. What they compute forward is the same; of the head's gradient each has only a
    part, so the weight is partial over tp: reduce_gradients sums it over its holders. Its whole
    tensor holds each head once, as do the norm and a checkpoint.

    Either G or tp divides the other: GPTConfig.check says so to the user.
    """

    def __init__(
        self, in_features: int, n_heads: int, head_width: int, bias: bool, *, tp: Axis
    ) -> None:
        parts = min(n_heads, tp.size)
        copies = tp.size // parts
        holders = replace(tp, size=parts, rank=tp.rank // copies)  # as if one rank held a part
        super().__init__(in_features, 2 * n_heads * head_width, bias, stride=2, tp=holders)
        self.tp = tp
        for parameter in self.parameters():
            spec = shard_spec(parameter)
            cuts = tuple(Cut(tp, cut.dim, copies) for cut in spec.cuts)
            partial_over = (tp.name,) if copies > 1 else ()
            parameter.shard_spec = replace(  # type: ignore[attr-defined]
                spec, cuts=cuts, partial_over=partial_over
            )

"""ZeRO's levels against one dense process in float64: gradients, norms, updates; who holds what."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import TOLERANCE, assert_all_equal, dense_model, gradients, random_batch, tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import IGNORED, ConfigError, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.muon import hidden_layers
from rosetrainer.optim.non_finite import NonFiniteGradientError
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import Axis, ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.replicas import check_replicas, checksum
from rosetrainer.parallel.sharding import gather_whole, load_whole, replicated_parameter, shard_spec
from rosetrainer.parallel.zero.cut import dim_of_slices
from rosetrainer.parallel.zero.groups import owners, shard_axes, shard_model
from rosetrainer.parallel.zero.sharded_model import sharding_of
from rosetrainer.proof.reference import ReferenceDropout
from rosetrainer.training.step import compute_gradients

ROWS, ACCUMULATION, STEPS, CLIP = 36, 3, 3, 0.05
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.3, global_batch_size=ROWS)
# 25 is prime to 2 and 3; a head of 5 over 8 heads makes 40 rows; 29 ids padded to 128.
CONFIG = {"d_model": 25, "d_ff": 35, "dropout": 0.1}


def global_batch(config: GPTConfig, step: int) -> tuple[Tensor, Tensor]:
    """Rows count unequally many tokens; those of the last dp rank none in the last micro-batch."""
    input_ids, labels = random_batch(config, ROWS, seed=step)
    labels[-4:] = IGNORED
    return input_ids, labels


def own_batches(context: ParallelContext, config: GPTConfig, step: int) -> list[tuple[Any, ...]]:
    size = ROWS // context.dp.size // ACCUMULATION
    input_ids, labels = global_batch(config, step)
    firsts = [(i * context.dp.size + context.dp.rank) * size for i in range(ACCUMULATION)]
    return [(f, input_ids[f : f + size], labels[f : f + size]) for f in firsts]


def built(config: GPTConfig, context: ParallelContext, muon: bool = False) -> GPTModel:
    model = GPTModel(config, context).double()
    load_whole(model, dense_model(config).state_dict())
    shard_model(model, context, [layer.weight for layer in hidden_layers(model)] if muon else [])
    return model


def train_dense(config: GPTConfig) -> dict[str, Any]:
    """The oracle: the whole batch at once, torch's clipping and torch's AdamW."""
    dense = dense_model(config)
    decayed = [p for n, p in dense.named_parameters() if p.dim() == 2 and "position" not in n]
    others = [p for n, p in dense.named_parameters() if p.dim() != 2 or "position" in n]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(OPTIM.beta1, OPTIM.beta2))
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        input_ids, labels = global_batch(config, step)
        _, loss = dense(input_ids, labels=labels, dropout=ReferenceDropout(config.dropout, 5, step))
        loss.backward()
        if step == 0:
            found["gradients"] = {n: g.clone() for n, g in gradients(dense).items()}
        norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), math.inf)
        for gradient in gradients(dense).values():
            gradient.mul_(CLIP / norm)
        optimizer.step()
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {n: optimizer.state[p][key] for n, p in dense.named_parameters()}
    return found | {"weights": dict(dense.named_parameters())}


def check_level(context: ParallelContext, config: GPTConfig, expected: dict[str, Any]) -> int:
    """Trains at context.parallel.zero; gives a checksum of all whole parameters."""
    model = built(config, context)
    optimizer = build_optimizer(model, OPTIM)
    start = gather_whole(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        seed = DropoutSeed(5, step)
        loss = compute_gradients(model, own_batches(context, config, step), context, seed=seed)
        assert abs(loss - expected["losses"][step]) <= TOLERANCE * expected["losses"][step]
        if step == 0:
            assert_all_equal(gather_whole(model, gradients=True), expected["gradients"])
        norm = clip_gradients(model, context, CLIP)
        assert abs(norm - expected["norms"][step]) <= TOLERANCE * norm
        optimizer.step()
        check_replicas(model, context, step)
    whole = gather_whole(model)
    assert_all_equal(whole, expected["weights"])
    assert all(not torch.equal(whole[name], start[name]) for name in whole)
    for key in ("exp_avg", "exp_avg_sq"):
        moments = {
            name: shard_spec(p).unshard(optimizer.state[p][key], "checkpoint")
            for name, p in model.named_parameters()
        }
        assert_all_equal(moments, expected[key])
    check_who_holds_what(model, context)
    check_a_norm_beyond_its_squares(model, context)
    return int(sum(checksum(tensor) for tensor in whole.values()))


def check_who_holds_what(model: GPTModel, context: ParallelContext) -> None:
    """Of each parameter a slice, the largest at most a row longer than an even share."""
    sharded, shards = sharding_of(model), context.dp.size // context.parallel.dp_replicas
    assert sharded
    for parameter in model.parameters():
        spec = shard_spec(parameter)
        assert tuple(parameter.shape) == tuple(s.stop - s.start for s in spec.index)
        whole = spec.gathered.index  # type: ignore[attr-defined]
        shape = [s.stop - s.start for s in whole]
        dim = dim_of_slices(shape, shards)
        assert parameter.shape[dim] <= -(-shape[dim] // shards)
    held = sum(w.untyped_storage().nbytes() for unit in sharded.units for w in unit.whole)
    assert (held == 0) == (context.parallel.zero == 3)
    for kind in ("all_gather", "reduce_scatter"):
        ledger = sharded.units[0].shards.ledger
        assert sum(t.payload_bytes for (op, _), t in ledger.entries.items() if op == kind)


def check_a_norm_beyond_its_squares(model: GPTModel, context: ParallelContext) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e200)
    norm = clip_gradients(model, context, 0.0)
    assert math.isclose(norm, 1e200 * math.sqrt(numbers(model)), rel_tol=1e-12)


def numbers(model: GPTModel) -> int:
    """Of the whole model, with the pad of its vocabulary."""
    specs = [shard_spec(parameter) for parameter in model.parameters()]
    return sum(math.prod(map(sum, zip(s.shape, s.pad or [0] * 9, strict=False))) for s in specs)


def check_levels(layout: dict[str, Any], changes: dict[str, Any], levels: list[Any]) -> list[int]:
    """On one rank: a checksum of the parameters at each level, after three updates."""
    config = tiny_config(**{**CONFIG, **changes})
    expected, found = train_dense(config), []
    first = init_parallel(ParallelConfig(**layout, **levels[0]))
    for level in levels:
        parallel = replace(first.parallel, **level)
        found.append(check_level(replace(first, parallel=parallel), config, expected))
    return found


L1, L2, L3 = {"zero": 1}, {"zero": 2}, {"zero": 3}
KEPT = {"zero": 3, "zero_keep": True}
LATE = {"zero": 3, "overlap": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], list[Any]]] = {
    "dp2": (2, {"dp_size": 2}, {"tied": False}, [L1, L2, L3, KEPT, LATE]),
    "dp3": (3, {"dp_size": 3, "recompute": "block"}, {"tied": True}, [L1, L2, L3]),
    "dp2-tp2": (
        *(4, {"dp_size": 2, "sequence_parallel": True, "recompute": "attention"}),
        *({"tied": True, "d_model": 26, "d_ff": 38}, [L1, L2, L3, KEPT]),
    ),
    "dp4-in-two-groups": (
        *(4, {"dp_size": 4, "dp_replicas": 2}, {"tied": False, "n_layers": 3}),
        [L1, L2, L3],
    ),
    "dp4-of-three-numbers": (
        *(4, {"dp_size": 4, "recompute": "block"}, {"tied": True, "d_model": 3}),
        [L1, L3],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_each_level_equals_one_dense_process(case: str) -> None:
    """Losses, gradients, norms, three clipped updates and moments; and alike on all ranks."""
    ranks, *rest = LAYOUTS[case]
    first, *others = run_ranks(ranks, check_levels, *rest)
    assert all(found == first for found in others)


def check_bad_step(level: int) -> None:
    """The second of three micro-batches of one rank has a nan; then the next step goes on."""
    config, context = tiny_config(**CONFIG), init_parallel(ParallelConfig(dp_size=3, zero=level))
    model, twin = built(config, context), built(config, context)
    optimizers = [build_optimizer(one, OPTIM) for one in (model, twin)]
    name, passes = "blocks.1.attention.dense.bias", []

    def spoil(gradient: Tensor) -> Tensor:
        passes.append(1)
        return gradient * math.nan if (context.rank, len(passes)) == (2, 2) else gradient

    model.get_parameter(name).register_hook(spoil)
    message = re.escape(f"rank 2 has nan or inf in a gradient: {name}")
    with pytest.raises(NonFiniteGradientError, match=message):
        compute_gradients(model, own_batches(context, config, 0), context)
    optimizers[0].zero_grad()
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        compute_gradients(one, own_batches(context, config, 1), context)
        optimizer.step()
    ours, expected = gather_whole(model), gather_whole(twin)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("level", [1, 3])
def test_a_bad_gradient_is_named_before_it_is_summed(level: int) -> None:
    run_ranks(3, check_bad_step, level)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_size": 1, "zero": 3}, "zero=3 .* dp_size=1 is one rank, so it does nothing"),
        ({"dp_size": 4, "zero": 1, "dp_replicas": 3}, "dp_replicas=3 .* it can be 1 or 2"),
        ({"dp_size": 4, "zero": 1, "dp_replicas": 4}, "dp_replicas=4 .* it can be 1 or 2"),
        ({"dp_size": 4, "dp_replicas": 2}, "dp_replicas=2 .* zero can be 1, 2 or 3"),
        ({"dp_size": 4, "zero": 2, "zero_keep": True}, "zero=2; zero can be 3"),
        ({"dp_size": 2, "zero": 2, "pp_size": 2}, "zero=2 does not go with a pipeline yet"),
        ({"dp_size": 2, "zero": 4}, "zero=4 must be"),
    ],
)
def test_what_zero_cannot_divide_is_refused(sizes: dict[str, Any], message: str) -> None:
    world = sizes["dp_size"] * sizes.get("pp_size", 1)
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**{"tp_size": 1, **sizes}).resolve(world)


def test_groups_of_shards_lie_within_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[list[int]]] = []

    def group_of(groups: list[list[int]], timeout: object) -> tuple[None, None]:
        made.append(groups)
        return None, None

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", group_of)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    parallel = ParallelConfig(dp_replicas=2)
    shard_axes(
        ParallelContext(Axis("tp", 2), Axis("dp", 4), pp=Axis("pp", 2), parallel=parallel), 1
    )
    shards, replicas = made
    assert shards == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert replicas == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]


def trained_in_bf16(
    context: ParallelContext, products: torch.dtype | None
) -> tuple[dict[str, Tensor], set[torch.dtype], int]:
    """Whole weights after three updates, in what a block's weights are gathered, how often."""
    config = tiny_config(**CONFIG)
    model = GPTModel(config, context)
    load_whole(model, {n: w.float() for n, w in dense_model(config).state_dict().items()})
    shard_model(model, context, products=products)
    sharded = sharding_of(model)
    assert sharded
    ledger = sharded.units[0].shards.ledger
    ledger.clear()
    optimizer = build_optimizer(model, OPTIM)
    autocast = autocast_for(torch.bfloat16, context.device)
    for step in range(STEPS):
        batches = own_batches(context, config, step)
        compute_gradients(model, batches, context, autocast, DropoutSeed(5, step))
        optimizer.step()
        optimizer.zero_grad()
    dtypes = {max(unit.whole, key=Tensor.numel).dtype for unit in sharded.units[1:]}
    times = sum(
        t.calls for (operation, _), t in ledger.entries.items() if operation == "all_gather"
    )
    return gather_whole(model), dtypes, times


def check_bf16() -> None:
    first = init_parallel(ParallelConfig(dp_size=4))
    for level, replicas in ((1, 1), (2, 1), (3, 2)):
        layout = replace(first.parallel, zero=level, dp_replicas=replicas)
        context = replace(first, parallel=layout)
        plain, wide, often = trained_in_bf16(context, None)
        found, short, times = trained_in_bf16(context, torch.bfloat16)
        assert (wide, short) == ({torch.float32}, {torch.bfloat16})
        assert times == often > 0
        assert all(torch.equal(found[name], plain[name]) for name in plain), level


def test_weights_that_are_gathered_in_bf16_train_bitwise_alike() -> None:
    """As if they were gathered whole and then cast."""
    run_ranks(4, check_bf16)


def test_matrices_are_dealt_to_the_shard_that_holds_least() -> None:
    sizes = [6, 3, 2, 5, 4]
    matrices = [replicated_parameter((size, 2), Axis("tp")) for size in sizes]
    assert [*owners(matrices, 3).values()] == [0, 1, 2, 2, 1]

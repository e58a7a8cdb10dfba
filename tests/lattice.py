"""Layouts that meet every pair of settings, each trained for a few steps beside one process.

One process is the dense oracle of the family, and our own model at tp 1 for the encoder-decoder
with GPT-2's blocks, whose own test holds it against torch's layers.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pairwise
import torch
from oracle import TOLERANCE
from ranks import run_ranks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rosetrainer.config import IGNORED, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.encoder_decoder import EncoderDecoderModel
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.frozen import freeze
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel import data_parallel
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.sharding import draw_whole, gather_whole, load_whole, shard_spec
from rosetrainer.parallel.zero.groups import GroupUnit, shard_model
from rosetrainer.parallel.zero.sharded_model import ShardedModel, sharding_of
from rosetrainer.parallel.zero.unit import Unit
from rosetrainer.proof.batches import inputs_of
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.reference import ReferenceDropout
from rosetrainer.training.step import compute_gradients

ROWS, T, S, STEPS, CLIP, SGD_RATE = 8, 8, 16, 3, 0.05, 0.5
BUCKET_BYTES = 20_000  # of gradients that are summed together: several, and none of them full
FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2)),  # tp, dp
    "sequence_parallel": (False, True),
    "recompute": ("none", "attention", "block"),
    "dropout": (0.0, 0.1),
    "overlap": (True, False),
    "tied": (True, False),
    "vocab_size": (139, 29, 256),  # the last one needs no pad; of 29, most ranks hold none
    "encoder_decoder": (False, True),
    "micro_batches": (1, 2),
}
ALIVE = ("losses", "norms", "stood still")
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.3, global_batch_size=ROWS)


@dataclass(frozen=True)
class Layout:
    ranks: tuple[int, int]
    sequence_parallel: bool
    recompute: Any
    dropout: float
    overlap: bool
    tied: bool
    vocab_size: int
    encoder_decoder: bool
    micro_batches: int
    choices: tuple[tuple[str, Any], ...] = ()
    """Of another family than GPT-2, by the config's names, the architecture first."""
    zero: tuple[int, bool, int] = (0, False, 1)
    """Level, whether what is gathered is kept, replicas."""
    frozen: str = ""
    """Patterns of the names of parameters that are not trained."""

    def __str__(self) -> str:
        on = ["encoder-decoder"] * self.encoder_decoder + ["GPT"] * (not self.choices)
        on += [f"{name} {value}" for name, value in self.choices]
        on += [f"ZeRO {self.zero[0]}, {self.zero[2]} replicas"] * (self.zero[0] > 0)
        on += [f"tp {self.ranks[0]} x dp {self.ranks[1]}", f"V {self.vocab_size}"]
        on += [f"frozen {self.frozen}"] * bool(self.frozen)
        on += ["tied"] * self.tied + ["sequence-parallel"] * self.sequence_parallel
        on += [f"recompute {self.recompute}"] * (self.recompute != "none")
        on += [f"dropout {self.dropout}"] * (self.dropout > 0) + ["overlap"] * self.overlap
        return ", ".join([*on, f"{self.micro_batches} micro-batches"])

    @property
    def parallel(self) -> ParallelConfig:
        tp, dp = self.ranks
        zero = dict(zip(("zero", "zero_keep", "dp_replicas"), self.zero, strict=True))
        how: dict[str, Any] = {"recompute": self.recompute, "overlap": self.overlap, **zero}
        return ParallelConfig(tp, dp, self.sequence_parallel, **how)

    @property
    def model(self) -> GPTConfig:
        shape = {"context_length": S, "n_layers": 2, "n_heads": 8, "d_model": 24, "d_head": 5}
        how = {"d_ff": 40, "tied": self.tied, "dropout": self.dropout}
        choices: dict[str, Any] = dict(self.choices)
        return GPTConfig(self.vocab_size, **{**shape, **how, **choices})

    @property
    def function(self) -> Layout:
        """What is computed, whatever the layout: the same layout on one rank."""
        plain = replace(self, sequence_parallel=False, recompute="none", overlap=True)
        return replace(plain, ranks=(1, 1), micro_batches=1, zero=(0, False, 1))


LLAMA = (("architecture", "llama"), ("d_head", 6), ("bias", False))
BERT = (("architecture", "bert"),)
GLM = (("architecture", "glm"),)
XL = (("architecture", "transformer_xl"),)
T5 = (("architecture", "t5"), ("bias", False), ("relative_buckets", 8), ("relative_distance", 9))
FAMILIES = (
    Layout(
        *((4, 1), True, "none", 0.0, True, False, 139, False, 2),
        (*LLAMA, ("n_kv_heads", 2), ("qk_norm", True), ("qkv_bias", True)),
    ),
    Layout(
        *((2, 2), False, "attention", 0.1, True, True, 29, False, 1),
        (*LLAMA, ("n_kv_heads", 1)),
    ),
    Layout(
        *((4, 2), True, "block", 0.0, False, False, 256, False, 1),
        (*LLAMA[:2], ("n_kv_heads", 4), ("norm", "layernorm"), ("activation", "relu")),
    ),
    Layout(*((2, 2), True, "block", 0.1, True, True, 139, False, 1), BERT),
    Layout(
        *((4, 1), False, "attention", 0.0, False, True, 29, False, 2),
        (*BERT, ("activation", "relu"), ("norm_eps", 0.01)),
    ),
    Layout(*((2, 2), True, "block", 0.1, True, True, 139, False, 2), GLM),
    Layout(
        *((4, 1), False, "attention", 0.0, True, False, 29, False, 1),
        (*GLM, ("activation", "relu"), ("bias", False)),
    ),
    Layout(*((2, 2), True, "attention", 0.1, True, True, 139, False, 2), XL),
    Layout(*((4, 1), False, "none", 0.0, False, False, 29, False, 1), (*XL, ("d_head", 5))),
    Layout(*((2, 2), True, "block", 0.1, True, True, 29, False, 2), T5),
    Layout(
        *((4, 1), False, "attention", 0.0, True, False, 139, False, 1),
        (*T5, ("activation", "geglu_tanh")),
    ),
)


KEYS = (*LLAMA, ("n_kv_heads", 1), ("qk_norm", True))
ZEROS = (
    Layout(*((1, 4), False, "none", 0.1, True, False, 29, False, 2), zero=(1, False, 1)),
    Layout(*((2, 2), True, "attention", 0.0, True, True, 139, False, 2), zero=(2, False, 1)),
    Layout(*((1, 4), False, "block", 0.0, False, True, 139, False, 2), zero=(3, False, 2)),
    Layout(*((2, 2), True, "none", 0.1, True, False, 29, True, 2), zero=(3, False, 1)),
    Layout(*((2, 2), False, "none", 0.0, True, True, 29, False, 1), KEYS, zero=(3, True, 1)),
    Layout(*((1, 2), False, "none", 0.1, True, False, 139, False, 2), T5, zero=(3, False, 1)),
    Layout(*((1, 4), False, "none", 0.1, True, True, 29, False, 1), BERT, zero=(3, False, 2)),
    Layout(*((2, 2), True, "attention", 0.0, True, False, 139, False, 2), GLM, zero=(3, False, 1)),
    Layout(*((1, 2), False, "block", 0.1, False, False, 29, False, 2), XL, zero=(3, True, 1)),
)
FROZEN = (
    Layout(
        *((2, 2), True, "none", 0.1, True, True, 139, False, 2),
        frozen="token_embedding*,blocks.0.*",
    ),
    Layout(
        *((1, 2), False, "none", 0.0, True, False, 29, False, 2),
        zero=(1, False, 1),
        frozen="*embedding*,final_norm*,output_head*,blocks.0.attention.*",
    ),
    Layout(
        *((2, 2), False, "block", 0.0, True, False, 139, False, 2),
        zero=(3, False, 1),
        frozen="*embedding*,blocks.0.feed_forward.*,blocks.1.*",
    ),
    Layout(
        *((1, 4), False, "attention", 0.1, True, True, 29, False, 2),
        zero=(3, False, 2),
        frozen="*embedding*,blocks.0.*",
    ),
)


@functools.cache
def layouts() -> list[Layout]:
    """Those that meet every pair of settings, and some of each other family."""
    return [
        *(Layout(*row) for row in pairwise.rows(list(FACTORS.values()))),
        *FAMILIES,
        *ZEROS,
        *FROZEN,
    ]


def build(layout: Layout, context: ParallelContext) -> nn.Module:
    """In float64, with weights that no bias makes zero and no norm one."""
    kind = EncoderDecoderModel if layout.encoder_decoder else build_model
    model = kind(layout.model, context).double()
    specs = {name: shard_spec(p) for name, p in model.named_parameters()}
    noisy = {name: replace(spec, init_std=0.3) for name, spec in specs.items()}
    load_whole(model, {name: draw_whole(spec, 2, name) for name, spec in noisy.items()})
    freeze(model, layout.frozen or None)
    shard_model(model, context)
    return model


def batch(layout: Layout, step: int) -> tuple[Tensor, ...]:
    """The global batch: what the model takes, the labels last; rows count unequally many tokens."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(layout.vocab_size, (3, ROWS, S), generator=generator)
    target, labels, source = drawn[0, :, :T], drawn[1, :, :T].clone(), drawn[2]
    for row in range(ROWS):
        labels[row, : row + 1] = IGNORED  # the last row has none
    if step == 1:
        labels[2:] = IGNORED  # wherever there are several, the last rank of dp has none
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[2, 9:] = target_mask[3, 6:] = 0
    if layout.model.architecture == "t5":
        return source, source_mask, target, labels
    if layout.model.architecture == "glm":
        return (*inputs_of(layout.model, target, generator), labels)
    if not layout.encoder_decoder:
        return target, labels
    source_mask[1, :3] = 0
    return source, target, source_mask, target_mask, labels.masked_fill(target_mask == 0, IGNORED)


def oracle_optimizer(dense: nn.Module) -> torch.optim.AdamW:
    """torch's own, for what OPTIM says."""
    tables = ("position", "token_type", "coder_bias")  # of what is added, not multiplied with
    every = list(dense.named_parameters())
    is_matrix = [p.dim() == 2 and not any(one in n for one in tables) for n, p in every]
    decayed = [p for (_, p), matrix in zip(every, is_matrix, strict=True) if matrix]
    others = [p for (_, p), matrix in zip(every, is_matrix, strict=True) if not matrix]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(OPTIM.beta1, OPTIM.beta2))


@torch.no_grad()
def update(model: nn.Module, optimizer: Any, step: int) -> None:
    """The first of SGD, by which a wrong scale shows that Adam would hide; then the optimizer's."""
    if step:
        optimizer.step()
        return
    for parameter in trained(model).values():
        assert parameter.grad is not None
        parameter.sub_(parameter.grad, alpha=SGD_RATE)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_process(layout: Layout) -> dict[str, Any]:
    """Logits, losses, norms, first gradients, and weights and moments at the end."""
    if layout.encoder_decoder:
        return train(layout, ParallelContext())
    whole = gather_whole(build(layout, ParallelContext()))
    dense = build_reference(layout.model).double()
    dense.load_state_dict(whole)
    for name, parameter in dense.named_parameters():
        still = any(fnmatch(name, pattern) for pattern in layout.frozen.split(","))
        parameter.requires_grad_(not still)
    optimizer = oracle_optimizer(dense)
    start = {name: p.detach().clone() for name, p in dense.named_parameters()}
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        *inputs, labels = batch(layout, step)
        dropout = ReferenceDropout(layout.dropout, 1, step)
        logits, loss = dense(*inputs, labels=labels, dropout=dropout)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in dense.named_parameters() if p.grad is not None}
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for parameter in trained(dense).values():
            assert parameter.grad is not None
            parameter.grad.mul_((CLIP / norm).clamp(max=1))
        update(dense, optimizer, step)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        if step == 0:
            found |= {"logits": logits.detach(), "gradients": gradients}
    found["weights"] = {n: p.detach() for n, p in dense.named_parameters()}
    found["stood still"] = [n for n, whole in found["weights"].items() if whole.equal(start[n])]
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {n: optimizer.state[p][key] for n, p in trained(dense).items()}
    return found


def train(layout: Layout, context: ParallelContext) -> dict[str, Any]:
    """What one_process finds, in the layout; and what moved and was kept in the first step."""
    model, dp = build(layout, context), context.dp
    optimizer = build_optimizer(model, OPTIM)
    start = {name: whole.clone() for name, whole in gather_whole(model).items()}
    size = ROWS // dp.size // layout.micro_batches
    firsts = [(i * dp.size + dp.rank) * size for i in range(layout.micro_batches)]
    found: dict[str, Any] = {"losses": [], "norms": []}
    axes = list(context.axes)
    if sharded := sharding_of(model):
        first = sharded.units[0]
        assert isinstance(first, GroupUnit)
        more = (first.shards, first.replicas)
        axes += [axis for axis in more if axis not in axes]
        found["gathered"] = spy_on_gathers(sharded)
    for step in range(STEPS):
        optimizer.zero_grad()
        whole, seed = batch(layout, step), DropoutSeed(1, step)
        parts = [tuple(t[first : first + size] for t in whole) for first in firsts]
        if step == 0:
            own = [replace(seed, first_row=first) for first in firsts]
            with torch.no_grad():
                pairs = zip(parts, own, strict=True)
                found["logits"] = torch.cat([model(*p[:-1], seed=s)[0] for p, s in pairs])
            # Slices or not, it is the same that autograd saves besides parameters.
            plain = replace(context, parallel=replace(context.parallel, zero=0))
            found["kept"] = kept(build(layout, plain), parts[0], own[0])
        for axis in axes:
            axis.ledger.clear()
        batches = [(first, *part) for first, part in zip(firsts, parts, strict=True)]
        found["losses"].append(compute_gradients(model, batches, context, seed=seed))
        if step == 0:
            found["norms"].append(clip_gradients(model, context, 0.0))
            found["gradients"] = {
                name: shard_spec(p).unshard(p.grad, "checkpoint").clone()
                for name, p in trained(model).items()
                if p.grad is not None
            }
            for axis in axes:
                axis.ledger.clear()
        norm = clip_gradients(model, context, CLIP)
        if step == 1:  # the first one finds parameters that the logits have gathered
            found["ledger"] = [
                ((axis.name, *key), (t.calls, t.payload_bytes))
                for axis in axes
                for key, t in axis.ledger.entries.items()
            ]
        found["norms"] += [norm] if step else []
        update(model, optimizer, step)
    found["rows"] = [row for first in firsts for row in range(first, first + size)]
    found["weights"] = gather_whole(model)
    found["stood still"] = [n for n, whole in found["weights"].items() if whole.equal(start[n])]
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {
            name: shard_spec(p).unshard(optimizer.state[p][key], "checkpoint")
            for name, p in trained(model).items()
        }
    found["held"] = held(model, optimizer)
    found["frozen"] = [name for name, p in model.named_parameters() if not p.requires_grad]
    return found


def kept(model: nn.Module, inputs: tuple[Tensor, ...], seed: DropoutSeed) -> int:
    """Bytes that autograd really saves for the backward pass, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = saved_by(lambda: model(*inputs[:-1], labels=inputs[-1], return_logits=False, seed=seed))
    return sum(size for address, size in saved.items() if address not in weights)


def saved_by(forward: Callable[[], object]) -> dict[int, int]:
    """The bytes of each storage that autograd saves in a forward pass, by address."""
    saved: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return {address: size for address, (_, size) in saved.items()}


def spy_on_gathers(sharded: ShardedModel) -> list[int]:
    """From now on the bytes of what is gathered whenever a unit's rows have come."""
    found: list[int] = []

    def fill(unit: Unit, whole: list[Tensor], rows: Tensor) -> None:
        original(unit, whole, rows)
        tensors = [tensor for one in sharded.units for tensor in one.whole]
        found.append(rows.nbytes + sum(t.untyped_storage().nbytes() for t in tensors))

    original, Unit._fill = Unit._fill, fill  # type: ignore[assignment, method-assign]
    return found


def held(model: nn.Module, optimizer: torch.optim.Optimizer | AdamW) -> dict[str, int]:
    """Bytes of what stays from step to step."""
    groups: dict[str, list[Tensor]] = {
        "parameters": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [t for p in model.parameters() for t in optimizer.state[p].values()],
    }
    if sharded := sharding_of(model):
        units = sharded.units
        groups["parameters"] = [t for unit in units for t in (unit.row, *unit.whole)]
        storages = {
            name: {t.untyped_storage()._cdata: t for t in ts} for name, ts in groups.items()
        }
        return {
            name: sum(t.untyped_storage().nbytes() for t in ts.values())
            for name, ts in storages.items()
        }
    return {name: sum(t.numel() * t.element_size() for t in ts) for name, ts in groups.items()}


def errors(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The worst |ours - expected| / largest of each check, over all its tensors."""
    rows = expected["logits"][ours["rows"]]
    found = {"logits": relative(ours["logits"], rows)}
    for key in ("losses", "norms"):
        pairs = zip(ours[key], expected[key], strict=True)
        found[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    for key in ("gradients", "weights", "exp_avg", "exp_avg_sq"):
        assert ours[key].keys() == expected[key].keys()
        found[key] = max(worst(name, ours[key], expected[key]) for name in expected[key])
    return found


def worst(name: str, ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """A key bias moves nothing, so what it has is rounding: its attention layer is its measure."""
    parts = 3 if name.endswith("query_key_value.bias") else 2
    if not name.endswith("key_value.bias"):
        return relative(ours[name], expected[name])
    layer = name.removesuffix("bias").rsplit(".", 2)[0]
    largest = max(float(t.abs().max()) for n, t in expected.items() if n.startswith(f"{layer}."))
    pairs = list(zip(ours[name].chunk(parts), expected[name].chunk(parts), strict=True))
    whole = float(expected[name].abs().max())
    scales = [largest if i == parts - 2 else whole for i in range(parts)]
    return max(relative(a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True))


def relative(ours: Tensor, expected: Tensor, largest: float | None = None) -> float:
    assert ours.dtype == expected.dtype == torch.float64
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max()) / (largest or float(expected.abs().max()))


def compare(chosen: list[tuple[Layout, str]]) -> list[dict[str, Any]]:
    """On one rank: the errors of each layout, what moved and what was held."""
    data_parallel.BUCKET_BYTES = BUCKET_BYTES
    results = []
    for layout, path in chosen:
        ours = train(layout, init_parallel(layout.parallel))
        expected = torch.load(path, weights_only=True)
        kept_here = {"kept": ours["kept"], "held": ours["held"], "ledger": ours["ledger"]}
        kept_here["frozen"] = ours["frozen"]
        if layout.zero[0] == 3:
            kept_here["held"]["gathered"] = max(ours["gathered"])
        alive = [{key: side[key] for key in ALIVE} for side in (ours, expected)]
        results.append({"errors": errors(ours, expected), "alive": alive, **kept_here})
    return results


def results() -> dict[Layout, list[dict[str, Any]]]:
    """What each rank found, for each layout; ranks are started once for each number of them."""
    found: dict[Layout, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[Layout, str] = {}
        for function in {layout.function for layout in layouts()}:
            paths[function] = str(Path(folder) / f"{len(paths)}.pt")
            torch.save(one_process(function), paths[function])
        for world in (1, 2, 4, 8):
            chosen = [one for one in layouts() if one.ranks[0] * one.ranks[1] == world]
            work = [(layout, paths[layout.function]) for layout in chosen]
            by_rank = run_ranks(world, compare, work)
            found |= {one: list(r) for one, *r in zip(chosen, *by_rank, strict=True)}
    return found


def is_equal(error: float) -> bool:
    return error <= TOLERANCE  # false for nan too

"""Pipelined layouts, each trained for a few steps beside the dense oracle.

Shape letters: T sequence. Every step has another global batch, in float64.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pairwise
import torch
import torch.nn.functional as F
from lattice import oracle_optimizer, worst
from ranks import run_ranks
from torch import Tensor, nn

from rosetrainer.config import IGNORED, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.pipeline.runner import last_hidden, last_logits
from rosetrainer.parallel.replicas import checksum
from rosetrainer.parallel.sharding import draw_whole, gather_whole, load_whole, shard_spec
from rosetrainer.parallel.zero.groups import shard_model
from rosetrainer.parallel.zero.in_stages import whole_for_a_step
from rosetrainer.parallel.zero.sharded_model import sharding_of
from rosetrainer.parallel_config import STAGES_PER_RANK
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.reference import ReferenceDropout, ReferenceGPT
from rosetrainer.training.step import compute_gradients

T, ROWS_EACH, STEPS, CLIP, SGD_RATE = 8, 2, 3, 0.05, 0.5
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.3)


@dataclass(frozen=True)
class Layout:
    """The first step of a run is one of SGD, the others are AdamW's; all are clipped."""

    pp: int
    schedule: Any = "1f1b"
    micro_batches: int = 5
    layers: int = 5
    tied: bool = True
    tp: int = 1
    dp: int = 1
    stages_per_rank: int | None = None
    stage_layers: str | None = None
    sequence_parallel: bool = False
    recompute: Any = "none"
    dropout: float = 0.0
    kv_heads: int | None = None
    """Of the Llama family; without any it is GPT-2."""
    zero: int = 0

    def __str__(self) -> str:
        on = [f"pp {self.pp} x dp {self.dp} x tp {self.tp}", self.schedule]
        on += [f"ZeRO {self.zero}"] * (self.zero > 0)
        on += [f"v {self.stages_per_rank}"] * bool(self.stages_per_rank)
        on += [f"m {self.micro_batches}", f"{self.layers} layers"]
        on += [f"as {self.stage_layers}"] * bool(self.stage_layers) + ["tied"] * self.tied
        on += ["sequence-parallel"] * self.sequence_parallel
        on += [f"Llama with {self.kv_heads} kv heads"] * bool(self.kv_heads)
        on += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return ", ".join([*on, *[f"dropout {self.dropout}"] * (self.dropout > 0)])

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            self.tp,
            self.dp,
            self.sequence_parallel,
            self.recompute,
            pp_size=self.pp,
            pp_schedule=self.schedule,
            stages_per_rank=self.stages_per_rank,
            stage_layers=self.stage_layers,
            zero=self.zero,
        )

    @property
    def model(self) -> GPTConfig:
        shape = {"context_length": 2 * T, "n_layers": self.layers, "n_heads": 4, "d_model": 24}
        how = {"d_head": 5, "d_ff": 40, "tied": self.tied, "dropout": self.dropout}
        gpt2 = GPTConfig(139, **shape, **how)  # type: ignore[arg-type]
        if self.kv_heads is None:
            return gpt2
        llama = replace(gpt2, architecture="llama", bias=False, d_head=6, qk_norm=True)
        return replace(llama, n_kv_heads=self.kv_heads)

    @property
    def rows(self) -> int:
        return self.dp * self.micro_batches * ROWS_EACH

    @property
    def function(self) -> Layout:
        """What is computed, whatever the layout."""
        plain = Layout(1, "1f1b", self.micro_batches, self.layers, self.tied, dp=self.dp)
        return replace(plain, dropout=self.dropout, kv_heads=self.kv_heads)


FUNCTIONS = (
    {"micro_batches": 3, "layers": 5},
    {"micro_batches": 5, "layers": 7, "tied": False, "dropout": 0.1},
    {"micro_batches": 8, "layers": 8},
    {"micro_batches": 8, "layers": 7, "tied": False, "kv_heads": 1},
    {"micro_batches": 3, "layers": 8, "dropout": 0.1, "kv_heads": 1},
)
"""What is computed; few, for the oracle takes as long as the ranks."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": ((2, 1, 1), (3, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)),  # pp, tp, dp
    "schedule": ("afab", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"),
    "function": tuple(range(len(FUNCTIONS))),
    "sequence_parallel": (False, True),
    "recompute": ("none", "attention", "block"),
}


def can_run(row: tuple[Any, ...]) -> bool:
    """Whether the schedule can run with these ranks, micro-batches and layers."""
    (pp, _, _), schedule, function, *_ = row
    sizes: Any = FUNCTIONS[function]
    stages = pp * STAGES_PER_RANK[schedule][0]
    whole = schedule != "interleaved" or sizes["micro_batches"] % pp == 0
    return stages <= sizes["layers"] and whole


@functools.cache
def rows() -> list[tuple[Any, ...]]:
    """Of FACTORS, those that meet every pair of settings that can be met."""
    return pairwise.rows(list(FACTORS.values()), can_run)


def layout_of(row: tuple[Any, ...]) -> Layout:
    (pp, tp, dp), schedule, function, sequence_parallel, recompute = row
    how: Any = {"sequence_parallel": sequence_parallel, "recompute": recompute}
    return Layout(pp, schedule, tp=tp, dp=dp, **FUNCTIONS[function], **how)


EIGHT_RANKS = [
    Layout(2, "1f1b", 3, 5, dp=2, tp=2, dropout=0.1, sequence_parallel=True),
    Layout(2, "zero-bubble-v", 5, 7, tied=False, dp=2, tp=2),
    Layout(4, "zero-bubble", 5, 7, dp=2),
]


def whole_weights(config: GPTConfig) -> dict[str, Tensor]:
    """With biases that are not zero and norms that are not one."""
    model = build_model(config, ParallelContext(device=torch.device("meta")))
    noisy = {n: replace(shard_spec(p), init_std=0.3) for n, p in model.named_parameters()}
    return {name: draw_whole(spec, 2, name).double() for name, spec in noisy.items()}


def batch(layout: Layout, step: int) -> tuple[Tensor, Tensor]:
    """The global batch; rows count unequally many tokens, the second micro-batch has none.

    In the second step the last dp rank has none either, where there are several.
    """
    generator = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(139, (2, layout.rows, T), generator=generator)
    for row in range(layout.rows):
        labels[row, : row % T] = IGNORED
    labels[ROWS_EACH : 2 * ROWS_EACH] = IGNORED
    if step == 1 and layout.dp > 1:
        labels.view(-1, layout.dp, ROWS_EACH, T)[:, -1] = IGNORED
    return ids, labels


def dense_logits(dense: ReferenceGPT, ids: Tensor, dropout: ReferenceDropout) -> Tensor:
    """Of all rows at once, or, as the oracle's masks are made by row, row by row."""
    if not dropout.p:
        return dense.logits(ids, dropout, 0)
    return torch.cat([dense.logits(one[None], dropout, row) for row, one in enumerate(ids)])


def one_process(layout: Layout) -> dict[str, Any]:
    """Logits, losses, norms, gradients of two steps, and weights and moments at the end."""
    dense = build_reference(layout.model).double()
    dense.load_state_dict(whole_weights(layout.model))
    optimizer = oracle_optimizer(dense)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        ids, labels = batch(layout, step)
        dropout = ReferenceDropout(layout.dropout, 1, step)
        logits = dense_logits(dense, ids, dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in dense.named_parameters() if p.grad is not None}
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        if step == 0:
            found |= {"logits": logits.detach()}
        if step < 2:
            found[f"gradients {step}"] = gradients
        with torch.no_grad():
            for parameter in dense.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_((CLIP / norm).clamp(max=1))
                if step == 0:
                    parameter.sub_(parameter.grad, alpha=SGD_RATE)
        if step:
            optimizer.step()
    found["weights"] = {n: p.detach() for n, p in dense.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {n: optimizer.state[p][key] for n, p in dense.named_parameters()}
    return found


def build(layout: Layout, context: ParallelContext) -> nn.Module:
    model = build_model(layout.model, context).double()
    whole = whole_weights(layout.model)
    load_whole(model, {name: whole[name] for name, _ in model.named_parameters()})
    shard_model(model, context)
    return model


def train(layout: Layout, context: ParallelContext) -> dict[str, Any]:
    """What one_process finds, of this rank's stages; and what moved in the first step."""
    model, dp = build(layout, context), context.dp
    optimizer = build_optimizer(model, OPTIM)
    firsts = [(i * dp.size + dp.rank) * ROWS_EACH for i in range(layout.micro_batches)]
    found: dict[str, Any] = {"losses": [], "norms": []}
    start = {name: whole.clone() for name, whole in gather_whole(model).items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        ids, labels = batch(layout, step)
        seed = DropoutSeed(1, step)
        parts = [slice(first, first + ROWS_EACH) for first in firsts]
        if step == 0:
            with torch.no_grad(), whole_for_a_step(sharding_of(model)):
                found["logits"] = [
                    last_logits(
                        model, ids[p], context=context, seed=replace(seed, first_row=p.start)
                    )
                    for p in parts
                ]
                found["hidden"] = last_hidden(model, ids[parts[0]], context=context)
            moved = context.pp.ledger.entries
            assert {phase for _, phase in moved} == ({"forward"} if context.pp.size > 1 else set())
        for axis in context.axes:
            axis.ledger.clear()
        batches = [(part.start, ids[part], labels[part]) for part in parts]
        found["losses"].append(compute_gradients(model, batches, context, seed=seed))
        if step == 1:  # the first one finds parameters that the logits have gathered
            clip_gradients(model, context, 0.0)
            found["ledger"] = [
                ((axis.name, *key), (t.calls, t.payload_bytes))
                for axis in context.axes
                for key, t in axis.ledger.entries.items()
            ]
        if step < 2:
            gradients = gather_whole(model, gradients=True)
            found[f"gradients {step}"] = {n: g.clone() for n, g in gradients.items()}
        found["norms"].append(clip_gradients(model, context, CLIP))
        if step:
            optimizer.step()
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=SGD_RATE)
    found["rows"] = [row for first in firsts for row in range(first, first + ROWS_EACH)]
    found["weights"] = gather_whole(model)
    found["stood still"] = [n for n, whole in found["weights"].items() if whole.equal(start[n])]
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {
            name: shard_spec(p).unshard(optimizer.state[p][key], "checkpoint")
            for name, p in model.named_parameters()
        }
    alike = found["weights"] if layout.zero else dict(model.named_parameters())
    found["checksums"] = {name: int(checksum(tensor)) for name, tensor in alike.items()}
    return found


def errors(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest of each kind, over the tensors of this rank, as a share of the largest value."""
    found = {}
    if ours["logits"][0] is not None:
        right = expected["logits"][ours["rows"]]
        off = (torch.cat(ours["logits"]) - right).abs().max()
        found["logits"] = float(off / right.abs().max())
    for key in ("losses", "norms"):
        pairs = zip(ours[key], expected[key], strict=True)
        found[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    for key in ("gradients 0", "gradients 1", "weights", "exp_avg", "exp_avg_sq"):
        # A key bias is held against its attention layer, which lies on one stage as a whole.
        right = {name: expected[key][name] for name in ours[key]}
        found[key] = max(worst(name, ours[key], right) for name in right)
    return found


def compare(chosen: list[tuple[Layout, str]]) -> list[dict[str, Any]]:
    """On one rank: the errors of each layout, what it has and what moved."""
    results = []
    for layout, path in chosen:
        ours = train(layout, init_parallel(layout.parallel))
        expected = torch.load(path, weights_only=True)
        kept = {key: ours[key] for key in ("ledger", "checksums", "stood still", "losses", "norms")}
        kept["has hidden"] = ours["hidden"] is not None
        results.append({"errors": errors(ours, expected), **kept})
    return results


def results(layouts: list[Layout]) -> dict[Layout, list[dict[str, Any]]]:
    """What each rank found, for each layout; ranks are started once for each number of them."""
    found: dict[Layout, list[dict[str, Any]]] = {}

    def world(layout: Layout) -> int:
        return layout.pp * layout.dp * layout.tp

    with tempfile.TemporaryDirectory() as folder:
        paths: dict[Layout, str] = {}
        for function in {layout.function for layout in layouts}:
            paths[function] = str(Path(folder) / f"{len(paths)}.pt")
            torch.save(one_process(function), paths[function])
        for size, group in itertools.groupby(sorted(layouts, key=world), world):
            chosen = list(group)
            work = [(layout, paths[layout.function]) for layout in chosen]
            by_rank = run_ranks(size, compare, work)
            found |= {one: list(r) for one, *r in zip(chosen, *by_rank, strict=True)}
    return found

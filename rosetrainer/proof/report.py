"""The report of a proof: who holds what, and how far each result lies from that of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from rosetrainer.checkpoint.huggingface.load import Weights
from rosetrainer.config import GPTConfig, OptimConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.pipeline.stage import layers_of_stages, owners_of_stages
from rosetrainer.parallel.sharding import ShardSpec, shard_spec
from rosetrainer.proof.batches import ROWS, UPDATES, micro_batches_of
from rosetrainer.proof.letters import first_wrong_letter
from rosetrainer.proof.pretrained import PretrainedProof
from rosetrainer.proof.tolerances import (
    Column,
    Difference,
    ParityError,
    by_stage,
    not_proven,
    prove,
)
from rosetrainer.proof.trajectory import (
    GRADIENTS,
    LONGEST,
    MOVES,
    STAGES,
    UPDATED,
    Proof,
)


def part_of(spec: ShardSpec, rank: int) -> str:
    """What of a parameter this tp rank holds, as an index into the whole."""
    cuts = tuple(replace(cut, axis=replace(cut.axis, rank=rank)) for cut in spec.cuts)
    if all(cut.parts == 1 for cut in cuts):
        return "all of it"
    place = [":"] * len(spec.shape)
    for cut in cuts:
        own, end = replace(spec, cuts=cuts).index[cut.dim], spec.shape[cut.dim]
        place[cut.dim] = f"{own.start}:{min(own.stop, end)}" if own.start < end else "pad"
    return f"[{', '.join(place)}]"


def who_holds_what(model: GPTModel, tp_size: int) -> str:
    """A table: each weight's whole shape, and the slice of it that each tp rank holds."""
    last = model.config.n_layers - 1
    numbers = f".0-{last}." if last else ".0."
    rows = [("weight", "whole", *(f"rank {rank}" for rank in range(tp_size)))]
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.", "encoder.")) and ".0." not in name:
            continue  # every block is cut alike
        spec = shard_spec(parameter)
        slices = [part_of(spec, rank) for rank in range(tp_size)]
        whole = " x ".join(map(str, spec.shape))
        rows.append((name.replace(".0.", numbers, 1), whole, *slices))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def stages_of_ranks(config: GPTConfig, context: ParallelContext) -> Iterator[str]:
    """Lines of which pp rank has which blocks of a pipeline, and the ends."""
    if context.pp.size == 1:
        return
    every = layers_of_stages(config, context.parallel)
    owners = owners_of_stages(context.parallel)
    yield f"\nof the stages of a pipeline, {context.parallel.pp_schedule}\n"
    for stage, (layers, owner) in enumerate(zip(every, owners, strict=True)):
        blocks = f"blocks {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"block {layers[0]}"
        begins = "embedding, " * (stage == 0)
        ends = ", last norm, output head" * (stage == len(every) - 1)
        yield f"  stage {stage} on pp rank {owner}: {begins}{blocks}{ends}"


def show_proof(
    config: GPTConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    optim: OptimConfig | None = None,
    whole: bool = False,
    given: Weights | None = None,
    kernels: str = "auto",
) -> None:
    """Rank 0 prints who holds what, and whether the layout computes what one process does.

    whole: prove all of context_length, however long. given: weights to prove it on, instead of
    random ones. kernels: of choose_kernels. Raises ParityError, on every rank, if it does not.
    """
    tp = context.tp
    length = config.context_length
    if not whole and length > LONGEST:
        length = LONGEST // tp.size * tp.size  # which sequence parallelism can divide
    short = replace(config, context_length=length)
    proof = Proof(short, context, optim or OptimConfig(), kernels=kernels)
    if given:
        proof = PretrainedProof(short, context, proof.optim, kernels=kernels, weights=given)
    columns = prove(proof, dtype)
    if context.rank == 0:
        every_stage = replace(context, device=torch.device("meta"), pp=Axis("pp"))
        shapes_only = build_model(config, every_stage)
        print("\nwho holds what\n\n" + who_holds_what(shapes_only, tp.size))
        for line in stages_of_ranks(config, context):
            print(line)
        print("\nsame as one process? worst difference / largest value\n")
        print("\n".join(table(columns, proof.optim)))
        rows = micro_batches_of(context.parallel) * ROWS * context.dp.size
        part = "all" if length == config.context_length else f"of the {config.context_length:,}"
        print(f"\n{rows} sequences of {length:,} tokens, {part} of context_length")
        if idle := not_proven(proof):
            print(f"no gradient in truth, so not proven: {', '.join(idle)}")
    for column in columns:
        if wrong := column.wrong:
            where = first_wrong_letter(proof)
            raise ParityError("; ".join(filter(None, [verdict(column, wrong[0]), where])))
    if context.rank == 0:
        print("\nyes: what is left is rounding\n")


def table(columns: list[Column], optim: OptimConfig) -> Iterator[str]:
    """A table's lines: for each stage and dtype, the worst difference and the largest allowed."""
    tensors = len([d for d in columns[0].differences if d.stage == GRADIENTS])
    names = {stage: stage for stage in STAGES}
    names[GRADIENTS] = f"gradients of {tensors} tensors"
    kind = {"adamw": "AdamW", "muon": "Muon"}[optim.optimizer]
    names[UPDATED], names[MOVES] = (
        f"after {UPDATES - 1} {kind} updates",
        f"weights moved by {UPDATES}",
    )
    dtypes = list(dict.fromkeys(column.dtype for column in columns))
    groups = {d: [column for column in columns if column.dtype == d] for d in dtypes}
    heads = ["", ""]
    for dtype, group in groups.items():
        width = 11 * (len(group) + 1)
        heads[0] += str(dtype).removeprefix("torch.").ljust(width)
        heads[1] += "".join(f"{c.against:11}" for c in group) + f"{'allowed':11}"
    yield from (f"  {'':27}{head}".rstrip() for head in heads)
    for stage in [stage for stage in STAGES if by_stage(columns[0].differences)[stage]]:
        line = ""
        for group in groups.values():
            found = [max(d.worst for d in by_stage(c.differences)[stage]) for c in group]
            line += "".join(f"{f:<11.1e}" for f in (*found, group[0].allowed[stage]))
        yield f"  {names[stage]:27}{line}".rstrip()


def verdict(column: Column, worst: Difference) -> str:
    dtype = str(column.dtype).removeprefix("torch.")
    other = "the oracle" if column.against == "oracle" else "the same on 1 process"
    return (
        f"not the same as one process: {worst.what} differs by {worst.worst:.1e} of its largest "
        f"value in {dtype} from {other}, where rounding stays under "
        f"{column.allowed[worst.stage]:.0e}: a bug"
    )

"""Which runs the curves of the pages show, and code that looks right and is not."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Run:
    """A training of a step's code on some ranks (0: it has none), with a line replaced."""

    name: str
    step: str
    ranks: int = 0
    dtype: str = "float32"
    file: str = ""
    old: str = ""
    new: str = ""
    start: str = 'init_tensor_parallel(device="cpu")'  # of the ranks, in parallel_context
    config: str = ""  # more settings of GPTConfig, after a comma


F = "        x = copy_to_tensor_parallel_region(x, self.tp)"
B = """        y = reduce_from_tensor_parallel_region(partial, self.tp)  # (B, T, O)    all-reduce
        return y if self.bias is None else y + self.bias
"""
B_BEFORE_THE_SUM = """        partial = partial if self.bias is None else partial + self.bias
        return reduce_from_tensor_parallel_region(partial, self.tp)
"""
DATA_PARALLEL, MESH = (
    'init_parallel("cpu")',
    'init_parallel(parallel_context.ParallelConfig(), "cpu")',
)


BOTH = ("float32", "float64")  # the second tells a mistake from a rounding


def in_dtypes(dtypes: tuple[str, ...], *sides: Run) -> tuple[Run, ...]:
    return tuple(
        replace(side, name=f"{dtype} {side.name}", dtype=dtype)
        for dtype in dtypes
        for side in sides
    )


def one_rank_and_two(step: str, start: str = Run.start) -> tuple[Run, ...]:
    return in_dtypes(BOTH, *(Run(str(ranks), step, ranks, start=start) for ranks in (1, 2)))


def before_and_after(step: str, before: str, dtypes: tuple[str, ...] = BOTH) -> tuple[Run, ...]:
    """Two ranks that train with an earlier step's model, and with the step's."""
    return in_dtypes(dtypes, Run(before, before, 2), Run(step, step, 2))


PLOTS = {
    "02": (
        Run("y = w[1:]", "02"),
        Run("y = w[:-1]", "02", 0, "float32", "data.py", "window[:, 1:]", "window[:, :-1]"),
    ),
    "03": one_rank_and_two("03", DATA_PARALLEL),
    "04": (
        Run("1", "05", 1),
        Run("f on", "05", 2),
        Run("f off", "05", 2, "float32", "tensor_parallel.py", F, "        x = x"),
    ),
    "05": one_rank_and_two("05"),
    "06": (
        Run("1", "07", 1),
        Run("b × 1", "07", 2),
        Run("b × 2", "07", 2, "float32", "tensor_parallel.py", B, B_BEFORE_THE_SUM),
    ),
    "07": before_and_after("07", "05"),
    "08": before_and_after("08", "07", ("float32",)),
    "09": one_rank_and_two("09"),
    "17": tuple(
        Run(dtype, "17", 1, dtype, start=MESH) for dtype in ("float64", "float32", "bfloat16")
    ),
}
SEQUENCE = 'init_parallel(parallel_context.ParallelConfig(sequence_parallel=True), "cpu")'
PAIRS = {  # an exercise: `new` looks right, and what it trains is curve B
    "03": Run(
        *("B", "03", 2, "float32", "train.py"),
        old="    weighted = loss * share.to(loss.dtype)\n    weighted.backward()\n",
        new="    weighted = loss * share.to(loss.dtype)\n    loss.backward()\n",
        start=DATA_PARALLEL,
    ),
    "04": Run(
        *("B", "04", 2, "float32", "train.py"),
        old="""    own_ids, own_labels = (t.chunk(context.dp.size)[context.dp.rank] for t in batch)
""",
        new="""    own_ids, own_labels = (t.chunk(context.dp.size)[context.tp.rank] for t in batch)
""",
        start='init_parallel(1, "cpu")',
    ),
    "05": Run(
        *("B", "05", 2, "float32", "tensor_parallel.py"),
        old='    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()\n',
        new='    digest = hashlib.sha256(f"{seed}:{spec.shape}".encode()).digest()\n',
    ),
    "07": Run(
        *("B", "07", 2, "float32", "model.py"),
        old="""        self.dense_4h_to_h = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(width, config)
        )
""",
        new="""        own = width // tp.size  # the inputs of this rank
        self.dense_4h_to_h = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(own, config)
        )
""",
    ),
    "09": Run(
        *("B", "09", 2, "float32", "train.py"),
        old="""    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * shard_spec(p).decay} for p in model.parameters()],
        lr=3e-3,
    )
""",
        new="""    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim == 2)} for p in model.parameters()],
        lr=3e-3,
    )
""",
    ),
    "11": Run(
        *("B", "11", 2, "float32", "train.py"),
        old="        partial = [p.grad for p, spec in specs.items() if spec.is_partial(axis)]\n",
        new="        partial = [p.grad for p in specs]\n",
    ),
    "12": Run(
        *("B", "12", 2, "float32", "vocab_parallel.py"),
        old="""        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        x = x.masked_fill(elsewhere[..., None], 0)  # the rank that holds the row adds it
""",
        new="""        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
""",
    ),
    "14": Run(
        *("B", "14", 2, "float32", "dropout.py"),
        old='        text = f"{seed.seed}:{seed.step}:{self.site}"\n',
        new='        text = f"{seed.seed}:{self.site}"\n',
        config=", dropout=0.1",
    ),
    "15": Run(
        *("B", "15", 2, "float32", "model.py"),
        old="        positions = own_tokens(positions_of(input_ids, attention_mask), self.tp)\n",
        new="""        own = input_ids.shape[1] // self.tp.size
        positions = positions_of(input_ids, attention_mask)[..., :own]
""",
        start=SEQUENCE,
    ),
    "20": Run(
        *("B", "20", 2, "float32", "vocab_parallel.py"),
        old="        loss_weights = counts.to(_sum_dtype(x)) / counts.sum().clamp(min=1)\n",
        new="        loss_weights = counts.to(_sum_dtype(x)) / counts.numel()\n",
    ),
}

"""Settings of a run beside its model, layout and optimizer: one dataclass for each subject."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

from rosetrainer.validation import HIDDEN, Bounds, Count, CountOrZero

MAY_CHANGE = "may change when the run is resumed"
"""In the Annotated of a field, or of a component: all other fields MUST_MATCH_ON_RESUME."""


def must_match_on_resume(component: type) -> list[str]:
    """The fields of a dataclass that decide the numbers of a run."""
    hints = get_type_hints(component, include_extras=True)
    return [name for name, hint in hints.items() if MAY_CHANGE not in get_args(hint)]


@dataclass(frozen=True)
class RunConfig:
    """The run: data, length, where results go."""

    data: Annotated[Path, MAY_CHANGE] = Path("data/python-docs")
    """Folder that `prepare` wrote."""
    out: Annotated[Path | None, MAY_CHANGE] = None
    """Folder of the run; unless given, this command's unfinished out/run-NNN or a new one."""
    steps: Count = 200
    """Updates."""
    seed: CountOrZero = 1337
    """Decides the initial weights and the order of the data."""
    init_from: Path | None = None
    """Folder of a Hugging Face checkpoint: the model is that of its config.json, and the run begins
    with its weights."""


@dataclass(frozen=True)
class PrecisionConfig:
    """The numbers that the run computes with."""

    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"], MAY_CHANGE] = "auto"
    """bfloat16 is autocast over fp32 parameters; auto takes it where it was measured as faster."""
    compute_dtype: Annotated[
        Literal["float32", "bfloat16", "float64"] | None, MAY_CHANGE, HIDDEN
    ] = None
    """What dtype has resolved to. A resumed run keeps it: see run_identity.differences."""
    kernels: Annotated[Literal["auto", "torch", "ours"], MAY_CHANGE] = "auto"
    """Whose kernels compute on a CPU; auto: ours where they were measured as faster, else torch's.
    A resumed run keeps what auto came to."""
    compute_kernels: Annotated[str | None, MAY_CHANGE, HIDDEN] = None
    """What kernels has resolved to: see choose_kernels. On CUDA nothing."""
    deterministic: bool = False
    """Only kernels that give the same bits each time. CPUs do anyway; on CUDA it costs speed."""


@dataclass(frozen=True)
class HardwareConfig:
    """What the run computes on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when each local rank has a GPU of its own."""
    threads: Annotated[int, Bounds(0, 1024)] = 0
    """CPU threads of a rank; 0 shares the cores among the local ranks."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on where it is faster and possible, CUDA at tp_size 1."""
    shared_memory: Literal["auto", "off"] = "auto"
    """Memory in which tensor-parallel ranks of one machine add up; auto: where there is some."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The loss on the validation text."""

    eval_every: CountOrZero = 50
    """Steps between two evaluations; 0 evaluates only at the end."""
    eval_tokens: Count = 65536
    """Validation tokens of an evaluation, from the start of val.bin."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and what a run is resumed from."""

    checkpoint_every: CountOrZero = 50
    """Steps between two checkpoints; one comes at the end, and when a signal stops the run."""
    keep: Count = 2
    """Checkpoints that stay; older ones are removed."""
    resume: str = "auto"
    """auto goes on where this command was interrupted; never; or a checkpoint's or run's PATH."""
    async_checkpoint: bool = False
    """Checkpoints are written while training goes on; takes memory for a second copy."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training goes on, and what ends it."""

    max_skipped: CountOrZero = 0
    """Steps with nan or inf in a gradient that may be skipped before the run stops."""
    timeout: Count = 600
    """Seconds without progress after which ranks that hang are ended."""
    check_replicas: CountOrZero = 0
    """Steps between two comparisons of what several ranks hold alike; 0 never compares."""
    profile: CountOrZero = 0
    """Steps that torch.profiler records, after five that are not: a trace and a table."""
    timeline: Path | None = None
    """Where a pipeline's sixth step is shown, such as out/t.json: a trace, and out/t.svg beside
    it, with what its schedule would have taken."""

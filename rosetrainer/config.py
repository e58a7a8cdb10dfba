"""What a run is made of: frozen dataclasses, one a component, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from rosetrainer.model_size import check_exists
from rosetrainer.parallel_config import ParallelConfig
from rosetrainer.run_config import (
    MAY_CHANGE,
    CheckpointConfig,
    EvaluationConfig,
    HardwareConfig,
    MonitorConfig,
    PrecisionConfig,
    RunConfig,
)
from rosetrainer.validation import (
    BelowOne,
    Bounds,
    ConfigError,
    Count,
    CountOrZero,
    Fraction,
    Positive,
    PositiveOrZero,
    check_fields,
    divisors,
    one_of,
)

IGNORED = -100  # a label that counts for nothing, as in F.cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """The model: shapes of a GPT."""

    vocab_size: Suppress[Count] = 256
    """Number of token ids; training takes it from the data."""
    context_length: Annotated[int, Bounds(1, 2**24)] = 256
    """Tokens in a sequence."""
    n_layers: Annotated[int, Bounds(1, 2**14)] = 4
    """Transformer blocks."""
    n_heads: Count = 4
    """Attention heads."""
    d_model: Count = 256
    """Width of the residual stream."""
    d_head: Count | None = None
    """Width of one head; d_model / n_heads unless given."""
    d_ff: Count | None = None
    """Inner width of the feed-forward layer; 4 x d_model unless given."""
    bias: bool = True
    """Biases in the linear layers."""
    tied: bool = True
    """The output head shares the token embedding's weights."""
    dropout: BelowOne = 0.0
    """Share of activations that training drops: embeddings, attention, and what blocks add."""
    architecture: Literal["gpt2", "rotary"] = "gpt2"
    """rotary: rotary positions, squared ReLU, norms without weights, outputs that begin at zero."""
    rotary_base: Positive = 10000.0
    """Rotary positions: the slowest pair of a head turns once in about 6 times as many tokens."""

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    def check(self, tp_size: int = 1, sequence_parallel: bool = False) -> None:
        """Raises ConfigError if no such model exists, or tp_size ranks cannot share it."""
        check_fields(self)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"n_heads can be {one_of(divisors(self.d_model))}, or give d_head"
            )
        check_exists(self)
        if self.architecture == "rotary" and self.tied:
            raise ConfigError("architecture=rotary has an output head of its own; add --no-tied")
        if self.architecture == "rotary" and self.head_width % 2:
            raise ConfigError(
                f"architecture=rotary turns pairs, and a head is {self.head_width} wide; "
                f"d_head can be {self.head_width + 1}"
            )
        for name, value in (("n_heads", self.n_heads), ("d_ff", self.ff_width)):
            if value % tp_size:
                possible = divisors(math.gcd(self.n_heads, self.ff_width))
                raise ConfigError(
                    f"{name}={value} is not divisible by tp_size={tp_size}; "
                    f"tp_size can be {one_of(possible)}"
                )
        if sequence_parallel and self.context_length % tp_size:
            raise ConfigError(
                f"context_length={self.context_length} is not divisible by tp_size={tp_size}, over "
                f"which sequence parallelism divides it; it can be a multiple of {tp_size}"
            )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the batch."""

    learning_rate: PositiveOrZero = 1e-3
    """AdamW's peak learning rate, reached after the warm-up."""
    min_lr_ratio: Fraction = 0.1
    """The schedule ends at this fraction of the peak."""
    warmup_steps: CountOrZero = 20
    """Steps of linear warm-up."""
    weight_decay: PositiveOrZero = 0.1
    """Decay of weight matrices; biases, norms and position embeddings have none."""
    beta1: BelowOne = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: BelowOne = 0.95
    """Decay of AdamW's mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    grad_clip: PositiveOrZero = 1.0
    """Largest global gradient norm; 0 does not clip."""
    global_batch_size: Annotated[int, Bounds(1, 2**20)] = 16
    """Sequences in one update, over all ranks: the work is the same in every layout."""
    micro_batch_size: Annotated[Count | None, MAY_CHANGE] = None
    """Sequences in one forward pass of a rank; global_batch_size / dp_size unless given."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    head_learning_rate: PositiveOrZero | None = None
    """AdamW's peak for an output head that is not tied; learning_rate unless given."""
    muon_learning_rate: PositiveOrZero = 0.02
    """Muon's peak learning rate; it follows the same schedule."""
    muon_momentum: BelowOne = 0.95
    """Decay of Muon's mean of gradients."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up."""

    def micro_batch(self, dp_size: int) -> int:
        """Sequences in one forward pass of a rank."""
        return self.micro_batch_size or self.global_batch_size // dp_size

    def accumulation(self, dp_size: int) -> int:
        """Micro-batches that each rank runs for one update. Raises ConfigError."""
        if self.global_batch_size % dp_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"dp_size={dp_size}; dp_size can be {one_of(divisors(self.global_batch_size))}"
            )
        per_rank, micro = self.global_batch_size // dp_size, self.micro_batch(dp_size)
        if per_rank % micro:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size"
                f" x dp_size = {micro} x {dp_size}; micro_batch_size can be "
                f"{one_of(divisors(per_rank))}"
            )
        return per_rank // micro


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. No two components have a setting of one name."""

    model: GPTConfig = field(default_factory=GPTConfig)
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    hardware: Annotated[HardwareConfig, MAY_CHANGE] = field(default_factory=HardwareConfig)
    evaluation: Annotated[EvaluationConfig, MAY_CHANGE] = field(default_factory=EvaluationConfig)
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = field(default_factory=CheckpointConfig)
    monitor: Annotated[MonitorConfig, MAY_CHANGE] = field(default_factory=MonitorConfig)

    def with_settings(self, **settings: Any) -> TrainConfig:
        """A copy in which settings, named as in their components, have other values."""
        changed = {}
        for part in fields(self):
            component = getattr(self, part.name)
            own = {f.name: settings.pop(f.name) for f in fields(component) if f.name in settings}
            changed[part.name] = replace(component, **own)
        assert not settings, f"no component has {', '.join(settings)}"
        return TrainConfig(**changed)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What an older version wrote, which kept the settings of all later components in `run`."""
        run = values.get("run")
        if not isinstance(run, dict) or "monitor" in values:
            return values
        values = values | {"run": {**run}}
        for part in fields(cls)[4:]:
            names = {f.name for f in fields(part.default_factory)} & set(run)  # type: ignore
            values[part.name] = {name: values["run"].pop(name) for name in names}
        return values

    def check(self, world_size: int) -> None:
        """Raises ConfigError for anything that cannot work with world_size ranks."""
        check_fields(self)
        tp_size, dp_size = self.parallel.resolve(world_size)
        self.model.check(tp_size, self.parallel.sequence_parallel)
        self.parallel.check_pipeline(self.model.n_layers, self.optim.accumulation(dp_size))
        if self.model.tied and self.optim.head_learning_rate is not None:
            raise ConfigError(
                f"head_learning_rate={self.optim.head_learning_rate:g}, but the output head is the "
                "token embedding; add --no-tied or leave it out"
            )

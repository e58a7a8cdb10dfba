"""What a run is made of: frozen dataclasses, one a component, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from rosetrainer.model_config import GPTConfig
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
    """How the learning rate falls."""
    stable_ratio: BelowOne = 0.0
    """The share of the steps after the warm-up in which it stays at its peak, before it falls."""
    freeze: str | None = None
    """Parameters that are not trained: patterns of the names in a checkpoint, with commas, such as
    token_embedding*,blocks.0.*"""

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
        self.parallel.check_pipeline(self.model, self.optim.accumulation(dp_size))
        if self.optim.freeze is not None and self.parallel.pp_size > 1:
            raise ConfigError(
                f"freeze={self.optim.freeze} does not go with a pipeline yet, and pp_size="
                f"{self.parallel.pp_size}; pp_size can be 1"
            )
        if self.model.tied and self.optim.head_learning_rate is not None:
            raise ConfigError(
                f"head_learning_rate={self.optim.head_learning_rate:g}, but the output head is the "
                "token embedding; add --no-tied or leave it out"
            )

"""The layout of a run: how many ranks share a model, and in which ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rosetrainer.validation import Bounds, ConfigError, Count, check_fields, divisors, one_of

STAGES_PER_RANK = {
    "afab": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, 2**14),
    "zero-bubble": (1, 1),
    "zero-bubble-v": (2, 2),
}
"""Of each schedule the fewest stages of a rank, which it has by itself, and the most."""

SPLIT_BACKWARD = ("zero-bubble", "zero-bubble-v")
"""Schedules in which weights' gradients are made apart from those of inputs."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: how many ranks share a model (tp, pp), how many copies there are, and how."""

    tp_size: Count | None = None
    """Tensor-parallel size; the number of ranks / dp_size / pp_size unless given."""
    dp_size: Count | None = None
    """Data-parallel size; the number of ranks / tp_size / pp_size unless given."""
    sequence_parallel: bool = False
    """Between tensor-parallel layers each rank holds its own tokens only: less memory."""
    recompute: Literal["none", "attention", "block"] = "none"
    """What the backward pass computes again instead of keeping: less memory, more time."""
    overlap: bool = True
    """The backward pass computes while its collectives are under way, over tp and over dp."""
    pp_size: Count = 1
    """Pipeline-parallel size: so many ranks divide the layers among them."""
    pp_schedule: Literal["afab", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"] = "1f1b"
    """The order in which the ranks of a pipeline work on the micro-batches of a step."""
    stages_per_rank: Count | None = None
    """Stages of a pipeline's rank: 2 or more if interleaved, else what the schedule has."""
    stage_layers: str | None = None
    """Blocks of each stage, as 3,4,3; unless given they are spread so that stages cost alike."""
    zero: Annotated[int, Bounds(0, 3)] = 0
    """What the data-parallel ranks divide among them: 1 the moments, 2 gradients too, 3 parameters
    too, which are gathered where they are used."""
    zero_keep: bool = False
    """At level 3 what the forward pass has gathered stays for the backward pass."""
    dp_replicas: Count = 1
    """Groups of data-parallel ranks, each of which holds all that zero divides."""

    def resolve(self, world_size: int) -> tuple[int, int]:
        """(tp_size, dp_size), with pp_size their product is world_size. Raises ConfigError."""
        check_fields(self)
        tp, dp, pp = self.tp_size, self.dp_size, self.pp_size
        if tp is None:
            tp = max(world_size // pp // dp, 1) if dp is not None else max(world_size // pp, 1)
        if dp is None:
            dp = max(world_size // pp // tp, 1)
        if tp * dp * pp != world_size:
            names, sizes = "tp_size x dp_size", f"{tp} x {dp}"
            if pp > 1:
                names, sizes = f"{names} x pp_size", f"{sizes} x {pp}"
            raise ConfigError(
                f"world size {world_size} is not {names} = {sizes}; "
                f"start {tp * dp * pp} ranks, or choose sizes whose product is {world_size}"
            )
        self.check_zero(dp)
        return tp, dp

    def check_zero(self, dp_size: int) -> None:
        """Raises ConfigError if the data-parallel ranks cannot divide what zero says."""
        zero, replicas = self.zero, self.dp_replicas
        if zero > 1 and self.pp_size > 1:
            raise ConfigError(
                f"zero={zero} does not go with a pipeline yet, and pp_size={self.pp_size}; pp_size "
                f"can be 1, or zero 0 or 1"
            )
        if zero and dp_size == 1:
            raise ConfigError(
                f"zero={zero} divides what the ranks of dp hold alike, and dp_size=1 is one rank, "
                f"so it does nothing; dp_size can be 2 or more, or leave it out"
            )
        if self.zero_keep and zero < 3:
            raise ConfigError(
                f"zero_keep keeps parameters that zero=3 has gathered, and zero={zero}; zero can "
                f"be 3, or leave it out"
            )
        if replicas > 1 and not zero:
            raise ConfigError(
                f"dp_replicas={replicas} are groups of shards, and zero=0 cuts none; zero can be "
                f"1, 2 or 3, or leave it out"
            )
        if zero and (dp_size % replicas or replicas == dp_size):
            raise ConfigError(
                f"dp_replicas={replicas} does not divide dp_size={dp_size} into groups of 2 ranks "
                f"or more; it can be {one_of([n for n in divisors(dp_size) if n < dp_size])}"
            )

    @property
    def stages_of_rank(self) -> int:
        return self.stages_per_rank or STAGES_PER_RANK[self.pp_schedule][0]

    def check_pipeline(self, model: Any, micro_batches: int) -> None:
        """Raises ConfigError if a pipeline cannot divide the model (a GPTConfig, which is not
        imported here), or its schedule not run."""
        if self.pp_size == 1:
            for name in ("pp_schedule", "stages_per_rank", "stage_layers"):
                if getattr(self, name) != getattr(ParallelConfig(), name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)} is for a pipeline, and pp_size=1 is none; "
                        f"pp_size can be 2 or more, or leave it out"
                    )
            return
        if model.architecture in ("bert", "t5", "glm"):
            raise ConfigError(
                f"architecture={model.architecture} runs in no pipeline, and "
                f"pp_size={self.pp_size}; it can be 1"
            )
        n_layers = model.n_layers
        check_schedule_sizes(self.pp_schedule, self.pp_size, self.stages_of_rank, micro_batches)
        stages = self.pp_size * self.stages_of_rank
        if stages > n_layers:
            raise ConfigError(
                f"pp_size={self.pp_size} x {self.stages_of_rank} stages of a rank are more than "
                f"n_layers={n_layers}; their product can be {n_layers} at most"
            )
        given = self.given_layers()
        if given and (len(given) != stages or sum(given) != n_layers or 0 in given):
            raise ConfigError(
                f"stage_layers={self.stage_layers} are {sum(given)} blocks in {len(given)} stages; "
                f"they should be n_layers={n_layers} in {stages}, each with one at least"
            )

    def check_device(self, kind: str) -> None:
        """Raises ConfigError where a pipeline's messages would wait for each other.

        Between two ranks nccl runs messages of both directions in the order in which a rank posts
        them, and the runner posts receives ahead of sends: on CUDA both ranks would receive first.
        """
        if self.pp_size > 1 and kind != "cpu":
            raise ConfigError(
                f"pp_size={self.pp_size} sends by gloo, on CPUs only, and device={kind}; pp_size "
                f"can be 1, or use --device cpu"
            )

    def given_layers(self) -> tuple[int, ...]:
        """What stage_layers says, or (). Raises ConfigError if it is no list of numbers."""
        parts = self.stage_layers.split(",") if self.stage_layers is not None else []
        if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise ConfigError(
                f"stage_layers={self.stage_layers!r} should be a number of blocks for each stage, "
                f"such as 3,4,3"
            )
        return tuple(map(int, parts))


def check_schedule_sizes(name: str, ranks: int, stages_per_rank: int, micro_batches: int) -> None:
    """Raises ConfigError if a schedule cannot run with these."""
    if name not in STAGES_PER_RANK:
        raise ConfigError(f"pp_schedule={name} is none; it can be {one_of(STAGES_PER_RANK)}")
    fewest, most = STAGES_PER_RANK[name]
    if not fewest <= stages_per_rank <= most:
        right = f"{fewest}" if fewest == most else f"{fewest} or more"
        raise ConfigError(
            f"stages_per_rank={stages_per_rank} does not go with pp_schedule={name}; it can be "
            f"{right}"
        )
    if name == "interleaved" and micro_batches % ranks:
        below, above = micro_batches // ranks * ranks, -(-micro_batches // ranks) * ranks
        raise ConfigError(
            f"pp_schedule=interleaved takes a multiple of pp_size={ranks} micro-batches, and "
            f"global_batch_size / dp_size / micro_batch_size = {micro_batches}; it can be "
            f"{one_of([below, above] if below else [above])}"
        )

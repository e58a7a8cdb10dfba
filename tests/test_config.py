"""Configs: what is wrong is a ConfigError of one line with the value in it, and nothing else."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, fields, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from rosetrainer.__main__ import main
from rosetrainer.commands.flags import parse_flags
from rosetrainer.config import (
    CheckpointConfig,
    GPTConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from rosetrainer.models.generation import SamplingConfig
from rosetrainer.training.run_identity import MUST_MATCH_ON_RESUME
from rosetrainer.validation import (
    HIDDEN,
    POSITIONAL,
    Bounds,
    ConfigError,
    Count,
    check_fields,
    config_from_dict,
)

STRANGE = [0, -1, 1.5, math.nan, math.inf, "4", True, [], 2**70]
NOT_A_SIZE = {"model": GPTConfig, "parallel": ParallelConfig, "optim": OptimConfig}
MAY_BE_ZERO: dict[str, list[object]] = {
    "dropout": [0],
    "warmup_steps": [0],
    "learning_rate": [0, 1.5],
    "weight_decay": [0, 1.5],
    "grad_clip": [0, 1.5],
    "min_lr_ratio": [0],
    "max_skipped": [0],
    "check_replicas": [0],
    "sequence_parallel": [True],
    "overlap": [True],
    "zero": [0],
    "beta1": [0],
    "beta2": [0],
    "eps": [1.5],
    "rotary_base": [1.5],
    "muon_learning_rate": [0, 1.5],
    "muon_momentum": [0],
    "stable_ratio": [0],
    "head_learning_rate": [None],
    "bias": [True],
    "tied": [True],
    "freeze": ["4"],  # a name, which the model is asked for
}


def bad_configs() -> list[tuple[TrainConfig, int]]:
    """(config, world size), each with one thing wrong."""
    bad: list[tuple[TrainConfig, int]] = []
    for component, cls in NOT_A_SIZE.items():
        for field, value in itertools.product(fields(cls), STRANGE):
            if value in MAY_BE_ZERO.get(field.name, []):
                continue
            changed = replace(getattr(TrainConfig(), component), **{field.name: value})
            bad.append((replace(TrainConfig(), **{component: changed}), 1))
    for tp, dp, world_size in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 4, 8)):
        if tp * dp != world_size:
            bad.append((TrainConfig(parallel=ParallelConfig(tp, dp)), world_size))
    for heads, tp in itertools.product((1, 2, 3, 5, 6), (4, 7, 8)):
        model = GPTConfig(n_heads=heads, d_head=8)
        bad.append((TrainConfig(model=model), tp))
    for width, tp in itertools.product((1, 6, 10, 99), (4, 8)):
        bad.append((TrainConfig(model=GPTConfig(n_heads=8, d_ff=width)), tp))
    for tokens, tp in itertools.product((1, 6, 10, 99), (4, 8)):
        model, parallel = GPTConfig(context_length=tokens, n_heads=8), ParallelConfig(tp, 1, True)
        bad.append((TrainConfig(model=model, parallel=parallel), tp))
    for heads in (3, 5, 7, 999):
        bad.append((TrainConfig(model=GPTConfig(n_heads=heads)), 1))
    for batch, micro, dp in itertools.product((1, 6, 10), (4, 7), (1, 2, 4)):
        optim = OptimConfig(global_batch_size=batch, micro_batch_size=micro)
        bad.append((TrainConfig(parallel=ParallelConfig(1, dp), optim=optim), dp))
    return bad


def test_a_grid_of_bad_configs_raises_nothing_but_config_error() -> None:
    grid = bad_configs()
    assert len(grid) >= 200
    for config, world_size in grid:
        with pytest.raises(ConfigError) as caught:
            config.check(world_size)
            raise AssertionError(f"accepted: {config} with {world_size} ranks")
        assert "\n" not in str(caught.value)
        assert "=" in str(caught.value) or "world size" in str(caught.value)


@pytest.mark.parametrize(
    ("component", "values", "message"),
    [
        (RunConfig, {"seed": 2**40 + 1}, "seed=1099511627777 must be from 0 to 1099511627776"),
        (RunConfig, {"seed": -1}, "seed=-1 must be from 0 to 1099511627776"),
        (RunConfig, {"steps": 10**400}, "steps=an integer of 401 digits must be from 1 to 109951"),
        (RunConfig, {"steps": -(10**400)}, "steps=an integer of 401 digits must be from 1 to"),
        (RunConfig, {"steps": 2.0}, r"steps=2\.0 must be an integer"),
        (RunConfig, {"steps": True}, "steps=True must be an integer"),
        (RunConfig, {"steps": None}, "steps=None must be an integer"),
        (CheckpointConfig, {"resume": 3}, "resume=3 must be a text"),
        (RunConfig, {"steps": "x" * 999}, f"steps='{'x' * 79}... must be an integer"),
        (
            OptimConfig,
            {"learning_rate": 1e10},
            "learning_rate=10000000000.0 must be from 0 to 1000",
        ),
        (
            OptimConfig,
            {"learning_rate": 10**400},
            "an integer of 401 digits must be from 0 to 1000",
        ),
        (OptimConfig, {"learning_rate": 1e400}, "learning_rate=inf must be a finite number"),
        (OptimConfig, {"learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
        (OptimConfig, {"learning_rate": True}, "learning_rate=True must be a finite number"),
        (OptimConfig, {"eps": 1e-50}, "eps=1e-50 must be from 1e-30 to 1000000000"),
        (OptimConfig, {"beta1": 1}, "beta1=1 must be from 0 to below 1"),
        (OptimConfig, {"global_batch_size": 2**21}, "=2097152 must be from 1 to 1048576"),
        (
            OptimConfig,
            {"micro_batch_size": 0},
            "micro_batch_size=0 must be from 1 to 1099511627776",
        ),
        (SamplingConfig, {"seed": 2**32}, "seed=4294967296 must be from 0 to 4294967295"),
        (SamplingConfig, {"top_p": 1.5}, r"top_p=1\.5 must be from 0 to 1$"),
    ],
)
def test_a_value_out_of_bounds_is_told_with_both_bounds(
    component: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_fields(component(**values))
    assert len(str(caught.value)) < 200


def test_what_an_error_offers_instead_works() -> None:
    message = refused(GPTConfig(n_heads=6, d_head=8, d_ff=24), 4)
    assert message == "n_heads=6 is not divisible by tp_size=4; tp_size can be 1, 2, 3 or 6"
    for tp in (1, 2, 3, 6):
        GPTConfig(n_heads=6, d_head=8, d_ff=24).check(tp)
    message = refused(GPTConfig(n_heads=5), 1)
    assert "d_model=256 is not divisible by n_heads=5; n_heads can be 1, 2, 4, 8," in message
    GPTConfig(n_heads=5, d_head=51).check()


def refused(model: GPTConfig, tp_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        model.check(tp_size)
    return str(caught.value)


def test_the_global_batch_decides_the_accumulation() -> None:
    optim = OptimConfig(global_batch_size=24, micro_batch_size=3)
    assert [optim.accumulation(dp) for dp in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert OptimConfig(global_batch_size=24).accumulation(3) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--d-modle", "3"], "unknown argument --d-modle; did you mean --d-model?"),
        (["extra"], "unknown argument extra; see x --help"),
        (["--d-model", "wide"], "d_model='wide' must be an integer"),
        (["--dtype", "int8"], "dtype='int8' must be auto, float32, bfloat16 or float64"),
        (["--steps"], "argument --steps: expected one argument; see x --help"),
        (["--steps", "--seed", "1"], "argument --steps: expected one argument; see x --help"),
        (["--bias=off"], "argument --bias/--no-bias: ignored explicit argument 'off'"),
        (["--no-steps"], "unknown argument --no-steps; did you mean --steps?"),
        (["-x"], "unknown argument -x; see x --help"),
        (["--d_model=wide"], "d_model='wide' must be an integer"),
        (["--vocab-size", "12"], "unknown argument --vocab-size"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(TrainConfig, argv, "x")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    rate: Annotated[float, Bounds(0, 1)] = 0.5
    """A rate, 50 % here.
    It has two lines."""
    hidden: Annotated[int, HIDDEN] = 3
    """Not a flag."""


@dataclass(frozen=True)
class Command:
    """A command."""

    first: Annotated[Path, POSITIONAL]
    """The first word."""
    name: str
    """Has no default."""
    rest: Annotated[tuple[Path, ...], POSITIONAL] = ()
    inner: Inner = dataclass_field(default_factory=Inner)
    size: Count | None = 7
    kind: Literal["a", "b"] | None = None
    swift: bool = False


def test_each_kind_of_field_is_a_flag() -> None:
    argv = ["one", "--name=-x=y", "two", "--size", "None", "--kind", "b", "--swift", "three"]
    found = parse_flags(Command, [*argv, "--rate", "1", "--no-swift", "--rate=.25"], "x")
    assert found == Command(
        Path("one"), "-x=y", (Path("two"), Path("three")), Inner(0.25), None, "b", False
    )
    given = Command(Path("a"), "n", (), Inner(0.75, 9), 2)
    assert parse_flags(Command, ["--size", "3"], "x", given) == replace(given, size=3)
    for argv, message in (
        (["--name", "n"], "^the following arguments are required: FIRST; see x --help$"),
        (["one"], "^the following arguments are required: --name; see x --help$"),
        (["one", "--name", "n", "--size", "0"], "^size=0 must be from 1 to 1099511627776$"),
        (["one", "--name", "n", "--rate", "none"], "^rate='none' must be a finite number$"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_flags(Command, argv, "x")


def test_help_tells_what_each_flag_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse_flags(Command, ["one", "--help", "--nonsense"], "x")
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for told in (
        "usage: x FIRST [REST...] [flags] A command.",
        "FIRST The first word.",
        "--name TEXT Has no default.",
        "--size INT|None (default: 7)",
        "--kind {a,b}|None (default: None)",
        "--swift, --no-swift (default: False)",
        "What is inside. --rate FLOAT A rate, 50 % here. It has two lines. (default: 0.5)",
    ):
        assert told in words, words
    assert "hidden" not in words


def test_threads_are_no_more_than_a_machine_can_start() -> None:
    with pytest.raises(ConfigError, match="^threads=100000 must be from 0 to 1024$"):
        TrainConfig().with_settings(threads=100_000).check(1)


@pytest.mark.parametrize("command", ["train", "parity", "generate", "plan"])
def test_ranks_are_no_more_than_a_machine_can_start(command: str) -> None:
    with pytest.raises(ConfigError, match="^nproc=100000 must be from 1 to 1024$"):
        main([command, "--nproc", "100000"])


def test_flags_reach_every_component() -> None:
    argv = ["--d-model", "64", "--tp-size", "2", "--eps", "1e-6", "--steps", "9", "--no-tied"]
    config = parse_flags(TrainConfig, argv, "x")
    assert (config.model.d_model, config.parallel.tp_size, config.optim.eps) == (64, 2, 1e-6)
    assert (config.run.steps, config.model.tied) == (9, False)


@pytest.mark.parametrize("values", [[], "x", {"modle": {}}, {"model": 3}, {"model": {"bias": 3}}])
def test_a_config_file_that_is_not_ours_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError):
        config_from_dict(TrainConfig, values, "config.json")


def as_an_older_version_wrote_it(config: TrainConfig) -> dict[str, Any]:
    """One component, `run`, for all that is not model, layout or optimizer; no timeline, kernels
    nor shared memory; null for more of the model's defaults."""
    parts = asdict(config)
    del parts["monitor"]["timeline"], parts["hardware"]["shared_memory"]
    del parts["precision"]["kernels"], parts["precision"]["compute_kernels"]
    old = {name: parts.pop(name) for name in ("model", "parallel", "optim")}
    old["model"] |= dict.fromkeys(("token_types", "relative_buckets", "rotary_pairs"))
    return old | {"run": {key: value for part in parts.values() for key, value in part.items()}}


def test_a_config_of_an_older_version_is_read() -> None:
    config = TrainConfig().with_settings(n_layers=3, steps=7, keep=5, compute_dtype="bfloat16")
    old = as_an_older_version_wrote_it(config)
    assert len(old["run"]) == 21
    assert config_from_dict(TrainConfig, old, "config.json") == config
    old["run"]["flux"] = 7
    with pytest.raises(ConfigError, match="^config.json: run has unknown keys flux, which a newer"):
        config_from_dict(TrainConfig, old, "config.json")


def test_no_two_components_have_a_setting_of_one_name() -> None:
    names = [name for part in asdict(TrainConfig()).values() for name in part]
    assert sorted(names) == sorted(set(names))


def test_what_may_change_when_a_run_is_resumed_is_declared() -> None:
    names = {name for part in asdict(TrainConfig()).values() for name in part}
    must = {name for part in MUST_MATCH_ON_RESUME.values() for name in part}
    layout = {f.name for f in fields(ParallelConfig)}
    assert names - must - layout == {
        *("micro_batch_size", "data", "out", "eval_every", "eval_tokens", "device", "max_skipped"),
        *("checkpoint_every", "keep", "resume", "async_checkpoint", "timeout", "check_replicas"),
        *("threads", "compile", "shared_memory", "profile", "timeline"),
        *("dtype", "compute_dtype", "kernels", "compute_kernels"),
    }

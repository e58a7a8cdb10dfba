"""A planner that does not know a setting says so, and what is to be taught to it."""

from __future__ import annotations

from dataclasses import Field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from rosetrainer.commands.plan import main as plan_command
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.model_choices import CHOICES
from rosetrainer.planner import settings
from rosetrainer.planner.layout import Plan, Work, plan
from rosetrainer.planner.report import plan_training
from rosetrainer.planner.settings import COUNTED, WITHOUT_EFFECT
from rosetrainer.validation import ConfigError

SETTINGS = [(kind, field) for kind in COUNTED for field in fields(kind)]
NAMES = [f"{kind.__name__}.{field.name}" for kind, field in SETTINGS]
every_setting = pytest.mark.parametrize("kind, field", SETTINGS, ids=NAMES)

COMPONENTS: dict[type, str] = {GPTConfig: "model", ParallelConfig: "parallel", OptimConfig: "optim"}
TRAIN = TrainConfig(
    GPTConfig(139, context_length=16, n_layers=8, n_heads=4, d_model=24, d_head=6, d_ff=48),
    ParallelConfig(2, 2, sequence_parallel=True, pp_size=2, pp_schedule="interleaved"),
    OptimConfig(global_batch_size=16, micro_batch_size=2),
)


UNLESS_GIVEN: dict[str, list[Any]] = {
    "stages_per_rank": [4],
    "stage_layers": ["1,1,1,5"],
    "zero": [0, 1, 2],
}
LLAMA = TrainConfig(
    replace(TRAIN.model, architecture="llama", bias=False, n_kv_heads=2, norm="rmsnorm"),
    TRAIN.parallel,
    TRAIN.optim,
)
BERT = replace(TRAIN, model=replace(TRAIN.model, architecture="bert", token_types=2))
T5 = replace(
    TRAIN,
    model=replace(TRAIN.model, architecture="t5", bias=False),
    parallel=ParallelConfig(2, 2, sequence_parallel=True),
)
ZERO = replace(TRAIN, parallel=ParallelConfig(2, 4, zero=3))
SAME_BYTES = {"activation": ("geglu", "geglu_tanh", "reglu")}
"""Values of a counted field that are planned as LLAMA's own."""


def base(field: Field[Any]) -> TrainConfig:
    """A config that reads the field."""
    if field.name in ("zero", "zero_keep", "dp_replicas"):
        return ZERO
    if field.name == "activation":
        return replace(LLAMA, model=replace(LLAMA.model, activation="swiglu"))
    if field.name == "token_types":
        return BERT
    if field.name in ("relative_buckets", "relative_distance"):
        return T5
    return LLAMA if "llama" in CHOICES.get(field.name, ()) else TRAIN


def literal(kind: type, field: Field[Any]) -> tuple[str, ...]:
    hint = get_type_hints(kind, include_extras=True)[field.name]
    if type(None) in get_args(hint):
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) is Literal else ()


def others(kind: type, field: Field[Any]) -> list[Any]:
    """Values of the field that base's config does not have."""
    if field.name in UNLESS_GIVEN:
        return UNLESS_GIVEN[field.name]
    value = getattr(getattr(base(field), COMPONENTS[kind]), field.name)
    if choices := literal(kind, field):
        return [choice for choice in choices if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value]
    return [0.25 if value is None else value / 2 + 0.01]


def planned(kind: type, field: Field[Any], value: Any) -> Plan:
    config, part = base(field), COMPONENTS[kind]
    changed = replace(getattr(config, part), **{field.name: value})
    return plan_training(replace(config, **{part: changed}), torch.float32)


@every_setting
def test_plan_knows_every_setting(kind: type, field: Field[Any]) -> None:
    name = f"{kind.__name__}.{field.name}"
    assert (field.name in COUNTED[kind]) != (field.name in WITHOUT_EFFECT[kind]), (
        f"plan does not know {name}. If it changes what a step moves or what a rank holds, teach "
        f"that to rosetrainer/planner/layout.py and name it in COUNTED (planner/settings.py); if "
        f"not, name it in WITHOUT_EFFECT. tests/lattice.py holds the plan against what is counted "
        f"in a step: a setting that it should vary goes into FACTORS."
    )
    if literal(kind, field) and field.name in COUNTED[kind]:
        known = COUNTED[kind][field.name]
        assert known and set(known) <= {None, *literal(kind, field)}, (
            f"name the values of {name} that plan knows in COUNTED (planner/settings.py), so that "
            "one which is added later is refused until it is planned"
        )


def test_plan_knows_no_setting_that_is_gone() -> None:
    for kind in COUNTED:
        gone = {*COUNTED[kind], *WITHOUT_EFFECT[kind]} - {field.name for field in fields(kind)}
        assert not gone, f"take {gone} out of rosetrainer/planner/settings.py"


@every_setting
def test_a_setting_changes_the_plan_or_is_said_not_to(kind: type, field: Field[Any]) -> None:
    as_it_is = planned(kind, field, getattr(getattr(base(field), COMPONENTS[kind]), field.name))
    known = COUNTED[kind].get(field.name)
    for value in others(kind, field):
        if known and value not in known:
            with pytest.raises(ConfigError, match=f"plan has no closed form for {field.name}="):
                planned(kind, field, value)
        elif field.name in COUNTED[kind] and value not in SAME_BYTES.get(field.name, ()):
            assert planned(kind, field, value) != as_it_is, f"{field.name} is not counted"
        else:
            assert planned(kind, field, value) == as_it_is, f"{field.name} has an effect"


def test_a_setting_that_plan_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from its default, at which all is as it was before the setting was there."""
    monkeypatch.delitem(settings.COUNTED[GPTConfig], "bias")
    assert plan_command(["--vocabulary", "99"]) == 0
    with pytest.raises(ConfigError) as caught:
        plan_command(["--vocabulary", "99", "--no-bias"])
    assert str(caught.value) == (
        "plan has no closed form for bias=False, only for True; one belongs in "
        "rosetrainer/planner/layout.py, and its name in settings.py beside it"
    )


def test_another_architecture_or_optimizer_is_refused() -> None:
    rotary = ["--architecture", "rotary", "--no-tied"]
    with pytest.raises(
        ConfigError,
        match="architecture=rotary, only for gpt2, llama, bert, glm, t5 or transformer_xl; one",
    ):
        plan_command(["--vocabulary", "99", *rotary])
    with pytest.raises(ConfigError, match="optimizer=muon, only for adamw; one belongs in"):
        plan_command(["--vocabulary", "99", "--optimizer", "muon"])
    with pytest.raises(ConfigError, match="llama with pp_schedule=zero-bubble; it can be"):
        plan(LLAMA.model, replace(LLAMA.parallel, pp_schedule="zero-bubble"), Work(1, 16))
    model = replace(TRAIN.model, architecture="rotary", tied=False)
    with pytest.raises(ConfigError, match="no closed form for architecture=rotary"):
        plan(model, TRAIN.parallel, Work(1, 16))

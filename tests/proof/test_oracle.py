"""An oracle that does not know a model says so in one line, and what is to be taught to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from rosetrainer.commands import parity
from rosetrainer.config import GPTConfig, OptimConfig
from rosetrainer.models.gpt import GPTModel, LayerNorm
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.proof import report, trajectory
from rosetrainer.proof.oracles import KNOWN, ORACLES
from rosetrainer.proof.reference import ReferenceGPT
from rosetrainer.validation import ConfigError

MODEL = GPTConfig(vocab_size=16, context_length=8, n_layers=1, n_heads=2, d_model=8)


@pytest.mark.parametrize("name", [field.name for field in fields(GPTConfig)])
def test_an_oracle_knows_every_setting(name: str) -> None:
    assert name in KNOWN, (
        f"no oracle computes GPTConfig.{name}, so nothing proves it in a layout: write it in plain "
        "torch in rosetrainer/proof/reference.py, then name it in KNOWN (oracles.py)"
    )


def test_no_oracle_knows_a_setting_that_is_gone() -> None:
    gone = set(KNOWN) - {field.name for field in fields(GPTConfig)}
    assert not gone, f"take {gone} out of KNOWN (rosetrainer/proof/oracles.py)"


def test_a_setting_that_no_oracle_computes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KNOWN, "bias")
    with pytest.raises(ConfigError) as caught:
        parity.main(["--no-bias"])
    assert str(caught.value) == (
        "parity has no oracle for bias=False, only for True; write it in plain torch in "
        "rosetrainer/proof/reference.py, then name it in KNOWN (oracles.py)"
    )


def test_an_architecture_without_an_oracle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was compared with GPT-2 before: a traceback, or a bug that is none."""
    monkeypatch.delitem(ORACLES, "rotary")
    monkeypatch.setitem(KNOWN, "architecture", tuple(ORACLES))
    with pytest.raises(
        ConfigError,
        match="for architecture=rotary, only for gpt2, llama, bert, t5, glm or transformer_xl; ",
    ):
        parity.main(["--architecture", "rotary", "--no-tied"])


class QueryNormGPT(GPTModel):
    """A GPT with a parameter that no setting announces."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.blocks[0].add_module("query_norm", LayerNorm(8, False, self.tp))


def test_a_parameter_that_the_oracle_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "build_model", QueryNormGPT)
    with pytest.raises(ConfigError) as caught:
        report.show_proof(MODEL, ParallelContext(), torch.float64, OptimConfig())
    assert str(caught.value) == (
        "blocks.0.query_norm.weight is (8,) in the model and missing in its oracle, ReferenceGPT; "
        "teach the oracle in plain torch what the model does (rosetrainer/proof/)"
    )


def test_a_parameter_that_the_model_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(ReferenceGPT):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.blocks[0].add_module("gate", nn.Linear(8, 32, bias=False))

    monkeypatch.setitem(ORACLES, "gpt2", Wider)
    with pytest.raises(ConfigError, match=r"gate.weight is missing in the model and \(32, 8\) in "):
        report.show_proof(MODEL, ParallelContext(), torch.float64, OptimConfig())

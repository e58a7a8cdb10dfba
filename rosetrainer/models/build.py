"""Which model a config asks for."""

from __future__ import annotations

from rosetrainer.config import GPTConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.rotary import RotaryGPT
from rosetrainer.parallel.context import ParallelContext

ARCHITECTURES: dict[str, type[GPTModel]] = {"gpt2": GPTModel, "rotary": RotaryGPT}


def build_model(config: GPTConfig, context: ParallelContext | None = None) -> GPTModel:
    """The model of config.architecture, its weights empty. Raises ConfigError as GPTModel does."""
    chosen = ARCHITECTURES.get(config.architecture, GPTModel)  # which refuses what is neither
    return chosen(config, context)

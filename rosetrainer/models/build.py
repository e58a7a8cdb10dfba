"""Which model a config asks for."""

from __future__ import annotations

from dataclasses import replace

import torch

from rosetrainer.config import GPTConfig
from rosetrainer.models.bert import Bert
from rosetrainer.models.glm import Glm
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.llama import Llama
from rosetrainer.models.rotary import RotaryGPT
from rosetrainer.models.t5 import T5
from rosetrainer.models.transformer_xl import TransformerXL
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.pipeline.split_backward import split_backward
from rosetrainer.parallel.pipeline.stage import cut_model
from rosetrainer.parallel_config import SPLIT_BACKWARD

ARCHITECTURES: dict[str, type[GPTModel]] = {
    "gpt2": GPTModel,
    "rotary": RotaryGPT,
    "llama": Llama,
    "bert": Bert,
    "t5": T5,
    "glm": Glm,
    "transformer_xl": TransformerXL,
}


def build_model(config: GPTConfig, context: ParallelContext | None = None) -> GPTModel:
    """The model of config.architecture, its weights empty; in a pipeline this rank's stages of it.

    Raises ConfigError as GPTModel does.
    """
    chosen = ARCHITECTURES.get(config.architecture, GPTModel)  # which refuses what is neither
    if context is None or context.pp.size == 1:
        return chosen(config, context)
    model = chosen(config, replace(context, device=torch.device("meta")))
    cut_model(model, context)
    if context.parallel.pp_schedule in SPLIT_BACKWARD:
        split_backward(model)
    return model

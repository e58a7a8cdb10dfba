"""torch.compile of each transformer block, where it is faster: fused kernels between the products.

Regional: the blocks are alike, so one is compiled for all of them and compiling takes as long for
48 as for one. What is around them stays Python: batches, the vocabulary's checks, the collectives
over dp and their ledger, the optimizer.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rosetrainer.config import TrainConfig
from rosetrainer.validation import ConfigError


def compiles(config: TrainConfig, tp_size: int, device: torch.device) -> tuple[bool, str]:
    """(whether the blocks are compiled, one line about it: "" where nobody expects them to be).

    Raises ConfigError if config.hardware.compile is "on" and it cannot be.
    """
    wanted = config.hardware.compile
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False, ""
    problem = obstacle(config, tp_size) or missing_tool(device)
    if problem and wanted == "on":
        raise ConfigError(f"compile=on does not go with {problem}; or use --compile off")
    if problem:
        return False, f"compile=auto is off: it does not go with {problem}"
    return True, "blocks by torch.compile: the first step takes longer, and so does an evaluation's"


def obstacle(config: TrainConfig, tp_size: int) -> str:
    """What of this config torch.compile has no graph for, and what would work; "" if nothing."""
    if tp_size > 1:
        return f"tp_size={tp_size}, whose blocks hold collectives; tp_size can be 1"
    if config.parallel.pp_size > 1:
        return f"pp_size={config.parallel.pp_size}, a pipeline's stages; pp_size can be 1"
    if config.parallel.zero:
        return f"zero={config.parallel.zero}, which swaps a block's parameters; zero can be 0"
    if config.model.architecture == "rotary":
        return "architecture=rotary, which turns by complex numbers; architecture can be gpt2"
    if config.model.dropout:
        return f"dropout={config.model.dropout}, whose masks are keyed in Python; dropout can be 0"
    if config.parallel.recompute == "attention":
        return "recompute=attention, a part of a block; recompute can be none or block"
    if config.precision.deterministic:
        return "deterministic=True, as kernels are chosen by their time; it can be False"
    return ""


def missing_tool(device: torch.device) -> str:
    """What torch.compile needs on this machine for the device and does not find, or ""."""
    import sysconfig  # for whoever asks: each import is time to the first step

    if device.type == "cuda":
        if find_spec("triton") is None:
            return "a torch without Triton; install it: pip install triton"
        # Asking starts CUDA, so only ranks ask: they may want the GPU alone.
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU older than Volta, for which Triton makes no kernels; it needs 7.0"
        variable, names = "CC", ["gcc", "clang"]
    else:
        variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    names = shlex.split(os.environ.get(variable, ""))[:1] or names
    if not any(map(shutil.which, names)):
        return f"a machine without {' or '.join(names)}; install one, or set {variable}"
    folders = {sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY")}
    if not any(folder and (Path(folder) / "Python.h").exists() for folder in folders):
        return "a Python without Python.h; install its headers, such as the package python3-dev"
    return ""


def compile_blocks(blocks: Iterable[Any], backend: str = "inductor") -> None:
    """From now on each block of a model runs compiled. Names of parameters stay as they are.

    backend: torch.compile's. The function inside a block is compiled, not the module: recompute of
    whole blocks then stands outside, and hooks, names and types do not change. Shapes are
    fixed: a batch of another size is compiled again, so no kernel depends on what ran before it.
    """
    # fp32 means fp32 here; who wants tensor cores takes bfloat16, as dtype=auto does.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    for block in blocks:
        block.layers = torch.compile(block.layers, dynamic=False, backend=backend)

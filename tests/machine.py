"""What a machine is taken to be fast at: tests never go by what a loaded one measures."""

from __future__ import annotations

from pathlib import Path

import torch

from rosetrainer.hardware import measured
from rosetrainer.hardware.kernel_times import Ratios
from rosetrainer.hardware.measured import Measured
from rosetrainer.hardware.processor import cpu_text, has_native_bf16

FAST, SLOW = 0.5, 2.0


def like(bf16: bool = False, linear: bool = False, sums: bool = False) -> Measured:
    """A machine on which these are faster than torch's in fp32."""
    return Measured(Ratios(*(FAST if fast else SLOW for fast in (bf16, linear, sums))), "given")


def by_its_words() -> Measured:
    """What this machine's maker and flags let expect."""
    words = cpu_text().split()
    amd = "AuthenticAMD" in words and torch.backends.mkldnn.is_available()
    return like(has_native_bf16(torch.device("cpu")), amd, amd and "avx512f" in words)


def keep_by_its_words(folder: Path) -> None:
    """As if it were measured."""
    key = measured.key_of_this_machine()
    measured.keep(measured.path_of(folder, key), key, by_its_words().ratios)

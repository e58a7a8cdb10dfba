"""What the processor says of itself: its name, and whether it multiplies bf16."""

from __future__ import annotations

import platform
from itertools import takewhile
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def cpu_text() -> str:
    """What Linux says of the first processor, its flags among it; elsewhere nothing."""
    try:
        with CPUINFO.open() as file:
            return "".join(takewhile(str.strip, file))
    except OSError:
        return ""


def processor() -> tuple[str, str]:
    """Its name, and its flags: of a virtual machine the name alone may say little."""
    told = dict(line.partition(":")[::2] for line in cpu_text().splitlines())
    told = {name.strip(): value.strip() for name, value in told.items()}
    part = [told[key] for key in ("CPU implementer", "CPU part") if key in told]
    name = told.get("model name") or " ".join([platform.machine(), *part])
    return name, told.get("flags") or told.get("Features", "")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device says that it multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    words = cpu_text().split()  # which torch 2.11 reads too, but does not tell
    return "amx_bf16" in words or "avx512_bf16" in words

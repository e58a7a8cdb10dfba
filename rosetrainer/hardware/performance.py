"""Precision and speed: what this machine multiplies in, how fast, and what helps it."""

from __future__ import annotations

import os
import time

import torch

from rosetrainer.environment import usable_cores, world_from_environment
from rosetrainer.hardware import measured
from rosetrainer.hardware.processor import has_native_bf16


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; "auto" is bf16 where it is faster, else fp32.

    On a CPU it was measured. A GPU tells what it has.
    """
    if wanted == "auto":
        on_cpu = device.type == "cpu"
        fast = measured.machine().is_faster("bf16") if on_cpu else has_native_bf16(device)
        wanted = "bfloat16" if fast else "float32"
    dtype = getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    return dtype


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.015) -> float:
    """FLOP/s of this rank's best large matrix product, with the threads and kernels that it has."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)  # the first one chooses kernels, which on CUDA takes longer than all that follow
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def be_deterministic() -> None:
    """Same bits each time, on CUDA too; an operation that cannot raises RuntimeError.

    To be called before CUDA starts: cuBLAS reads its setting then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def set_threads(wanted: int) -> None:
    """`wanted` threads; 0 leaves it to OMP_NUM_THREADS, or shares the cores among local ranks."""
    if wanted:
        torch.set_num_threads(wanted)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(usable_cores() // world_from_environment()[3], 1))

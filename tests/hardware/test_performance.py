"""Precision and figures: what is chosen, what it does to a layer, and how speed is counted."""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import random_batch, tiny_config
from ranks import run_ranks

from rosetrainer.hardware import measured, processor
from rosetrainer.hardware.kernel_times import Ratios
from rosetrainer.hardware.measured import Measured
from rosetrainer.hardware.memory import give_back_freed_memory, keep_freed_memory
from rosetrainer.hardware.performance import (
    choose_dtype,
    matmul_peak,
    set_threads,
)
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.training.step import compute_gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "expected"), [(0.3, torch.bfloat16), (0.95, torch.float32), (9.0, torch.float32)]
)
def test_auto_is_bf16_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(measured, "machine", lambda: Measured(Ratios(bf16), "given"))
    assert choose_dtype("auto", CPU) == expected
    monkeypatch.setattr(measured, "machine", None)  # whoever asks fails
    assert choose_dtype("float64", CPU) == torch.float64


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_training_multiplies_in_the_dtype_over_fp32_parameters(wanted: str) -> None:
    dtype = choose_dtype(wanted, CPU)
    model = GPTModel(tiny_config())
    init_weights(model, seed=1)
    seen = set()
    layer = model.get_submodule("blocks.0.feed_forward.dense_h_to_4h")
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    autocast = autocast_for(dtype, CPU)
    batch = [(0, *random_batch(tiny_config(), 2))]
    compute_gradients(model, batch, ParallelContext(), autocast)
    assert seen == {dtype}
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_bf16_stays_near_fp32() -> None:
    model = GPTModel(tiny_config())
    init_weights(model, seed=1)
    losses = []
    for wanted in ("float32", "bfloat16"):
        autocast = autocast_for(choose_dtype(wanted, CPU), CPU)
        batch = [(0, *random_batch(tiny_config(), 4))]
        losses.append(compute_gradients(model, batch, ParallelContext(), autocast))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_peak_is_a_rate_of_this_machine() -> None:
    assert 1e8 < matmul_peak(CPU, torch.float32, seconds=0.05) < 1e14


def pages_taken_again(set_malloc: Callable[[], None] | None) -> int:
    """Pages that the system has to give when 64 MiB are freed and taken ten times more."""
    if set_malloc:
        set_malloc()
    for _ in range(5):  # until a place is found that is large enough
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    pages = 2**26 // resource.getpagesize()
    assert run_ranks(1, pages_taken_again, keep_freed_memory)[0] < pages
    assert run_ranks(1, pages_taken_again, None)[0] >= 10 * pages, "control: glibc's default"


def mappings_left(set_malloc: Callable[[], None] | None) -> int:
    """Bytes of this process's data that stay when 8 MiB are taken and freed eight times, each with
    a small tensor that stays."""
    if set_malloc:
        set_malloc()
    torch.ones(2**22)  # is freed: from here on glibc's default takes smaller ones from its heap
    before, small = data_bytes(), []
    for _ in range(8):
        large = torch.ones(2**21)
        small.append(torch.ones(2**10))  # stays, behind it
        del large
    return data_bytes() - before


def data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_given_back_where_small_tensors_stay_behind_it() -> None:
    assert run_ranks(1, mappings_left, give_back_freed_memory)[0] < 2**22
    assert run_ranks(1, mappings_left, None)[0] >= 2**22, "control: glibc's default"


def test_threads_are_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
        set_threads(0)  # OMP_NUM_THREADS is set, so nothing changes
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 64)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
        set_threads(0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_native_bf16_is_what_torch_says(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert processor.has_native_bf16(CPU) == expected


def test_the_first_processor_is_read_where_torch_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    assert not processor.has_native_bf16(CPU)
    assert processor.processor() == (platform.machine(), "")
    cpuinfo.write_text("model name\t: A: 1\nflags\t\t: fpu avx512_bf16 amx\n\nflags\t: fpu\n")
    assert processor.has_native_bf16(CPU)
    assert processor.processor() == ("A: 1", "fpu avx512_bf16 amx")
    cpuinfo.write_text("CPU part\t: 0xd40\nFeatures\t: fp\n\nflags : avx512_bf16")
    assert not processor.has_native_bf16(CPU)
    assert processor.processor() == (f"{platform.machine()} 0xd40", "fp")

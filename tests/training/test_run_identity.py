"""What `auto` comes to on this machine, and that a resumed run keeps what it came to before."""

from __future__ import annotations

import pytest
import torch
from machine import like

from rosetrainer.config import TrainConfig
from rosetrainer.hardware import measured
from rosetrainer.training.run_identity import came_to, settle

CPU = torch.device("cpu")
NEW = ("", "")
BF16 = "dtype=auto is bfloat16 (a block in bfloat16 takes 0.50 of one in float32); given"
FP32 = "dtype=auto is float32 (a block in bfloat16 takes 2.00 of one in float32), kernels=auto is "
ONEDNN = "(oneDNN's linear takes 0.50 of torch's time, its sums 2.00)"


@pytest.mark.parametrize(
    ("bf16", "given", "resumed", "came", "said"),
    [
        (True, {}, NEW, ("bfloat16", "layer_norm,attention"), [BF16]),
        (False, {}, NEW, ("float32", "layer_norm,linear"), [f"{FP32}layer_norm,linear {ONEDNN}"]),
        (
            True,
            {"dtype": "float32"},
            NEW,
            ("float32", "layer_norm,linear"),
            [f"kernels=auto is layer_norm,linear {ONEDNN}"],
        ),
        (True, {"dtype": "float32", "kernels": "torch"}, NEW, ("float32", "torch"), []),
        (False, {"kernels": "torch"}, NEW, ("float32", "torch"), [FP32.partition(",")[0]]),
        (
            True,
            {"dtype": "float32", "kernels": "ours"},
            ("float32", "torch"),
            ("float32", "layer_norm,linear,sums"),
            [],
        ),
        (
            False,
            {"dtype": "float32"},
            ("float32", "layer_norm,sums"),
            ("float32", "layer_norm,sums"),
            [
                "kernels=auto is layer_norm,linear here, but the run began with layer_norm,sums "
                "and goes on with layer_norm,sums"
            ],
        ),
        (
            False,
            {},
            ("bfloat16", "layer_norm,attention"),
            ("bfloat16", "layer_norm,attention"),
            ["dtype=auto is float32 here, but the run began in bfloat16 and goes on in it, which"],
        ),
        (True, {}, ("bfloat16", ""), ("bfloat16", "layer_norm,attention"), [BF16]),  # an older one
        (True, {"dtype": "float64"}, NEW, ("float64", "layer_norm"), []),
    ],
)
def test_what_auto_comes_to(
    monkeypatch: pytest.MonkeyPatch,
    bf16: bool,
    given: dict[str, str],
    resumed: tuple[str, str],
    came: tuple[str, str],
    said: list[str],
) -> None:
    monkeypatch.setattr(measured, "machine", lambda: like(bf16=bf16, linear=True))
    config, lines = settle(TrainConfig().with_settings(**given), resumed, CPU)
    assert came_to(config) == came
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_on_cuda_there_are_no_kernels_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "machine", None)  # whoever asks fails
    config = TrainConfig().with_settings(dtype="float32")
    for resumed in (NEW, ("float32", "layer_norm,linear")):
        config, lines = settle(config, resumed, torch.device("cuda"))
        assert (came_to(config), lines) == (("float32", ""), [])

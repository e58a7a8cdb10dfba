"""What the parity tests share: small configs, random dense weights, and what "equal" means."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rosetrainer.commands import checkpoint as checkpoint_command
from rosetrainer.config import GPTConfig
from rosetrainer.models.build import build_model
from rosetrainer.parallel.sharding import load_whole
from rosetrainer.proof.reference import ReferenceGPT

TOLERANCE = 1e-10  # of the dense tensor's largest value, in float64


def tiny_config(**changes: object) -> GPTConfig:
    """Two heads a rank at tp 4 (with one, interleaved q, k, v pass), d_head not d_model/n_heads."""
    values: dict[str, object] = {
        "vocab_size": 29,
        "context_length": 12,
        "n_layers": 2,
        "n_heads": 8,
        "d_model": 24,
        "d_head": 5,
        "d_ff": 40,
    }
    return GPTConfig(**{**values, **changes})  # type: ignore[arg-type]


def dense_model(config: GPTConfig, seed: int = 0) -> ReferenceGPT:
    """The oracle in float64 with random weights: no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    dense = ReferenceGPT(config).double()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return dense


def random_batch(
    config: GPTConfig, rows: int, seed: int = 1, ignored: float = 0.25
) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), each (rows, context_length - 2); some labels are -100."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.context_length - 2)
    input_ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.randint(config.vocab_size, shape, generator=generator)
    return input_ids, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def assert_equal(name: str, ours: Tensor, dense: Tensor, largest: float | None = None) -> None:
    """max|ours - dense| <= 1e-10 x max|dense|, or x largest"""
    assert ours.dtype == dense.dtype == torch.float64, f"{name} is {ours.dtype}"
    assert ours.shape == dense.shape, f"{name} is {tuple(ours.shape)}, not {tuple(dense.shape)}"
    worst = (ours - dense).abs().max().item()
    largest = dense.abs().max().item() if largest is None else largest
    assert worst <= TOLERANCE * largest, f"{name} differs by {worst:.3g}, largest {largest:.3g}"


def assert_all_equal(ours: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """Every tensor; a key bias is held against the largest value of its attention layer.

    Without rotary positions it moves no attention weight: its true gradient is zero, and what it
    has, in its moments and after an update too, is rounding noise.
    """
    assert ours.keys() == dense.keys()
    for name in dense:
        if not name.endswith("query_key_value.bias"):
            assert_equal(name, ours[name], dense[name])
            continue
        layer = name.removesuffix("query_key_value.bias")
        largest = max(t.abs().max().item() for n, t in dense.items() if n.startswith(layer))
        whole = dense[name].abs().max().item()
        thirds = zip("qkv", ours[name].chunk(3), dense[name].chunk(3), strict=True)
        for letter, our_third, dense_third in thirds:
            held_against = largest if letter == "k" else whole
            assert_equal(f"{letter} of {name}", our_third, dense_third, held_against)


def gradients(dense: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in dense.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def saved_weights(run: Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint, whole, as `checkpoint export` writes them."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        out = Path(folder) / "weights.safetensors"
        checkpoint_command.main(["export", str(run), "--out", str(out)])
        return load_file(out)


def assert_padding_moves_nothing(config: GPTConfig, dense: ReferenceGPT, side: str) -> None:
    """Rows with unequally much padding on one side, against the oracle, which cuts it off."""
    input_ids, labels = random_batch(config, 4)
    mask = torch.ones_like(input_ids)
    length = input_ids.shape[1]
    for row in range(4):
        mask[row, slice(0, row) if side == "left" else slice(length - row, length)] = 0
    model = build_model(config).double()
    load_whole(model, dense.state_dict())
    logits, loss = model(input_ids, mask, labels)
    expected_logits, expected = dense(input_ids, mask, labels)
    assert expected is not None
    assert_equal("logits", logits[mask.bool()], expected_logits[mask.bool()])
    assert_equal("loss", loss, expected)

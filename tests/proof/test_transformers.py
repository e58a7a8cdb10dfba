"""Models of Hugging Face's library, read from their folders, against that library's own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface
import pytest
import torch
from huggingface import CASES, ONE_HEAD, WRITES, Made
from once import Once
from ranks import run_ranks
from torch import Tensor

from rosetrainer.checkpoint.huggingface.families import model_of, written_as
from rosetrainer.checkpoint.huggingface.load import Weights, find_weights, load_weights
from rosetrainer.commands.generate import without_window
from rosetrainer.config import ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.generation import SamplingConfig, generate
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.t5 import T5, Answer
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.data_parallel import reduce_gradients
from rosetrainer.parallel.sharding import gather_whole

TOLERANCE = {"float64": 1e-8, "float32": 1e-5}
LAYOUTS: dict[str, ParallelConfig] = {
    "tp1": ParallelConfig(1, 1),
    "tp1-blocks-again": ParallelConfig(1, 1, recompute="block"),
    "tp2": ParallelConfig(2, 1),
    "tp2-sequence-parallel-blocks-again": ParallelConfig(2, 1, True, "block"),
    "tp4": ParallelConfig(4, 1, recompute="attention"),
    "tp4-sequence-parallel": ParallelConfig(4, 1, True),
}
Found = dict[str, dict[str, Any]]  # by dtype and layout: what differs by how much


def loaded(
    folder: Path, context: ParallelContext, dtype: torch.dtype = torch.float32
) -> tuple[GPTModel, Weights]:
    config = model_of(folder)
    weights = find_weights(folder, config)
    model = build_model(config, context).to(dtype)
    load_weights(model, weights)
    return model, weights


def off(ours: Tensor, theirs: Tensor, beside: Tensor | None = None) -> float:
    """The worst difference, as a fraction of the largest value, of `beside` if given."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    largest = (theirs if beside is None else beside).abs().max()
    assert theirs.isfinite().all() and largest > 0
    return float((ours.detach() - theirs).abs().max() / largest)


def their_names(found: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    return {
        name: tensor
        for ours, source in weights.sources.items()
        for name, tensor in zip(source.names, source.split(found[ours]), strict=True)
    }


def beside(name: str, gradients: dict[str, Tensor]) -> Tensor:
    """What measures an error in a gradient: where positions do not turn keys, their bias moves
    nothing and has none, so that the weight's beside it does."""
    return gradients[name.replace("key.bias", "key.weight")]


def differences(
    folder: Path, context: ParallelContext, dtype: str, model_type: str
) -> dict[str, float]:
    """Of logits, loss and every gradient, by the library's names."""
    model, weights = loaded(folder, context, getattr(torch, dtype))
    expected: dict[str, Any] = torch.load(folder / f"{dtype}.pt", weights_only=True)
    inputs, more, real = huggingface.our_inputs(model_type)
    logits, loss = model(*inputs, **more)
    loss.backward()
    reduce_gradients(model, context)
    ours, theirs = their_names(gather_whole(model, gradients=True), weights), expected["gradients"]
    assert ours.keys() == theirs.keys()
    found = {
        f"gradient of {name}": off(ours[name], theirs[name], beside(name, theirs))
        for name in theirs
    }
    found["logits"] = off(logits[real], expected["logits"][real])
    return found | {"loss": off(loss, expected["loss"])}


def on_ranks(size: int, case: str, folder: Path) -> Found:
    """Everything that ranks of this number compute of a case, in one launch."""
    found: Found = {}
    for layout, parallel in LAYOUTS.items():
        if parallel.tp_size != size:
            continue
        context, kind = init_parallel(parallel), case.partition("-")[0]
        for dtype in TOLERANCE:
            found[f"{dtype} {layout}"] = differences(folder, context, dtype, kind)
        if (
            case in WRITES and not parallel.sequence_parallel
        ):  # generation has lengths that tp does not divide
            found["written"] = {"ids": write(folder, context, huggingface.tokens_of(case))}
        moved = sum(traffic.payload_bytes for traffic in context.tp.ledger.entries.values())
        assert (moved > 0) == (size > 1)
    return found


def write(folder: Path, context: ParallelContext, tokens: int) -> list[int]:
    config, prompt = model_of(folder), huggingface.batch()[0][0, :3]
    if config.architecture != "gpt2":
        config = without_window(config, len(prompt) + tokens)
    model = build_model(config, context)
    load_weights(model, find_weights(folder, config))
    greedy = SamplingConfig(tokens=tokens, temperature=0)
    if isinstance(model, T5):
        start = torch.tensor([model.config.start_token])
        answer = Answer(model, prompt)
        return [*start.tolist(), *generate(answer, start, greedy, context)]
    return [*prompt.tolist(), *generate(model, prompt, greedy, context)]


@pytest.fixture
def results(case: str, once: Once, made: Made) -> list[Found]:
    """What each rank found, of 1, 2 and 4 ranks one after the other."""

    def compute(_: Path) -> list[Found]:
        launches = [run_ranks(size, on_ranks, size, case, made(case)) for size in (1, 2, 4)]
        return [found for ranks in launches for found in ranks]

    found: list[Found] = once(f"transformers_{case}", compute)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_equals_the_library(
    case: str, dtype: str, layout: str, results: list[Found]
) -> None:
    """float64: where the library computes in fp32 inside, it is made not to; float32: as it is."""
    of_ranks = [found[key] for found in results if (key := f"{dtype} {layout}") in found]
    assert len(of_ranks) == LAYOUTS[layout].tp_size
    for found in of_ranks:
        assert {"logits", "loss"} < found.keys() and len(found) > 15
        wrong = {what: error for what, error in found.items() if not error <= TOLERANCE[dtype]}
        assert not wrong


@pytest.mark.parametrize("case", ONE_HEAD)
def test_one_head_equals_the_library(case: str, made: Made) -> None:
    found = differences(made(case), ParallelContext(), "float64", case.partition("-")[0])
    assert len(found) > 15 and max(found.values()) <= TOLERANCE["float64"]


@pytest.mark.parametrize("case", CASES)
def test_both_sides_are_alive(case: str, made: Made) -> None:
    expected = torch.load(made(case) / "float64.pt", weights_only=True)
    gradients = expected["gradients"]
    assert min(float(beside(name, gradients).norm()) for name in gradients) > 1e-4
    assert abs(float(expected["loss"]) - torch.tensor(huggingface.V).log()) > 0.1


@pytest.mark.parametrize("case", WRITES)
def test_greedy_generation_takes_the_library_s_tokens(
    case: str, made: Made, results: list[Found]
) -> None:
    expected = torch.load(made(case) / "greedy.pt", weights_only=True)[0].tolist()
    assert len(expected) >= 1 + huggingface.tokens_of(case) and len(set(expected[3:])) > 1
    assert [found["written"]["ids"] for found in results] == [expected] * 7


@pytest.mark.parametrize("case", CASES)
def test_a_config_goes_there_and_back(case: str, made: Made) -> None:
    config = model_of(made(case))
    model_type, theirs = written_as(config)
    assert model_type == {"mistral": "llama"}.get(case, case.partition("-")[0])
    assert theirs["vocab_size"] == huggingface.V
    assert written_as(replace(config, dropout=0.1))[0] == model_type

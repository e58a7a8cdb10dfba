"""Proof on demand: it passes where all is right, and finds what is wrong, on one rank only too."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks

from rosetrainer.commands import parity
from rosetrainer.config import IGNORED, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.hardware import attention_blocks, onednn
from rosetrainer.hardware.attention_blocks import BLOCK
from rosetrainer.launch.errors import explain
from rosetrainer.optim import optimizer
from rosetrainer.parallel import comm, overlap
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.proof import letters, report, trajectory
from rosetrainer.proof.batches import MICRO_BATCHES, ROWS
from rosetrainer.proof.tolerances import ParityError, check_traffic, not_proven, prove
from rosetrainer.proof.trajectory import Proof

MODEL = GPTConfig(vocab_size=140, context_length=16, n_layers=2, n_heads=4, d_model=32)
LONGER = replace(MODEL, context_length=BLOCK + 32)  # attention in blocks takes two
SHORT = {"context_length": 48}  # where others show the blocks of attention
DISTANCES: dict[str, Any] = {"architecture": "transformer_xl"}
ROTARY: dict[str, Any] = {"architecture": "rotary", "tied": False}
LLAMA: dict[str, Any] = {
    "architecture": "llama",
    "bias": False,
    "tied": False,
    "n_kv_heads": 2,
    "qk_norm": True,
}
# dp, tp, what the layout adds, what the model adds, the optimizer.
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], Any]] = {
    "alone": (1, 1, {"recompute": "attention"}, {}, "adamw"),
    "tp": (1, 2, {}, {}, "adamw"),
    "dp": (2, 1, {}, {"tied": False}, "adamw"),
    "both": (2, 2, {"sequence_parallel": True, "recompute": "block"}, {}, "adamw"),
    "dropout": (1, 2, {"overlap": False}, {"dropout": 0.1, "context_length": 64}, "adamw"),
    "muon": (1, 2, {}, {}, "muon"),
    "rotary": (1, 2, {}, ROTARY, "muon"),
    "pipeline": (1, 1, {"pp_size": 2}, {"n_layers": 3}, "adamw"),
    "pipeline-tp": (
        1,
        2,
        {"pp_size": 2, "pp_schedule": "zero-bubble-v", "sequence_parallel": True},
        {"n_layers": 5, "dropout": 0.1, "tied": False, **SHORT},
        "muon",
    ),
    "pipeline-rotary": (
        2,
        1,
        {"pp_size": 2, "pp_schedule": "zero-bubble"},
        ROTARY | SHORT,
        "adamw",
    ),
    "pipeline-llama": (1, 2, {"pp_size": 2, "pp_schedule": "zero-bubble"}, LLAMA | SHORT, "muon"),
    "distances": (1, 2, {"sequence_parallel": True}, DISTANCES | SHORT, "muon"),
    "llama": (1, 2, {"sequence_parallel": True}, LLAMA | SHORT | {"n_kv_heads": 1}, "adamw"),
}


def right_layout(case: str, kernels: str = "auto") -> None:
    dp_size, _, layout, changes, kind = CASES[case]
    context = init_parallel(ParallelConfig(dp_size=dp_size, **layout))
    config, optim = replace(LONGER, **changes), OptimConfig(optimizer=kind)
    right = Proof(config, context, optim, kernels=kernels)
    for dtype in (torch.float32, torch.bfloat16):
        wrong = [column.wrong for column in prove(right, dtype)]
        assert wrong == [[]] * (3 if context.world_size > 1 else 2)


@pytest.mark.parametrize("case", CASES)
def test_a_right_layout_is_proved_right_in_each_dtype(case: str) -> None:
    dp_size, tp_size, layout, *_ = CASES[case]
    run_ranks(dp_size * tp_size * layout.get("pp_size", 1), right_layout, case)


def right_layout_without_hardware(case: str) -> None:
    """With torch's kernels and AdamW, and nothing of ours that is there for speed alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "CausalBlocks", None)  # whoever takes it fails
        patch.setattr(onednn, "linear", None)
        patch.setattr(optimizer, "AdamW", partial(torch.optim.AdamW, fused=True))
        right_layout(case, kernels="torch")


@pytest.mark.parametrize("case", ["tp", "dp", "muon", "rotary"])
def test_the_core_is_right_without_what_hardware_adds(case: str) -> None:
    run_ranks(CASES[case][0] * CASES[case][1], right_layout_without_hardware, case)


@pytest.mark.parametrize("d_model", [2, 4, 8])
def test_a_narrow_model_is_no_false_alarm(d_model: int) -> None:
    config = replace(MODEL, d_model=d_model, n_heads=2, n_layers=1, context_length=8)
    for dtype in (torch.float32, torch.bfloat16):
        columns = prove(Proof(config, ParallelContext(), OptimConfig()), dtype)
        assert [column.wrong for column in columns] == [[], []]


def wrong_rank() -> str:
    """Rank 1 computes with one weight a little off; what each rank says of it."""
    layout = init_parallel(ParallelConfig(dp_size=2))  # over tp the gathered logits would show it
    right = Proof.model

    def wrong(self: Proof, context: ParallelContext, *which: Any) -> torch.nn.Module:
        model = right(self, context, *which)
        if context.rank == 1:  # so not one process, which the oracle moves its weights with
            with torch.no_grad():
                list(model.parameters())[-1].add_(1e-6)
        return model

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(ParityError) as caught:
        monkeypatch.setattr(Proof, "model", wrong)
        report.show_proof(MODEL, layout, torch.float64)
    return str(caught.value)


def test_a_weight_that_is_wrong_on_one_rank_fails_on_every_rank() -> None:
    first, second = run_ranks(2, wrong_rank)
    assert first == second
    assert first.startswith("not the same as one process: logits differs by ")
    assert first.endswith("in float64 from the oracle, where rounding stays under 1e-10: a bug")


def test_its_flag_says_whose_kernels_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def recorded(dtype: torch.dtype, device: torch.device, wanted: str) -> Any:
        entered.append(wanted)
        return nullcontext()

    monkeypatch.setattr(trajectory, "fast_kernels", recorded)
    tiny = ["--d-model", "8", "--n-heads", "1", "--n-layers", "1"]
    assert parity.main(["--kernels", "torch", *tiny]) == 0
    assert set(entered) == {"torch"}


def without_f() -> str:
    context = init_parallel(ParallelConfig())
    with pytest.MonkeyPatch.context() as monkeypatch:
        nothing = lambda buffer, axis, *_: comm.Pending(None, axis.ledger, lambda: buffer)  # noqa: E731
        monkeypatch.setattr(overlap, "start_all_reduce", nothing)
        with pytest.raises(ParityError) as caught:
            report.show_proof(MODEL, context, torch.float64)
    return str(caught.value)


def test_a_missing_f_is_found_by_the_gradients_while_logits_agree() -> None:
    for text in run_ranks(2, without_f):
        assert text.startswith("not the same as one process: gradient of ")
        assert text.endswith(
            "a bug; the first wrong letter: the gradient of the output of "
            "blocks.1.feed_forward_norm, which blocks.1.feed_forward.dense_h_to_4h reads, should "
            "be I over tp and is P, a part of the sum"
        )


def first_wrong_letters() -> list[str | None]:
    """Of right layouts, of one in which `g` sums nothing, and of one that keeps others' tokens."""
    plain = Proof(MODEL, init_parallel(ParallelConfig()), OptimConfig())
    by_tokens = replace(plain.context.tp, sequence_parallel=True, overlap=False)
    sequence = replace(plain, context=replace(plain.context, tp=by_tokens))
    found = [letters.first_wrong_letter(proof) for proof in (plain, sequence)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm._Reduce, "forward", lambda ctx, x, axis: x.clone())
        found.append(letters.first_wrong_letter(plain))
    with pytest.MonkeyPatch.context() as patch:
        first = lambda x, axis, phase, dim: x.detach().chunk(axis.size, dim)[0]  # noqa: E731
        patch.setattr(comm, "reduce_scatter", first)
        found.append(letters.first_wrong_letter(sequence))
    return found


def test_the_first_wrong_letter_is_named_and_a_right_layout_has_none() -> None:
    for right, right_by_tokens, no_sum, others_tokens in run_ranks(2, first_wrong_letters):
        assert right is right_by_tokens is None
        start = "the first wrong letter: the output of token_embedding should be "
        assert no_sum == f"{start}I over tp and is P, a part of the sum"
        assert others_tokens == f"{start}V over tp, a rank's own tokens, and is not"


def nothing_moves() -> None:
    context = init_parallel(ParallelConfig(dp_size=2))
    with pytest.raises(ParityError, match="dp_size=2, but nothing moves over dp"):
        check_traffic(context)


def test_an_axis_over_which_nothing_moves_is_no_proof() -> None:
    run_ranks(2, nothing_moves)


def test_the_batches_are_uneven_and_one_rank_has_no_label() -> None:
    tp, dp = replace(ParallelContext().tp, size=2), replace(ParallelContext().dp, size=2)
    context = ParallelContext(tp, dp)
    (_, long), *short = Proof(LONGER, context, OptimConfig()).batches
    assert long.shape == (MICRO_BATCHES * ROWS * 2, BLOCK + 32)
    counts = (long != IGNORED).sum(1).tolist()
    assert counts == sorted(set(counts), reverse=True)  # no two alike
    assert counts[0] == BLOCK + 32
    assert counts[-1] == 0
    assert len(short) == 3
    for _, labels in short:
        of_ranks = (labels != IGNORED).view(MICRO_BATCHES, 2, -1).sum((0, 2))
        assert of_ranks[0] > 0
        assert of_ranks[1] == 0


def test_the_oracle_is_alive_and_clipping_bites() -> None:
    alive = Proof(MODEL, ParallelContext(), OptimConfig())
    found = alive.oracle
    assert abs(float(found["loss", "loss of step 1"]) - math.log(MODEL.vocab_size)) > 1e-3
    norm = float(found["gradient norm", "gradient norm of step 1"])
    assert norm > 2 * alive.calibration.clip_norms[0] * (1 - 1e-12) > 0
    assert all(t.abs().max() > 0 for (stage, _), t in found.items() if stage == "moved by updates")
    assert not_proven(alive) == []


def show_models_without_gradients(tp_size: int) -> None:
    context = init_parallel(ParallelConfig())
    one_id = replace(MODEL, vocab_size=1)
    one_wide = GPTConfig(vocab_size=8, context_length=4, n_layers=1, n_heads=tp_size, d_model=1)
    for config in (one_id, replace(one_wide, d_head=1)):
        report.show_proof(config, context, torch.bfloat16)


def test_what_has_no_gradient_in_truth_is_named_and_is_no_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_models_without_gradients(1)
    out = capsys.readouterr().out
    assert out.count("yes: what is left is rounding") == 2
    assert "so not proven: token_embedding.weight, position_embedding.weight, blocks.0" in out
    run_ranks(2, show_models_without_gradients, 2)


def test_a_long_context_is_proven_in_part_unless_all_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = GPTConfig(vocab_size=8, context_length=643, n_layers=1, n_heads=1, d_model=4)
    report.show_proof(long, ParallelContext(), torch.float64)
    assert "4 sequences of 640 tokens, of the 643 of context_length" in capsys.readouterr().out
    report.show_proof(long, ParallelContext(), torch.float64, whole=True)
    assert "4 sequences of 643 tokens, all of context_length" in capsys.readouterr().out


def test_the_command_ends_with_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trajectory, "draw_whole", lambda spec, *_: torch.full(spec.dense_shape, torch.nan)
    )
    with pytest.raises(ParityError) as caught:
        parity.main(
            ["--n-layers", "1", "--n-heads", "1", "--d-model", "8", "--context-length", "8"]
        )
    assert explain(caught.value, None) == (str(caught.value), 1)  # without a traceback
    assert "\n" not in str(caught.value)


def test_the_table_names_every_slice() -> None:
    lines = report.who_holds_what(report.GPTModel(MODEL), tp_size=2).splitlines()
    assert lines[0].split() == ["weight", "whole", "rank", "0", "rank", "1"]
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert len(by_name) == 3 + 1 + 12  # embeddings and final norm's two, and one block's
    assert by_name["token_embedding.weight"].endswith("all of it  all of it")

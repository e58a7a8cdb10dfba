"""Proof on demand: it passes where all is right, and finds what is wrong on one rank only."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from rosetrainer import comm, overlap, parity
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel_context import init_parallel

MODEL = GPTConfig(vocab_size=140, context_length=16, n_layers=2, n_heads=4, d_model=32)


def prove_everything_right(dp_size: int) -> int:
    context = init_parallel(ParallelConfig(dp_size=dp_size))
    differences = parity.prove(MODEL, context)
    assert all(difference.is_rounding for difference in differences)
    return len(differences)


@pytest.mark.parametrize(("dp_size", "tp_size"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_right_layout_is_proved_right(dp_size: int, tp_size: int) -> None:
    counts = run_ranks(dp_size * tp_size, prove_everything_right, dp_size)
    assert counts == [2 + 28] * (dp_size * tp_size)


def prove_with_a_wrong_rank(monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    """Rank 1 computes with one weight a little off; what each rank says of it."""
    context = init_parallel(ParallelConfig(dp_size=2))  # over tp the gathered logits would show it
    right = parity.load_whole

    def load_wrongly(model: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
        right(model, whole)
        if context.rank == 1:
            with torch.no_grad():
                list(model.parameters())[-1].add_(1e-6)

    monkeypatch.setattr(parity, "load_whole", load_wrongly)
    with pytest.raises(parity.ParityError) as caught:
        parity.show_proof(MODEL, context, torch.float64)
    return str(caught.value), context.rank == 0


def wrong_rank() -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return prove_with_a_wrong_rank(monkeypatch)


def test_a_weight_that_is_wrong_on_one_rank_fails_on_every_rank() -> None:
    (first, _), (second, _) = run_ranks(2, wrong_rank)
    assert first == second
    assert first.startswith("not the same as one process: logits differs by ")
    assert first.endswith("where rounding stays under 1e-10: a bug")


def without_f() -> str:
    context = init_parallel(ParallelConfig())
    with pytest.MonkeyPatch.context() as monkeypatch:
        nothing = lambda buffer, axis, *_: comm.Pending(None, axis.ledger, lambda: buffer)  # noqa: E731
        monkeypatch.setattr(overlap, "start_all_reduce", nothing)
        with pytest.raises(parity.ParityError) as caught:
            parity.show_proof(MODEL, context, torch.float64)
    return str(caught.value)


def test_a_missing_f_is_found_by_the_gradients_while_logits_agree() -> None:
    for text in run_ranks(2, without_f):
        assert "not the same as one process: gradient of token_embedding.weight differs" in text


def test_a_gradient_that_is_zero_in_truth_is_not_called_a_bug() -> None:
    one_wide = GPTConfig(vocab_size=8, context_length=4, n_layers=1, n_heads=1, d_model=1)
    context = init_parallel(ParallelConfig())
    assert all(difference.is_rounding for difference in parity.prove(one_wide, context))


def test_the_table_names_every_slice() -> None:
    lines = parity.who_holds_what(parity.GPTModel(MODEL), tp_size=2).splitlines()
    assert lines[0].split() == ["weight", "whole", "rank", "0", "rank", "1"]
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert len(by_name) == 3 + 1 + 12  # embeddings and final norm's two, and one block's
    assert by_name["token_embedding.weight"].endswith("all of it  all of it")

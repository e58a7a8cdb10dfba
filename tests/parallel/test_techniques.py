"""Each technique against the dense oracle, and what must stop a run, skip a step or be named."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    assert_all_equal,
    assert_equal,
    dense_model,
    gradients,
    random_batch,
    saved_weights,
    tiny_config,
)
from peak import Peak
from ranks import run_ranks

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.models.generation import SamplingConfig, generate
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.non_finite import NonFiniteGradientError, check_gradients
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.replicas import ReplicaError, check_replicas, checksum
from rosetrainer.parallel.sharding import gather_whole, init_weights, load_whole
from rosetrainer.proof.reference import ReferenceDropout, ReferenceGPT
from rosetrainer.proof.tolerances import BOUND, prove
from rosetrainer.proof.trajectory import Proof
from rosetrainer.training import setup, trainer
from rosetrainer.training.resume_plan import ResumePlan
from rosetrainer.training.step import compute_gradients
from rosetrainer.validation import ConfigError

SEED, STEP, ROWS = 11, 3, 4
SEQUENCE: dict[str, object] = {"sequence_parallel": True}
# dp, tp, what the layout adds, what the model adds. At tp 4 the 29 ids all lie on rank 0.
CASES: dict[str, tuple[int, int, dict[str, object], dict[str, object]]] = {
    "alone": (1, 1, {"recompute": "block"}, {"vocab_size": 139}),
    "recompute": (1, 2, {"recompute": "block"}, {"vocab_size": 139}),
    "pad_ranks": (1, 4, {}, {"tied": False}),
    "no_overlap": (1, 2, {"overlap": False, "recompute": "attention"}, {"vocab_size": 139}),
    "sequence": (1, 2, SEQUENCE, {"vocab_size": 139, "tied": False}),
    "sequence_4": (1, 4, SEQUENCE | {"overlap": False, "recompute": "attention"}, {}),
    "grid": (2, 2, SEQUENCE | {"recompute": "block"}, {"vocab_size": 139}),
}


def loaded(config: GPTConfig, context: ParallelContext) -> GPTModel:
    model = GPTModel(config, context).double()
    load_whole(model, dense_model(config).state_dict())
    return model


def check_case(case: str) -> None:
    dp_size, _, layout, changes = CASES[case]
    context = init_parallel(ParallelConfig(dp_size=dp_size, **layout))  # type: ignore[arg-type]
    config = tiny_config(context_length=16, dropout=0.1, **changes)
    dense = dense_model(config)
    input_ids, labels = (ids[:, :12] for ids in random_batch(config, ROWS))  # tp 4 divides 12
    edges = torch.tensor([0, 63, 64, 127, 128, 138]).clamp(max=config.vocab_size - 1)
    input_ids[0, :6] = labels[1, :6] = edges  # of each rank's slice of the vocabulary
    dropout = ReferenceDropout(config.dropout, SEED, STEP)
    dense_logits, dense_loss = dense(input_ids, labels=labels, dropout=dropout)
    dense_loss.backward()
    model, masks = loaded(config, context), DropoutSeed(SEED, STEP)
    size = ROWS // dp_size // 2  # two micro-batches on each rank
    own = [slice(r, r + size) for r in range(context.dp.rank * size, ROWS, dp_size * size)]
    for rows in own:
        logits, _ = model(input_ids[rows], seed=replace(masks, first_row=rows.start))
        assert_equal("logits", logits, dense_logits[rows])
    batches = [(rows.start, input_ids[rows], labels[rows]) for rows in own]
    loss = compute_gradients(model, batches, context, seed=masks)
    assert_equal("loss", torch.full_like(dense_loss, loss), dense_loss)
    assert_all_equal(gather_whole(model, gradients=True), gradients(dense))
    build_optimizer(model, OptimConfig(1e-2, weight_decay=0.5)).step()
    for table in {model.token_embedding.weight, model.output_head.weight}:
        real = max(config.vocab_size - context.tp.rank * len(table), 0)
        assert table[:real].ne(0).all() and table[real:].eq(0).all()


@pytest.mark.parametrize("case", CASES)
def test_every_technique_equals_dense(case: str) -> None:
    run_ranks(CASES[case][0] * CASES[case][1], check_case, case)


def check_out_of_range() -> None:
    model = loaded(tiny_config(), init_parallel(ParallelConfig()))
    input_ids, labels = random_batch(tiny_config(), rows=2)
    for wrong in (-1, 29, 128):  # 29 would be the first pad row
        changed = input_ids.index_fill(1, torch.tensor(2), wrong)
        for wrongly in ({"input_ids": changed}, {"input_ids": input_ids, "labels": changed}):
            with pytest.raises(ValueError, match=f"token id {wrong} is not .* of 0 to 28"):
                model(**wrongly)
    model(input_ids, labels=labels.fill_(-100))


def test_an_id_or_a_label_out_of_range_is_refused() -> None:
    for tp_size in (1, 2):
        run_ranks(tp_size, check_out_of_range)


def check_not_finite(bad_rank: int, bad: float) -> None:
    context = init_parallel(ParallelConfig(dp_size=2))
    model, batch = loaded(tiny_config(), context), random_batch(tiny_config(), ROWS)
    name = "blocks.1.attention_norm.weight"
    if context.rank == bad_rank:
        model.get_parameter(name).register_hook(lambda gradient: gradient * bad)
    message = re.escape(f"rank {bad_rank} has nan or inf in a gradient: {name}")
    model(batch[0], labels=batch[1])[1].backward()
    with pytest.raises(NonFiniteGradientError, match=message):
        check_gradients(model, context)
    with pytest.raises(NonFiniteGradientError, match=message):
        compute_gradients(model, [(0, *batch)], context)
    own = model.get_parameter(name).grad  # still this rank's alone
    assert own is not None
    assert own.isfinite().all() == (context.rank != bad_rank)


@pytest.mark.parametrize(("bad_rank", "bad"), [(3, math.nan), (2, math.inf)])
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(bad_rank: int, bad: float) -> None:
    run_ranks(4, check_not_finite, bad_rank, bad)


def blamed(model: GPTModel) -> str:
    try:
        check_gradients(model, ParallelContext())
    except NonFiniteGradientError as error:
        return str(error)
    return "nobody"


def test_finite_gradients_whose_squares_overflow_are_no_fault() -> None:
    """fp32 ends at 3.4e38, and so do sums of squares: 1e30 is large, but it is a number."""
    model = GPTModel(tiny_config())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    assert blamed(model) == "nobody"
    bad = model.get_parameter("blocks.1.attention_norm.weight").grad
    assert bad is not None
    for value in (math.nan, math.inf, -math.inf):
        bad[7] = value
        assert blamed(model).endswith("gradient: blocks.1.attention_norm.weight")


def check_drift() -> None:
    context = init_parallel(ParallelConfig(dp_size=2))
    model = loaded(tiny_config(), context)
    replicated, cut = "final_norm.bias", "blocks.0.attention.dense.weight"
    for drifted, name, other in ((1, replicated, 0), (2, replicated, 0), (3, cut, 1)):
        bits = model.get_parameter(name).data.view(torch.int64).view(-1)
        bits[5] ^= int(context.rank == drifted)
        message = f"after step 7 rank {drifted} holds another {name} than rank {other};"
        with pytest.raises(ReplicaError, match=re.escape(message)):
            check_replicas(model, context, step=7)
        bits[5] ^= int(context.rank == drifted)
    check_replicas(model, context, step=8)


def check_replicas_peak() -> None:
    context = init_parallel(ParallelConfig(dp_size=2))
    model = GPTModel(GPTConfig(4096, 8, n_layers=1, n_heads=2, d_model=128), context)
    init_weights(model, 0)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    with Peak(*model.parameters()) as peak:
        check_replicas(model, context, step=1)
    assert 0 < peak.bytes <= largest, peak.bytes / largest


def test_replicas_are_compared_in_less_memory_than_one_parameter_takes() -> None:
    run_ranks(2, check_replicas_peak)


def test_a_checksum_is_of_every_bit_and_its_place_whatever_the_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(97, 3, generator=generator)
    sums = []
    for chunk in (1, 7, 2**16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rosetrainer.parallel.replicas.CHUNK", chunk)
            sums.append(int(checksum(tensor)))
            for other in (tensor.flip(0), tensor.T, torch.nextafter(tensor, tensor + 1)):
                assert int(checksum(other)) != sums[0]
    assert len(set(sums)) == 1
    words = torch.tensor([1, 2, -4], dtype=torch.int16)
    assert int(checksum(words)) == 1 * 1 + 3 * 2 - 5 * 4


def test_a_replica_that_drifted_by_one_bit_is_named() -> None:
    run_ranks(4, check_drift)


def proof_with_a_wrong_rank() -> list[float]:
    layout, right = init_parallel(ParallelConfig(dp_size=2)), Proof.model

    def wrong(self: Proof, context: ParallelContext, *which: Any) -> GPTModel:
        model = right(self, context, *which)
        with torch.no_grad():
            list(model.parameters())[-1].add_(1e-6 * context.rank)
        return model

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Proof, "model", wrong)
        (column,) = prove(Proof(tiny_config(), layout, OptimConfig()))
    return [difference.worst for difference in column.differences]


def test_the_proof_asks_every_rank() -> None:
    first, second = run_ranks(2, proof_with_a_wrong_rank)
    assert first == second
    assert first[0] > BOUND  # the logits of rank 1's rows, which rank 0 has not seen


def write_with_a_seed_of_its_own() -> list[int]:
    context = init_parallel(ParallelConfig())
    sampling, prompt = SamplingConfig(tokens=12, seed=context.rank), torch.tensor([3, 1, 4])
    return list(generate(loaded(tiny_config(), context), prompt, sampling, context))


def test_ranks_that_draw_differently_write_the_first_rank_s_text() -> None:
    first, second = run_ranks(2, write_with_a_seed_of_its_own)
    assert first == second


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Three steps of a tiny model in float64; only the end is evaluated."""
    prepare(["markov", "--train-tokens", "9000", "--val-tokens", "900", "--out", f"{tmp_path}/in"])
    run = {"data": tmp_path / "in", "out": tmp_path / "run", "steps": 3}
    run |= {"eval_every": 0, "eval_tokens": 64, "dtype": "float64", "threads": 1}
    return TrainConfig(
        GPTConfig(vocab_size=8, context_length=8, n_layers=1, n_heads=2, d_model=16),
        ParallelConfig(dp_size=2),
        OptimConfig(1e-4, warmup_steps=0, global_batch_size=4, micro_batch_size=1),
    ).with_settings(check_replicas=1, **run)


def train_watched(
    config: TrainConfig, factor: float = 1.0, bad_steps: tuple[int, ...] = ()
) -> tuple[list[list[float]], str]:
    """(a norm's weight after each step, what stopped the run); on rank 1 it begins x factor."""
    seen: list[list[float]] = []

    def init_and_poison(model: GPTModel, seed: int) -> None:
        init_weights(model, seed)
        weight = model.final_norm.weight
        if os.environ["RANK"] == "1":
            weight.data *= factor
            weight.register_hook(lambda g: g * math.nan if len(seen) + 1 in bad_steps else None)

    with pytest.MonkeyPatch.context() as spy:
        spy.setattr(setup, "init_weights", init_and_poison)
        spy.setattr(setup, "matmul_peak", lambda *_: 1.0)  # it takes 0.3 s to measure
        spy.setattr(
            trainer, "check_replicas", lambda m, *_: seen.append(m.final_norm.weight.tolist())
        )
        try:
            setup.train(config, open_corpus(config.run.data, 8), ResumePlan(), (False, ""))
        except ConfigError as error:
            return seen, str(error)
    return seen, ""


# factor, bad_steps, max_skipped, dp; the steps that are survived, and what stops the run.
POISONED: dict[str, tuple[float, tuple[int, ...], int, int, int, str]] = {
    "skips": (1.0, (2,), 1, 2, 3, ""),
    "by_default": (1.0, (2,), 0, 1, 1, "step 2: rank 1 has .*: final_norm.weight; skipped 1.*"),
    "loss": (math.nan, (), 5, 2, 0, "the loss is nan at step 1; try a learning_rate .*"),
}


@pytest.mark.parametrize("case", POISONED)
def test_a_bad_step_is_skipped_where_asked_and_a_nan_loss_never(
    config: TrainConfig, case: str
) -> None:
    factor, bad_steps, max_skipped, dp_size, survived, error = POISONED[case]
    config = config.with_settings(max_skipped=max_skipped, dp_size=dp_size)
    for seen, told in run_ranks(2, train_watched, config, factor, bad_steps):
        assert re.fullmatch(error, told)  # one line
        moved = [old != new for old, new in zip([[1.0] * 16, *seen], seen, strict=False)]
        assert moved == [step not in bad_steps for step in range(1, survived + 1)]


def test_training_drops_by_step_and_row_and_evaluation_drops_nothing(config: TrainConfig) -> None:
    """At a learning rate of 0, so that every step's loss is the oracle's on the same weights."""
    model, optim = replace(config.model, dropout=0.3), replace(config.optim, learning_rate=0.0)
    run_ranks(2, train_watched, replace(config, model=model, optim=optim))
    run, out, corpus = config.run, Path(str(config.run.out)), open_corpus(config.run.data, 8)
    dense = ReferenceGPT(model).double()
    dense.load_state_dict(saved_weights(out))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def loss(batch: Any, dropout: ReferenceDropout) -> Any:
        input_ids, labels = map(torch.from_numpy, batch)
        exact = dense(input_ids, None, labels, dropout)[1].item()
        return pytest.approx(exact, abs=1.1e-6)  # the log has six decimals

    for step in range(3):
        batch = corpus.train_batch(run.seed, step, 4, range(4))
        assert log[step]["train/loss"] == loss(batch, ReferenceDropout(0.3, run.seed, step))
    assert log[-1]["val/loss"] == loss(next(corpus.val_batches(64, 8))[:2], ReferenceDropout())


def test_in_bfloat16_an_update_below_its_precision_is_not_lost(config: TrainConfig) -> None:
    """bf16 itself has nothing between 0.996 and 1: the weights have to stay fp32."""
    config = config.with_settings(dtype="bfloat16", dp_size=None)
    ((seen, _),) = run_ranks(1, train_watched, config)
    assert all(0 < abs(weight - 1) < 1.1e-4 for weight in seen[0])

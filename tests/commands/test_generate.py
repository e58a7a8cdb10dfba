"""Sampling: what temperature, top-k, top-p and the seed each do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from oracle import dense_model, tiny_config
from ranks import run_ranks

from rosetrainer.commands.generate import main
from rosetrainer.data.tokenizer import BytesTokenizer, CharsTokenizer
from rosetrainer.models.generation import SamplingConfig, choose, first_tokens, generate
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import ParallelContext, init_tensor_parallel
from rosetrainer.parallel.sharding import load_whole
from rosetrainer.validation import ConfigError, check_fields

PROBABILITIES = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])


def draw(sampling: SamplingConfig, count: int = 4000) -> dict[int, float]:
    """The share of each id among `count` draws from PROBABILITIES."""
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(int(choose(PROBABILITIES.log(), sampling, generator)) for _ in range(count))
    return {token: number / count for token, number in drawn.items()}


def test_temperature_one_draws_the_model_s_own_distribution() -> None:
    shares = draw(SamplingConfig(temperature=1.0))
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert shares[token] == pytest.approx(probability, abs=0.03)


def test_temperature_zero_takes_the_likeliest_and_low_ones_lean_to_it() -> None:
    assert draw(SamplingConfig(temperature=0), 20) == {1: 1.0}
    assert draw(SamplingConfig(temperature=0.5))[1] > 0.5


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions() -> None:
    shares = draw(SamplingConfig(temperature=1.0, top_k=2))
    assert set(shares) == {1, 2}
    assert shares[1] == pytest.approx(4 / 7, abs=0.03)
    assert set(draw(SamplingConfig(temperature=1.0, top_p=0.65))) == {1, 2}
    assert set(draw(SamplingConfig(temperature=1.0, top_p=0.75))) == {1, 2, 3}
    assert set(draw(SamplingConfig(temperature=1.0, top_p=0.0), 50)) == {1}
    assert set(draw(SamplingConfig(temperature=1.0, top_k=4, top_p=0.5))) == {1, 2}


def test_what_comes_after_exactly_top_p_is_cut() -> None:
    generator, halves = torch.Generator().manual_seed(1), torch.tensor([0.0, -1e4, 0.0])
    sampling = SamplingConfig(temperature=1.0, top_p=0.5)
    drawn = {int(choose(halves, sampling, generator)) for _ in range(40)}
    assert len(drawn) == 1 and drawn < {0, 2}


def test_unless_told_otherwise_two_hundred_tokens_are_drawn_from_all() -> None:
    assert SamplingConfig() == SamplingConfig(200, temperature=0.8, top_k=0, top_p=1.0, seed=1)


def test_the_seed_decides_and_the_text_may_outgrow_the_context() -> None:
    model = GPTModel(tiny_config())
    load_whole(model, dense_model(tiny_config()).state_dict())
    prompt = torch.tensor([3, 1, 4])

    def write(seed: int) -> list[int]:
        return list(
            generate(model, prompt, SamplingConfig(tokens=30, seed=seed), ParallelContext())
        )

    assert len(write(1)) == 30
    assert write(1) == write(1)
    assert write(1) != write(2)


def test_greedy_takes_the_model_s_own_argmax() -> None:
    model = GPTModel(tiny_config())
    dense = dense_model(tiny_config()).float()
    load_whole(model, dense.state_dict())
    ids = [3, 1, 4]
    greedy = SamplingConfig(tokens=20, temperature=0)
    for token in generate(model, torch.tensor(ids), greedy, ParallelContext()):
        seen = torch.tensor([ids[-model.config.context_length :]])  # the last, once it is full
        assert token == int(dense(seen)[0][0, -1].argmax())
        ids.append(token)
    assert len(ids) == 23


def test_the_text_stops_at_the_end_of_a_document_and_does_not_show_it() -> None:
    model = GPTModel(tiny_config())
    load_whole(model, dense_model(tiny_config()).state_dict())
    sampling, prompt = SamplingConfig(tokens=30), torch.tensor([3, 1, 4])
    whole = list(generate(model, prompt, sampling, ParallelContext()))
    assert len(whole) == 30
    end = whole[12]
    stopped = list(generate(model, prompt, sampling, ParallelContext(), end))
    assert stopped == whole[: whole.index(end)]


def write_with_a_rank_that_disagrees() -> list[int]:
    context = init_tensor_parallel()
    model = GPTModel(tiny_config(), context)
    load_whole(model, dense_model(tiny_config(), seed=0).state_dict())
    # Logits are gathered, so only another draw lets this rank alone choose another token.
    sampling = SamplingConfig(tokens=12, seed=context.tp.rank)
    tokens = list(generate(model, torch.tensor([3, 1, 4]), sampling, context))
    assert {phase for _, phase in context.tp.ledger.entries} == {"forward"}
    return tokens


def test_the_first_rank_s_token_is_every_rank_s() -> None:
    first, second = run_ranks(2, write_with_a_rank_that_disagrees)
    assert first == second


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-50, 1e-45, 1e-40, 1e-38, 1e-30, 1e-9])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature)
    for logits in ([-90.0, 1.0, 5.0], [3e38, -3e38, 3.1e38], [0.0, -1e-30, 1e-6]):
        assert int(choose(torch.tensor(logits), sampling, torch.Generator())) == 2


def test_extreme_settings_draw_what_they_say() -> None:
    assert set(draw(SamplingConfig(temperature=1e9))) == {0, 1, 2, 3, 4}
    assert set(draw(SamplingConfig(temperature=1e9, top_p=1e-50), 50)) < {0, 1, 2, 3, 4}
    assert set(draw(SamplingConfig(temperature=1.0, top_p=5e-324), 50)) == {1}
    assert set(draw(SamplingConfig(temperature=1.0, top_k=2**40))) == {0, 1, 2, 3, 4}
    assert set(draw(SamplingConfig(temperature=1.0, top_k=1), 50)) == {1}
    one_id = choose(torch.zeros(1), SamplingConfig(top_k=9, top_p=0.0), torch.Generator())
    assert int(one_id) == 0
    prompt = torch.tensor([3])
    assert not list(generate(GPTModel(tiny_config()), prompt, SamplingConfig(0), ParallelContext()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_make_no_number_are_told(bad: float) -> None:
    for temperature in (0.0, 0.8):
        with pytest.raises(ConfigError, match="logits hold nan or inf: its weights are damaged"):
            choose(torch.tensor([0.0, bad]), SamplingConfig(0, temperature), torch.Generator())


def test_any_two_seeds_write_different_text() -> None:
    """torch's generator for the CPU takes 32 bits of a seed, so there are no more."""
    model = GPTModel(tiny_config())
    load_whole(model, dense_model(tiny_config()).state_dict())
    texts = set()
    for seed in (0, 1, 2**31, 2**31 + 1, 2**32 - 1):
        check_fields(sampling := SamplingConfig(tokens=30, temperature=2.0, seed=seed))
        texts.add(tuple(generate(model, torch.tensor([3]), sampling, ParallelContext())))
    assert len(texts) == 5


def test_without_a_prompt_any_corpus_can_be_gone_on_from() -> None:
    assert first_tokens(None, BytesTokenizer()) == [10]
    assert first_tokens(None, CharsTokenizer("ab")) == [0]
    assert first_tokens("ba", CharsTokenizer("ab")) == [1, 0]
    assert first_tokens(None, BytesTokenizer(end_of_text=True)) == [256]
    assert first_tokens("\n", BytesTokenizer(end_of_text=True)) == [10]
    with pytest.raises(ConfigError, match="prompt='' has no token to go on from"):
        first_tokens("", BytesTokenizer())
    with pytest.raises(ConfigError, match="'c'"):
        first_tokens("abc", CharsTokenizer("ab"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 must be"),
        (["--seed", "4294967297"], "seed=4294967297 must be from 0 to 4294967295"),
        (["--top-p", "1.5"], "top_p=1.5 must be from 0 to 1"),
        (["--tokens", "-3"], "tokens=-3 must be from 0 to 1099511627776"),
        (
            ["--run", "nowhere"],
            "nowhere/config.json cannot be read: No such file or directory; a run's folder, as out/"
            "run-001, has it: pass one",
        ),
        (["--nonsense"], "unknown argument --nonsense"),
    ],
)
def test_mistakes_are_one_line_each(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        main(flags)
    assert "\n" not in str(caught.value)

"""What GLM and T5 write into blanks: as one process would token by token, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import tiny_config
from ranks import run_ranks

from rosetrainer.config import GPTConfig
from rosetrainer.data.tokenizer import CharsTokenizer, IdsTokenizer
from rosetrainer.models.build import build_model
from rosetrainer.models.filling import check_room, fill_in, pieces_with_blanks, prompt_with_blanks
from rosetrainer.models.generation import SamplingConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import init_tensor_parallel
from rosetrainer.parallel.sharding import draw_whole, gather_whole, load_whole, shard_spec
from rosetrainer.proof.oracles import build_reference
from rosetrainer.validation import ConfigError

CHARS = "abcdefgh"
GLM = {"architecture": "glm", "mask_token": 8, "start_token": 9, "end_token": 10}
T5 = {
    "architecture": "t5",
    "bias": False,
    "tied": False,
    "sentinel_token": 15,
    "start_token": 8,
    "end_token": 9,
}
GREEDY = SamplingConfig(tokens=4, temperature=0)


def config_of(**changes: Any) -> GPTConfig:
    return tiny_config(**{"vocab_size": 16, "context_length": 24, **changes})


def random_model(config: GPTConfig) -> GPTModel:
    model = build_model(config, init_tensor_parallel()).double()
    load_whole(model, {n: draw_whole(shard_spec(p), 5, n) for n, p in model.named_parameters()})
    return model


def filled(prompt: str, **changes: Any) -> tuple[str, list[int]]:
    """The text, and the ids that were written, by the oracle too."""
    config, tokenizer = config_of(**changes), CharsTokenizer(CHARS)
    model, ids = random_model(config), prompt_with_blanks(prompt, tokenizer, config)
    named = pieces_with_blanks(tokenizer, config)
    text = "".join(fill_in(model, ids, named, GREEDY, init_tensor_parallel()))
    return text, ids


def by_the_oracle(prompt: list[int], **changes: Any) -> list[list[int]]:
    """Greedily, each token out of a whole pass over all before it: of a GLM a list for each mask,
    of a T5 one."""
    config = config_of(**changes)
    dense = build_reference(config).double()
    dense.load_state_dict(gather_whole(random_model(config)))
    spans: list[list[int]] = []
    is_glm, none = config.architecture == "glm", torch.tensor([[-100]])
    places = [i for i, token in enumerate(prompt) if token == config.mask_token] if is_glm else [0]
    for place in places:
        spans.append([])
        while len(spans[-1]) < GREEDY.tokens:
            if is_glm:
                ids, first, second = [*prompt], [*range(len(prompt))], [0] * len(prompt)
                for where, span in zip(places, spans, strict=False):
                    ids += [9, *span]
                    first += [where] * (1 + len(span))
                    second += range(1, 2 + len(span))
                inputs = [torch.tensor([one]) for one in (ids, first, second)]
            else:
                source = torch.tensor([prompt])
                inputs = [source, torch.ones_like(source), torch.tensor([[8, *spans[0]]])]
            logits, _ = dense(*inputs, labels=none.expand_as(inputs[-1]))
            token = int(logits[0, -1].argmax())
            if token == config.end_token:
                break
            spans[-1].append(token)
        assert place < len(prompt)
    return spans


def shown(ids: list[int]) -> str:
    return "".join(CHARS[i] if i < 8 else f"<extra_id_{15 - i}>" if i > 9 else "" for i in ids)


def test_a_glm_fills_in_each_blank_after_those_before_it() -> None:
    text, prompt = filled("ab[MASK]cd[MASK]e", **GLM)
    assert prompt == [0, 1, 8, 2, 3, 8, 4]
    first, second = by_the_oracle(prompt, **GLM)
    letters = ["".join(CHARS[i] for i in span if i < 8) for span in (first, second)]
    assert text == f"ab{letters[0]}cd{letters[1]}e" and first != second
    assert [one for one, _ in run_ranks(2, filled_on_ranks)] == [text] * 2
    assert filled("ab", **GLM)[1] == [0, 1, 8]


def filled_on_ranks() -> tuple[str, list[int]]:
    return filled("ab[MASK]cd[MASK]e", **GLM)


def test_a_t5_answers_with_the_names_of_the_blanks() -> None:
    text, prompt = filled("ab<extra_id_0>cd<extra_id_2>", **T5)
    assert prompt == [0, 1, 15, 2, 3, 13, 9]
    (answer,) = by_the_oracle(prompt, **T5)
    assert text == shown(answer) and "<extra_id_" in text


def test_a_span_ends_where_the_context_does() -> None:
    for length in (20, 23):
        prompt = "a" * (length - 1) + "[MASK]"
        text, ids = filled(prompt, **GLM)
        assert len(ids) == length and text.startswith("a" * (length - 1))
        check_room(ids, config_of(**GLM))
    text, ids = filled("a" * 20 + "[MASK]b[MASK]", **GLM)
    assert len(ids) == 23 and text.endswith("b")  # the first blank has taken the last place
    with pytest.raises(ConfigError, match="the prompt has 24 tokens, and context_length=24 has no"):
        check_room([0] * 24, config_of(**GLM))


@pytest.mark.parametrize(
    "prompt, changes, text",
    [
        ("a<extra_id_16>", T5, "<extra_id_16> in the prompt is for a model with a token for it"),
        ("a<extra_id_0>", {**T5, "sentinel_token": None}, "<extra_id_0> in the prompt is for a"),
        ("a", {**T5, "start_token": None}, "the run's config.json says no start_token, without"),
    ],
)
def test_what_a_model_has_no_token_for_is_one_line(
    prompt: str, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        prompt_with_blanks(prompt, CharsTokenizer(CHARS), config_of(**changes))


def test_the_last_blank_is_the_first_id() -> None:
    ids = prompt_with_blanks("a<extra_id_15>", CharsTokenizer(CHARS), config_of(**T5))
    assert ids[-2:] == [0, 9]


def test_ids_behind_a_tokenizer_s_are_blanks() -> None:
    pieces = pieces_with_blanks(IdsTokenizer(14), config_of(**T5))
    assert pieces.vocab_size == 16
    assert pieces.decode([13, 14, 15]) == " 13<extra_id_1><extra_id_0>"
    assert pieces_with_blanks(IdsTokenizer(1), config_of(**T5)).decode([0, 1]) == " 0<extra_id_14>"


def test_ids_that_a_tokenizer_knows_keep_their_pieces() -> None:
    assert pieces_with_blanks(IdsTokenizer(16), config_of(**T5)).decode([15, 14]) == " 15 14"

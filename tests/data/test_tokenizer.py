"""Tokenizers: what is encoded comes back, and a generated text appears character by character."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rosetrainer.checkpoint.huggingface.run_from import tokens_of
from rosetrainer.data.bpe import BPETokenizer, find_tokenizer, parts
from rosetrainer.data.corpus import load_tokenizer
from rosetrainer.data.tokenizer import BytesTokenizer, CharsTokenizer
from rosetrainer.validation import ConfigError

TEXT = "The cat sat on the mat.\n\nThe hat sat on the cat.\nÉté, été; 中文 🙂.\n" * 20
CHARACTERS = "".join(sorted(set(TEXT)))
BPE = BPETokenizer.train(TEXT, 300)

texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    "tokenizer", [BytesTokenizer(), CharsTokenizer(CHARACTERS), BPE], ids=["bytes", "chars", "bpe"]
)
def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16
    assert ids.ndim == 1
    assert int(ids.max()) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert "".join(tokenizer.stream(ids)) == TEXT
    assert tokenizer.encode("").shape == (0,)


@given(texts)
def test_any_text_round_trips_through_bytes_and_bpe(text):
    assert BytesTokenizer().decode(BytesTokenizer().encode(text)) == text
    assert BPE.decode(BPE.encode(text)) == text


@given(st.lists(st.integers(0, 255)))
def test_a_stream_agrees_with_decode_on_any_bytes(ids):
    tokenizer = BytesTokenizer()
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_a_stream_holds_back_a_split_character():
    ids = [*"é中".encode(), 0xFF, 0xE4]
    assert list(BytesTokenizer().stream(ids)) == ["", "é", "", "", "中", "\ufffd", "", "\ufffd"]


def test_chars_names_a_strange_character():
    with pytest.raises(ConfigError) as error:
        CharsTokenizer("abc").encode("cabé")
    assert str(error.value) == (
        "character 'é' (U+00E9) at position 3 is not among the corpus's 3 characters"
    )


def test_text_that_is_not_unicode_is_an_error():
    for tokenizer in (BytesTokenizer(), BPE):
        with pytest.raises(ConfigError, match=r"not Unicode: U\+DC80 at position 2"):
            tokenizer.encode("ab\udc80")
    with pytest.raises(ConfigError, match=r"U\+DC80"):
        CharsTokenizer("abc").encode("ab\udc80")


def test_id_out_of_range_is_an_error():
    for token_id in (-1, 3):
        with pytest.raises(ConfigError, match=f"token id {token_id} is not from 0 to 2"):
            CharsTokenizer("abc").decode([token_id])


@given(st.text(st.sampled_from("ab'.s \n\t\r\x1c\u00a0é1"), max_size=60), st.integers(1, 5))
def test_bpe_of_parts_is_bpe_of_the_whole(text, length):
    assert "".join(parts(text, length)) == text
    ids = [i for part in parts(text, length) for i in BPE.encode(part).tolist()]
    assert ids == BPE.encode(text).tolist()


def test_bpe_decodes_as_its_library_does():
    ids = BPE.encode(TEXT).tolist()
    for end in range(1, 80):
        assert BPE.decode(ids[:end]) == BPE._backend.decode(ids[:end])


def test_bpe_is_saved_and_loaded(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    loaded = load_tokenizer(tmp_path, {"tokenizer": "bpe", "vocab_size": BPE.vocab_size})
    assert loaded.encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    assert loaded.pieces == BPE.pieces


def test_load_tokenizer():
    folder = Path("data/x")
    assert load_tokenizer(folder, {"tokenizer": "bytes", "vocab_size": 256}).vocab_size == 256
    chars = load_tokenizer(folder, {"tokenizer": "chars", "vocab_size": 2, "characters": "ab"})
    assert chars.decode([1, 0]) == "ba"
    markov = load_tokenizer(folder, {"tokenizer": "markov", "vocab_size": 3})
    assert markov.decode([0, 1, 2]) == "abc"


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_the_end_of_text_is_the_last_id_and_no_text(kind, tmp_path):
    tokenizer = {
        "bytes": BytesTokenizer(end_of_text=True),
        "chars": CharsTokenizer(CHARACTERS, end_of_text=True),
        "bpe": BPETokenizer.train([TEXT, TEXT], 300, end_of_text=True),
    }[kind]
    end = tokenizer.end_of_text
    assert end == tokenizer.vocab_size - 1
    ids = [*tokenizer.encode(TEXT), end, *tokenizer.encode(TEXT)]
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == TEXT + TEXT
    assert "".join(tokenizer.stream(ids)) == TEXT + TEXT
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(tmp_path)
    meta = {"tokenizer": kind, "vocab_size": end + 1, "characters": CHARACTERS, "end_of_text": end}
    loaded = load_tokenizer(tmp_path, meta)
    assert loaded.end_of_text == end
    assert loaded.encode(TEXT + "<|endoftext|>" * (kind == "bpe")).tolist().count(end) == 0
    with pytest.raises(ConfigError, match=f"end_of_text={end - 1}, but that of its {kind} tokeniz"):
        load_tokenizer(tmp_path, {**meta, "end_of_text": end - 1})


def test_bpe_knows_the_special_tokens_of_other_tokenizers():
    backend = BPETokenizer.train(TEXT, 300)._backend
    backend.add_special_tokens(["<|endoftext|>", "<| reserved 中 |>"])
    tokenizer = BPETokenizer(backend)
    assert tokenizer.end_of_text == tokenizer.vocab_size - 2
    assert tokenizer.pieces[-2:] == [b"", "<| reserved 中 |>".encode()]


def unigram(byte_fallback: bool) -> Any:
    """As T5's: half of the words of TEXT, and its characters; with byte_fallback the bytes too."""
    pieces = [f"\u2581{word}" for word in sorted(set(TEXT.split()))[::2]]
    pieces += ["\u2581", *sorted(set(TEXT) - set(" \n"))]
    pieces += [f"<0x{byte:02X}>" for byte in range(256 * byte_fallback)]
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(piece, -1.0 - 0.01 * number) for number, piece in enumerate([*special, *pieces])]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(scores, unk_id=2, byte_fallback=byte_fallback)
    )
    splits, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    backend.pre_tokenizer = splits.Sequence([splits.WhitespaceSplit(), splits.Metaspace()])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(special)
    return backend


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_unigram_is_read_as_its_library_reads_it(byte_fallback: bool, tmp_path: Path) -> None:
    """But for the space before the first word; and in parts of a text as in the whole."""
    backend, text = unigram(byte_fallback), TEXT + "\u03a9 cats\n sat" * byte_fallback
    backend.save(str(tmp_path / "tokenizer.json"))
    path = find_tokenizer(str(tmp_path))
    assert path
    tokenizer = BPETokenizer.load(path)
    ids = tokenizer.encode(text).tolist()
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert len(text.split()) < len(ids) < len(text), "some words are one token"
    assert tokenizer.decode(ids) == " " + backend.decode(ids)
    assert tokenizer.decode(ids).split() == text.split()
    assert ids == [i for part in parts(text, 7) for i in tokenizer.encode(part).tolist()]
    assert (2 in tokenizer.encode("\u03a9").tolist()) != byte_fallback  # which is unknown
    size = tokenizer.vocab_size
    own = {"tokenizer": "bpe", "vocab_size": size, "end_of_text": None}
    assert tokens_of(tmp_path, size) == tokens_of(tmp_path, size + 28) == (own, "")
    meta, remark = tokens_of(tmp_path, size - 1)
    assert meta == {"tokenizer": "ids", "vocab_size": size - 1}
    assert f"has {size} tokens and the model {size - 1}: prompts and texts" in remark


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (
            {"tokenizer": "bytes", "vocab_size": 255},
            "vocab_size=255, but its bytes tokenizer has 256",
        ),
        ({"tokenizer": "bytes"}, "vocab_size=None must be an integer"),
        ({"tokenizer": "words", "vocab_size": 9}, "tokenizer='words' can be 'bytes'"),
        ({"tokenizer": "chars", "vocab_size": 2}, "characters must be a sorted string"),
        (
            {"tokenizer": "chars", "vocab_size": 2, "characters": "ba"},
            "characters must be a sorted string",
        ),
        ({"tokenizer": "markov", "vocab_size": 27}, "but its markov tokenizer has 26 tokens"),
    ],
)
def test_wrong_meta_is_one_line(meta, message):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(Path("data/x"), meta)
    assert message in str(error.value)
    assert str(error.value).startswith("data/x/meta.json: ")


@pytest.mark.parametrize("content", [None, "{", "{}", "word-level"])
def test_wrong_tokenizer_json_is_one_line(tmp_path, content):
    if content == "word-level":
        model = {"type": "WordLevel", "vocab": {"中文": 0}, "unk_token": "中文"}
        content = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(tmp_path, {"tokenizer": "bpe", "vocab_size": 300})
    assert str(error.value).startswith(f"cannot use {tmp_path}/tokenizer.json: ")
    assert "\n" not in str(error.value)


def test_importing_it_needs_neither_torch_nor_tokenizers():
    code = "import rosetrainer.data.bpe, sys; print({'torch', 'tokenizers'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr

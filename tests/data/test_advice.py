"""A folder that holds no corpus: each kind has advice of its own, and nothing is given up."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.corpus import read_meta
from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

PREPARE = "prepare"  # stands here for the whole command, which names this Python
TEXT = "The café is open, and the cat sits on the mat.\n" * 40
TOKENIZERS = "(TOKENIZER: the tokenizer.json that they are of, bytes, or ids)"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def advice(folder: str) -> str:
    """What training says, which leaves all as it is and names no loss."""
    before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(ConfigError) as error:
        open_corpus(Path(folder), 4)
    text = str(error.value)
    assert "\n" not in text
    assert not re.search(r"\b(remove|delete|rm|overwrite|--force)\b", text)
    assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before
    return text.replace(prepare_command(), PREPARE)


def follow(text: str, **words: str) -> list[str]:
    """Runs the first command of ours that a text names, with words in the places of its names."""
    (command, *_) = re.findall(f"`{re.escape(PREPARE)} ([^`]*)`", text)
    argv = [words.get(word, word) for word in shlex.split(command)]
    prepare(argv)
    return argv


def bins(folder: str, *names: str, content: bytes = b"\x01\0" * 99) -> None:
    Path(folder).mkdir(parents=True)
    for name in names:
        (Path(folder) / name).write_bytes(content)


@pytest.mark.prints_commands
def test_a_text_file() -> None:
    Path("book.txt").write_text(TEXT)
    text = advice("book.txt")
    assert text == (
        f"book.txt is a file, and a corpus is a folder; `{PREPARE} file book.txt --out data/book` "
        "makes one of it, for --data data/book"
    )
    follow(text)
    open_corpus(Path("data/book"), 4)
    assert "--out data/book-2`" in advice("book.txt")
    assert Path("book.txt").read_text() == TEXT


def test_a_file_of_a_corpus() -> None:
    Path("t").write_text(TEXT)
    prepare(["file", "t", "--out", "data/mine"])
    for name in ("train.bin", "meta.json"):
        assert advice(f"data/mine/{name}").endswith("pass that of this one: --data data/mine")


def test_a_file_of_ids() -> None:
    Path("train.bin").write_bytes(b"\x01\0" * 99)
    text = advice("train.bin")
    assert "if these are token ids, import them, with those for validation: " in text
    follow(text, **{"VAL.bin": "train.bin", "TOKENIZER": "bytes"})
    open_corpus(Path("data/train"), 4)


def test_a_folder_that_is_not_there() -> None:
    assert advice("data/python-docs") == (
        f"data/python-docs is not there; `{PREPARE} python-docs` makes it"
    )
    assert advice("else/markov").endswith(f"`{PREPARE} markov --out else/markov` makes it")
    assert advice("my texts") == (
        f"my texts is not there; `{PREPARE} file PATH... --out 'my texts'` makes one of your own "
        "texts, for --data my texts"
    )
    Path("t").write_text(TEXT)
    prepare(["file", "t", "--out", "data/mine"])
    assert advice("data/mime") == "data/mime is not there; did you mean data/mine?"
    assert advice("data/other").endswith("; corpora there: mine")


def test_an_empty_folder_and_what_is_no_folder() -> None:
    Path("new").mkdir()
    Path("t").write_text(TEXT)
    text = advice("new")
    assert text.startswith(f"new is empty; `{PREPARE} file PATH... --out new` makes one")
    follow(text, **{"PATH...": "t"})
    open_corpus(Path("new"), 4)
    os.mkfifo("pipe")
    assert advice("pipe").startswith("pipe is no folder, and a corpus is one; ")
    Path("gone").symlink_to("nowhere")
    assert advice("gone").startswith("gone is no folder")


def test_nanogpt_s_files() -> None:
    bins("gpt", "train.bin", "val.bin")
    text = advice("gpt")
    assert text == (
        "gpt holds no corpus: it has bare token ids, and what they stand for is not said; "
        f"`{PREPARE} import gpt --tokenizer TOKENIZER --out data/gpt` makes one {TOKENIZERS}"
    )
    follow(text, TOKENIZER="bytes")
    assert read_meta(Path("data/gpt")).train_tokens == 99
    (Path("gpt") / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    assert "not said (meta.pkl, a pickle, which could run code, is not opened); `" in advice("gpt")
    assert not Path("opened").exists()


def test_nanogpt_s_files_with_their_text() -> None:
    """Its ids of characters are ours."""
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(c) for c in TEXT], "<u2")
    bins("gpt", "train.bin", "val.bin", "meta.pkl")
    cut = int(len(ids) * 0.9)
    (Path("gpt") / "train.bin").write_bytes(ids[:cut].tobytes())
    (Path("gpt") / "val.bin").write_bytes(ids[cut:].tobytes())
    (Path("gpt") / "input.txt").write_text(TEXT)
    text = advice("gpt")
    assert text.endswith("--tokenizer chars --out data/gpt` makes the same ids of its text")
    follow(text)
    for name in ("train.bin", "val.bin"):
        assert (Path("gpt") / name).read_bytes() == (Path("data/gpt") / name).read_bytes()


@pytest.mark.parametrize(("there", "other"), [("train", "val"), ("val", "train")])
def test_one_of_the_two_files(there: str, other: str) -> None:
    bins("gpt", f"{there}.bin")
    text = advice("gpt")
    assert f"gpt holds no corpus: it has {there}.bin and nothing for {other}; with both, `" in text
    file = f"gpt/{there}.bin"
    follow(text, **{"TRAIN.bin": file, "VAL.bin": file, "TOKENIZER": "bytes"})


def test_llm_c_s_files() -> None:
    header = struct.pack("<256i", 20240520, 1, 99, *[0] * 253)
    bins("c", "tiny_train.bin", "tiny_val.bin", content=header + b"\x01\0" * 99)
    text = advice("c")
    assert "c holds no corpus: it has llm.c's token ids" in text
    follow(text, TOKENIZER="bytes")
    assert read_meta(Path("data/c")).train_tokens == 99


def test_a_data_set_of_hugging_face() -> None:
    bins("set", "data-00000-of-00001.arrow", "dataset_info.json", "state.json")
    assert "`datasets.load_from_disk('set').to_json('texts.jsonl')`, then `" in advice("set")
    bins("sets", "dataset_dict.json")
    assert "`datasets.load_from_disk('sets')['train'].to_json(" in advice("sets")


def test_a_folder_of_texts() -> None:
    Path("texts").mkdir()
    for i in range(3):
        (Path("texts") / f"{i}.txt").write_text(f"{i} {TEXT}")
    text = advice("texts")
    assert (
        f"it holds texts; `{PREPARE} file texts/*.txt --out data/texts` makes one of them" in text
    )
    bins("lines", "a.jsonl")
    assert "file lines/*.jsonl" in advice("lines")


def test_other_folders() -> None:
    Path("t").write_text(TEXT)
    prepare(["file", "t", "--out", "data/mine"])
    assert advice("data") == "data holds no corpus: those in it are data/mine"
    bins("run", "config.json", "log.jsonl")
    assert advice("run").endswith("it is a run's folder, which goes on with --resume run")
    bins("photos", *(f"{letter}.jpg" for letter in "abcdef"))
    assert "photos holds no corpus: a.jpg, b.jpg, c.jpg, d.jpg, e.jpg and 1 more; `" in (
        advice("photos")
    )


def test_a_folder_with_hidden_files_is_not_empty() -> None:
    bins("hidden", ".git")
    Path("book.txt").write_text(TEXT)
    follow(advice("hidden"), **{"PATH...": "book.txt"})


def test_of_many_corpora_some_are_named() -> None:
    for i in range(9):
        (Path("data") / f"corpus{i}").mkdir(parents=True)
        (Path("data") / f"corpus{i}" / "meta.json").touch()
    names = ", ".join(f"corpus{i}" for i in range(5))
    assert advice("data/x").endswith(f"corpora there: {names} and 4 more")


def broken(content: str | dict[str, Any], *names: str) -> str:
    bins("own", *names)
    text = content if isinstance(content, str) else json.dumps(content)
    (Path("own") / "meta.json").write_text(text)
    return advice("own")


OURS = {
    "source": "markov",
    "options": {},
    "tokenizer": "bytes",
    "vocab_size": 256,
    "dtype": "uint16",
}
COUNTS = {"train_tokens": 99, "val_tokens": 99, "sha256": {"train.bin": "", "val.bin": ""}}


def test_meta_json_that_was_cut_off() -> None:
    text = broken(json.dumps(OURS | COUNTS)[:-9], "train.bin", "val.bin")
    assert text.startswith("own/meta.json: it is not JSON, or was cut off (")
    assert f"; `{PREPARE} file PATH... --out data/own` makes a corpus in another" in text


def test_meta_json_of_another_program() -> None:
    text = broken({"vocab_size": 65, "itos": {}}, "train.bin", "val.bin")
    assert text.startswith("own/meta.json: it lacks the keys source, options, ")
    assert (
        "; another program wrote it; it has bare token ids, and what they stand for is not" in text
    )
    follow(text, TOKENIZER="bytes")
    open_corpus(Path("data/own"), 4)


def test_meta_json_of_a_newer_version() -> None:
    text = broken(OURS | COUNTS | {"shards": 9}, "train.bin", "val.bin")
    assert "it has unknown keys shards, which a newer rosetrainer may have written; `" in text
    assert f"`{PREPARE} markov --out data/own` makes a corpus in another folder" in text


@pytest.mark.parametrize("more", [{"vocab_size": 100_277}, {"dtype": "uint32"}])
def test_ids_of_a_width_that_is_not_the_vocabulary_s(more: dict[str, Any]) -> None:
    text = broken(OURS | COUNTS | more, "train.bin", "val.bin")
    assert "' must be uint" in text and f"for vocab_size={more.get('vocab_size', '')}" in text


def test_ids_that_meta_json_does_not_describe() -> None:
    text = broken(OURS | COUNTS | {"train_tokens": 5}, "train.bin", "val.bin")
    own = f"ids of your own go into another folder: `{PREPARE} import --help`"
    assert text == (
        f"own/train.bin has 99 tokens, but meta.json says 5; `{PREPARE} markov --out own` makes it "
        f"anew; {own}"
    )


def test_the_command_that_makes_it_anew_says_how_it_was_made(capsys: Any) -> None:
    Path("t").write_text(TEXT)
    prepare(["file", "t", "--out", "c", "--tokenizer", "bpe", "--vocab-size", "270"])
    os.truncate("c/val.bin", 6)
    follow(advice("c"), **{"PATH...": "t"})
    assert "c/val.bin is damaged; making it again" in capsys.readouterr().out
    open_corpus(Path("c"), 4)
    prepare(["markov", "--alphabet", "3", "--train-tokens", "99", "--val-tokens", "99"])
    os.truncate("data/markov/val.bin", 6)
    follow(advice("data/markov"))
    open_corpus(Path("data/markov"), 4)


def test_what_meta_json_says_is_quoted_for_the_shell() -> None:
    """A corpus may come from somebody else."""
    options = {"tokenizer": "x; touch opened", "vocab_size": "$(touch opened)"}
    text = broken(OURS | COUNTS | {"source": "file", "options": options}, "train.bin")
    assert "--tokenizer 'x; touch opened' --vocab-size '$(touch opened)' --out own`" in text

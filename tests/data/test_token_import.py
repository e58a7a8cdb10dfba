"""Ids of nanoGPT or llm.c, imported: the same ids, checked, and the sources as they were."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.bpe import BPETokenizer
from rosetrainer.data.tokenizer import IdsTokenizer
from rosetrainer.models.generation import first_tokens
from rosetrainer.validation import ConfigError

TEXT = "The café is open, and the cat sits on the mat.\n" * 40
MADE = BPETokenizer.train(TEXT, 300, end_of_text=True)
END = MADE.end_of_text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    MADE.save(tmp_path)
    return tmp_path / "tokenizer.json"


def imported(out: Path, *words: object) -> dict[str, Any]:
    prepare(["import", *map(str, words), "--out", str(out)])
    open_corpus(out, 4)
    meta: dict[str, Any] = json.loads((out / "meta.json").read_text())
    return meta


def refused(tmp_path: Path, *words: object) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(["import", *map(str, words), "--out", str(tmp_path / "refused")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()
    return str(error.value)


def nanogpt(folder: Path, train: Any, val: Any, dtype: str = "<u2") -> Path:
    folder.mkdir(exist_ok=True)
    np.asarray(train, dtype).tofile(folder / "train.bin")
    np.asarray(val, dtype).tofile(folder / "val.bin")
    return folder


def llm_c(path: Path, ids: Any, **header: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    wide = header.get("magic") == 20240801
    numbers = [header.get("magic", 20240520), header.get("version", 7 if wide else 1)]
    numbers.append(header.get("count", len(ids)))
    content = np.asarray(ids, "<u4" if wide else "<u2").tobytes()
    path.write_bytes(struct.pack("<256i", *numbers, *[0] * 253) + content)
    return path


def test_nanogpt_s_pair_with_its_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    document = [*MADE.encode(TEXT).tolist(), END]
    source = nanogpt(tmp_path / "gpt", document * 5, document * 2)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    meta = imported(tmp_path / "c", source, "--tokenizer", tokenizer)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for name, content in before.items():
        assert (tmp_path / "c" / name).read_bytes() == content
    assert (meta["source"], meta["tokenizer"], meta["vocab_size"]) == (
        "import",
        "bpe",
        MADE.vocab_size,
    )
    assert (meta["train_tokens"], meta["val_tokens"]) == (5 * len(document), 2 * len(document))
    assert meta["documents"] == {"train": 5, "val": 2}
    assert meta["end_of_text"] == END
    assert meta["bytes_per_token"] == pytest.approx(len(TEXT.encode()) / len(document))
    corpus = open_corpus(tmp_path / "c", 4)
    assert corpus.tokenizer().decode(np.fromfile(tmp_path / "c" / "val.bin", "<u2")) == TEXT * 2


def test_llm_c_s_files_and_shards(tmp_path: Path, tokenizer: Path) -> None:
    ids = [END, *MADE.encode(TEXT).tolist()]
    folder = tmp_path / "fineweb"
    llm_c(folder / "f_train_000001.bin", ids)
    llm_c(folder / "f_train_000002.bin", ids[::-1])
    llm_c(folder / "f_val_000000.bin", ids, magic=20240801)
    meta = imported(tmp_path / "c", folder, "--tokenizer", tokenizer)
    assert np.fromfile(tmp_path / "c" / "train.bin", "<u2").tolist() == ids + ids[::-1]
    assert np.fromfile(tmp_path / "c" / "val.bin", "<u2").tolist() == ids
    assert meta["documents"] == {"train": 2, "val": 1}
    pair = (folder / "f_train_000001.bin", folder / "f_val_000000.bin")
    assert imported(tmp_path / "d", *pair, "--tokenizer", tokenizer)["train_tokens"] == len(ids)


def test_bytes_and_ids_alone(tmp_path: Path) -> None:
    source = nanogpt(tmp_path / "gpt", list(TEXT.encode()), list(TEXT.encode()))
    meta = imported(tmp_path / "b", source, "--tokenizer", "bytes")
    assert (meta["vocab_size"], meta["bytes_per_token"]) == (256, 1)
    assert "documents" not in meta
    meta = imported(tmp_path / "i", source, "--tokenizer", "ids", "--vocab-size", 50304)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("ids", 50304)
    assert "bytes_per_token" not in meta
    assert open_corpus(tmp_path / "i", 4).tokenizer().decode([12, 7]) == " 12 7"


def test_where_only_ids_are_known_a_text_is_numbers() -> None:
    tokenizer = IdsTokenizer(50)
    assert first_tokens("12 7  49", tokenizer) == [12, 7, 49]
    assert first_tokens(None, tokenizer) == [0]
    for prompt, word in (("12 50", "50"), ("-1", "-1"), ("a b", "a"), ("1.5", "1.5"), ("²", "²")):
        with pytest.raises(ConfigError, match=f"'{word}' is no id from 0 to 49; the corpus was"):
            first_tokens(prompt, tokenizer)


def test_ids_of_another_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    source = nanogpt(tmp_path / "gpt", range(300), [1, 2, 3, 50256])
    assert refused(tmp_path, source, "--tokenizer", tokenizer).startswith(
        f"{source}/train.bin: id {MADE.vocab_size} is {MADE.vocab_size}, not below vocab_size="
    )
    assert f"{source}/val.bin: id 3 is 50256, not below vocab_size=50256" in refused(
        tmp_path, source, "--tokenizer", "ids", "--vocab-size", 50256
    )
    wide = llm_c(tmp_path / "w" / "x_train.bin", [1, 2, 128_000], magic=20240801)
    message = refused(tmp_path, wide, wide, "--tokenizer", "ids", "--vocab-size", 65536)
    assert "id 2 is 128000, not below vocab_size=65536 of the tokenizer" in message
    assert message.endswith("name the tokenizer that these ids are of")


def test_files_that_are_not_ids(tmp_path: Path) -> None:
    ids = ("--tokenizer", "ids", "--vocab-size", 65536)
    good = llm_c(tmp_path / "good.bin", range(9))
    for name, content, expected in (
        ("odd", b"abc", "has 3 bytes, an odd number: it cannot be uint16 ids"),
        ("empty", b"", "holds 0 ids; train.bin needs 2"),
        (
            "wide",
            np.arange(99, dtype="<u4").tobytes(),
            "holds uint32, not uint16, ids up to 98; write them as uint16, in Python `numpy.fro",
        ),
        (
            "wider",
            np.arange(0, 99_000, 1000, dtype="<u4").tobytes(),
            "holds uint32, not uint16, ids up to 98000; name the tokenizer that these ids are of",
        ),
        ("gz", b"\x1f\x8b\x08\0abcd", "is gzip; unpack it, and pass what comes out"),
        ("npy", b"\x93NUMPY\1\0", "is a numpy array; write its ids alone"),
        ("cut", good.read_bytes()[:-2], "says that it has 9 ids, and has 8; was it copied whole?"),
        ("head", good.read_bytes()[:400], "ends inside llm.c's header; was it copied whole?"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert f"{path}" in refused(tmp_path, path, good, *ids)
        assert expected in refused(tmp_path, path, good, *ids)
    new = llm_c(tmp_path / "new.bin", range(9), version=2)
    assert "magic 20240520, but of version 2; 1 is known here" in refused(tmp_path, new, good, *ids)
    assert f"{tmp_path}/none is not a file" in refused(tmp_path, tmp_path / "none", good, *ids)


def test_which_files_are_for_which_side(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    assert "e has neither train.bin nor another *train*.bin" in refused(tmp_path, tmp_path / "e")
    nanogpt(tmp_path / "e", range(9), range(9))
    (tmp_path / "e" / "val.bin").unlink()
    assert "e has neither val.bin nor another *val*.bin" in refused(tmp_path, tmp_path / "e")
    for words in ((), ("a", "b", "c"), ("a",)):
        assert "import needs a folder with train.bin and val.bin, or two files" in refused(
            tmp_path, *words
        )


def test_the_tokenizer_has_to_be_named(tmp_path: Path, tokenizer: Path) -> None:
    source = nanogpt(tmp_path / "gpt", range(9), range(9))
    for flags in ((), ("--tokenizer", "gpt2"), ("--tokenizer", tmp_path / "none.json")):
        assert "must be the tokenizer.json that they are of, bytes, or ids" in refused(
            tmp_path, source, *flags
        )
    assert "--tokenizer ids needs --vocab-size" in refused(tmp_path, source, "--tokenizer", "ids")
    assert "vocab_size=9 is for --tokenizer ids; leave it out" in refused(
        tmp_path, source, "--tokenizer", tokenizer, "--vocab-size", 9
    )
    assert "vocab_size=99000000 must be from 1 to 16777216" in refused(
        tmp_path, source, "--tokenizer", "ids", "--vocab-size", 99_000_000
    )
    assert imported(tmp_path / "c", source, "--tokenizer", tmp_path)["tokenizer"] == "bpe"


def test_ids_of_a_large_vocabulary_are_uint32(tmp_path: Path) -> None:
    """Bare ones and llm.c's; and damage is found as in others."""
    flags = ("--tokenizer", "ids", "--vocab-size", 150_000)
    ids = [3, 149_999, 65_536, 7, 9, 1] * 3
    wide = llm_c(tmp_path / "w" / "x_train.bin", ids, magic=20240801)
    bare = nanogpt(tmp_path / "bare", ids, ids[::-1], "<u4")
    for out, paths in (("a", (wide, wide)), ("b", (bare,))):
        meta = imported(tmp_path / out, *paths, *flags)
        assert (meta["dtype"], meta["vocab_size"]) == ("uint32", 150_000)
        assert np.fromfile(tmp_path / out / "train.bin", "<u4").tolist() == ids
        inputs, labels = open_corpus(tmp_path / out, 17).train_batch(1, 0, 1, range(1))
        assert sorted(inputs[0].tolist()) == sorted(ids[:-1])
        assert sorted(labels[0].tolist()) == sorted(ids[1:])
    path = tmp_path / "b" / "val.bin"
    content = bytearray(path.read_bytes())
    content[4 * 5 + 3] = 9
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"val.bin: token 5 \(byte 20\) is 150\d+, not below"):
        open_corpus(tmp_path / "b", 17)
    path.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="71 bytes, not a multiple of 4: it cannot be uint32 tok"):
        open_corpus(tmp_path / "b", 17)


def test_what_is_there_is_not_replaced(tmp_path: Path, capsys: Any) -> None:
    source = nanogpt(tmp_path / "gpt", range(9), range(9))
    ids = ("--tokenizer", "ids", "--vocab-size", 9)
    with pytest.raises(ConfigError, match="gpt holds files but no meta.json of ours, which this"):
        prepare(["import", str(source), *map(str, ids), "--out", str(source), "--force"])
    imported(tmp_path / "c", source, *ids)
    imported(tmp_path / "c", source, *ids)
    assert "whole already" in capsys.readouterr().out
    nanogpt(source, range(8), range(9))
    with pytest.raises(ConfigError, match="holds a corpus with train_sha256="):
        imported(tmp_path / "c", source, *ids)
    assert imported(tmp_path / "c", source, *ids, "--force")["train_tokens"] == 8

"""Documents: what ends each, which are for validation, and what a file of them may hold."""

from __future__ import annotations

import gzip
import json
import random
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.bpe import BPETokenizer
from rosetrainer.data.documents import choose_validation
from rosetrainer.validation import ConfigError

TEXTS = [f"Document {i}: " + "the cat sat on the mat, été. " * (i % 7 + 1) for i in range(40)]
ENDS = {"bytes": 256, "chars": len(set("".join(TEXTS))), "bpe": 299}


def lines(path: Path, texts: Iterable[object], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts))
    return path


def make(out: Path, *words: object) -> dict[str, Any]:
    prepare(["file", *map(str, words), "--out", str(out)])
    meta: dict[str, Any] = json.loads((out / "meta.json").read_text())
    return meta


def refused(tmp_path: Path, *words: object) -> str:
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "refused", *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()
    return str(error.value)


def ids(out: Path, side: str) -> list[int]:
    found: list[int] = np.fromfile(out / f"{side}.bin", "<u2").tolist()
    return found


def documents(out: Path, side: str) -> list[str]:
    """What stands between the ends."""
    corpus, found = open_corpus(out, 4), ids(out, side)
    end = corpus.meta.end_of_text
    assert end is not None
    assert found[-1] == end
    parts: list[list[int]] = [[]]
    for token in found:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return [corpus.tokenizer().decode(part) for part in parts[:-1]]


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_an_id_of_its_own_ends_each_document(tmp_path: Path, tokenizer: str) -> None:
    flags = ["--vocab-size", "300"] if tokenizer == "bpe" else []
    path = lines(tmp_path / "x", TEXTS)
    meta = make(tmp_path / "c", path, "--tokenizer", tokenizer, *flags)
    train, val = documents(tmp_path / "c", "train"), documents(tmp_path / "c", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert [text for text in TEXTS if text in train] == train  # in the order of the file
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert meta["end_of_text"] == ENDS[tokenizer] == meta["vocab_size"] - 1
    val_bytes = sum(len(text.encode()) for text in val)
    assert meta["bytes_per_token"] == pytest.approx(val_bytes / meta["val_tokens"])


def test_a_text_that_holds_the_end_s_name_does_not_end_there(tmp_path: Path) -> None:
    texts = [f"{i} a<|endoftext|>b " * 9 for i in range(9)]
    meta = make(tmp_path / "c", lines(tmp_path / "x", texts), "--tokenizer", "bpe")
    corpus = open_corpus(tmp_path / "c", 4)
    tokenizer = corpus.tokenizer()
    assert ids(tmp_path / "c", "train").count(meta["end_of_text"]) == meta["documents"]["train"]
    assert sorted(documents(tmp_path / "c", "train") + documents(tmp_path / "c", "val")) == texts
    assert meta["end_of_text"] not in tokenizer.encode("<|endoftext|>").tolist()
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    assert isinstance(tokenizer, BPETokenizer)
    special = json.loads((tmp_path / "c" / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["content"], token["special"]) for token in special] == [("<|endoftext|>", True)]


def test_every_form_of_the_same_documents_gives_the_same_corpus(tmp_path: Path) -> None:
    forms: dict[str, list[Path]] = {"lines": [lines(tmp_path / "x.jsonl", TEXTS)]}
    plain = forms["lines"][0].read_text()
    for name, content in {
        "windows": b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(),
        "no last line feed": plain.rstrip("\n").encode(),
        "blank lines": ("\n" + plain.replace("\n", "\n \n\n")).encode(),
        "utf-16": plain.encode("utf-16"),
        "packed": gzip.compress(plain.encode()),
    }.items():
        (tmp_path / name).write_bytes(content)
        forms[name] = [tmp_path / name]
    forms["files"] = []
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
        forms["files"].append(tmp_path / f"{i}.txt")
    forms["mixed"] = [*forms["files"][:20], lines(tmp_path / "rest", TEXTS[20:])]
    forms["parquet"] = [parquet(tmp_path / "p", {"text": TEXTS})]
    made = []
    for name, paths in forms.items():
        make(tmp_path / f"{name}-corpus", *paths)
        made.append({p.name: p.read_bytes() for p in (tmp_path / f"{name}-corpus").iterdir()})
    assert all(files == made[0] for files in made)


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_the_order_of_the_files_does_not_choose_what_is_for_validation(tmp_path: Path) -> None:
    chosen = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        make(tmp_path / f"c{seed}", lines(tmp_path / "x", shuffled), "--val-fraction", 0.3)
        chosen.append(sorted(documents(tmp_path / f"c{seed}", "val")))
    assert chosen[0] == chosen[1] == chosen[2]
    texts = [text for text in TEXTS if text in chosen[0]]
    assert texts not in (TEXTS[-len(texts) :], TEXTS[: len(texts)])
    share = sum(map(len, texts)) / sum(map(len, TEXTS))
    assert share == pytest.approx(0.3, abs=0.02)


def test_equal_documents_are_on_one_side(tmp_path: Path) -> None:
    texts = [text for text in TEXTS for _ in range(3)]
    random.Random(1).shuffle(texts)
    windows = [text.replace(". ", ".\r\n") for text in texts] + [
        text.replace(". ", ".\n") for text in texts
    ]
    meta = make(tmp_path / "c", lines(tmp_path / "x", windows), "--val-fraction", 0.4)
    train, val = documents(tmp_path / "c", "train"), documents(tmp_path / "c", "val")
    assert len(train) + len(val) == 240 == sum(meta["documents"].values())
    assert not set(train) & set(val)
    assert len(set(train)) + len(set(val)) == 40


sizes = st.dictionaries(st.binary(min_size=4, max_size=4), st.integers(1, 1000), min_size=2)


@settings(deadline=None)
@given(sizes=sizes, fraction=st.floats(0.001, 0.999))
def test_both_sides_have_a_document_and_the_share_is_near(
    sizes: dict[bytes, int], fraction: float
) -> None:
    chosen = choose_validation(sizes, fraction)
    assert chosen
    assert chosen < set(sizes)
    assert choose_validation(dict(reversed(sizes.items())), fraction) == chosen
    wanted = fraction * sum(sizes.values())
    missed = abs(sum(sizes[name] for name in chosen) - wanted)
    assert missed <= max(sizes.values())
    if len(sizes) > 1 and 0.1 < fraction < 0.9 and len(set(sizes.values())) == 1:
        assert missed <= next(iter(sizes.values()))


def test_a_large_document_does_not_take_all_for_validation(tmp_path: Path) -> None:
    for first in range(8):  # whichever hash comes first
        make(
            tmp_path / f"c{first}",
            lines(
                tmp_path / "x",
                [f"{first} " + "long " * 900, *(f"{first} {i}" * 9 for i in range(9))],
            ),
        )
        assert len(ids(tmp_path / f"c{first}", "val")) < 600


def test_one_document_is_cut_as_a_text_is(tmp_path: Path, capsys: Any) -> None:
    text = "One document, and no other one.\n" * 9
    (tmp_path / "text").write_text(text)
    plain = make(tmp_path / "a", tmp_path / "text")
    meta = make(tmp_path / "b", lines(tmp_path / "x.jsonl", [text, "", " \n"]))
    assert meta == plain
    assert "documents" not in meta
    printed = capsys.readouterr().out
    assert "x.jsonl: one document, so it is cut at its end as a single text is\n" in printed
    assert "left out, as they have no text: 2 of the documents\n" in printed


def test_an_empty_file_among_others_is_left_out(tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / name for name in ("a", "empty", "white", "b")]
    for path, text in zip(paths, ("text a\n", "", " \n", "text b\n"), strict=True):
        path.write_text(text)
    assert make(tmp_path / "c", *paths)["documents"] == {"train": 1, "val": 1}
    assert "left out, as they have no text: 2 of the documents\n" in capsys.readouterr().out


def test_too_few_documents_for_two_sides(tmp_path: Path) -> None:
    same = refused(tmp_path, lines(tmp_path / "x", ["same"] * 3))
    assert same.startswith("all documents are the same, so none is left for validation")
    two = lines(tmp_path / "x", ["one", "another"])
    assert "val_fraction=0.0 leaves no document for validation" in refused(
        tmp_path, two, "--val-fraction", 0
    )
    assert "val_fraction=1.0 leaves no document for training" in refused(
        tmp_path, two, "--val-fraction", 1
    )
    assert make(tmp_path / "c", two)["documents"] == {"train": 1, "val": 1}
    assert "no document has a text" in refused(tmp_path, lines(tmp_path / "x", ["", " "]))
    (tmp_path / "x.jsonl").write_text("\n \n")
    assert "no document has a text" in refused(tmp_path, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"body": "b", "n": 1}', "line 2 has no key 'text'; it has 'body', 'n'; --text-key names"),
        ("{}", "line 2 has no key 'text'; it has none; --text-key names the one"),
        ('{"text": null}', "line 2: 'text' holds null, not a text"),
        ('{"text": 7}', "line 2: 'text' holds a number, not a text"),
        ('{"text": true}', "line 2: 'text' holds true or false, not a text"),
        ('{"text": ["a"]}', "line 2: 'text' holds a list, not a text"),
        ('{"text": {"a": 1}}', "line 2: 'text' holds an object, not a text"),
        ('{"text": "a', "line 2 is not JSON: Unterminated string"),
        ("plain words", "line 2 is not JSON: "),
        ('["text"]', "line 2 is JSON, but no object: '[\"text\"]'; each line must be one"),
        ('"text"', "line 2 is JSON, but no object"),
        ('{"text": "a\\ud800b"}', "line 2: 'text' is not Unicode: U+D800 at character 1 is half"),
        ("[" * 100_000, "line 2 is JSON too deeply nested"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 is not JSON: Exceeds the limit"),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(
    tmp_path: Path, line: str, expected: str
) -> None:
    path = tmp_path / "x"
    path.write_text('{"text": "first"}\n' + line + '\n\n{"text": "last"}\n')
    assert expected in refused(tmp_path, path)
    assert f"{path}, line 2" in refused(tmp_path, path)


def test_a_line_in_another_encoding_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'{"text": "first"}\n{"text": "caf\xe9 noir"}\n')
    assert f"{path} is not UTF-8: byte 0xe9 at offset 31; it may be WINDOWS" in refused(
        tmp_path, path
    )


def test_lines_are_told_by_what_they_are_or_by_their_name(tmp_path: Path) -> None:
    renamed = lines(tmp_path / "notes.txt", TEXTS)
    assert make(tmp_path / "c", renamed)["documents"]
    (tmp_path / "x.jsonl").write_text("no JSON at all\n")
    assert "line 1 is not JSON" in refused(tmp_path, tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"no JSON at all\n"))
    assert "line 1 is not JSON" in refused(tmp_path, tmp_path / "y.jsonl.gz")
    as_text = make(tmp_path / "d", renamed, "--as-text")
    assert "documents" not in as_text


def test_another_key_holds_the_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "x", TEXTS, "content")
    assert "it has 'id', 'content'" in refused(tmp_path, path)
    assert make(tmp_path / "c", path, "--text-key", "content")["documents"]
    rows = parquet(tmp_path / "p", {"content": TEXTS})
    assert "has no column 'text'; it has 'content'; --text-key names" in refused(tmp_path, rows)
    assert make(tmp_path / "d", rows, "--text-key", "content")["documents"]


def test_parquet_that_is_not_as_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [*TEXTS[:9], None]
    assert "row 10: 'text' holds null" in refused(tmp_path, parquet(tmp_path / "p", {"text": rows}))
    numbers = parquet(tmp_path / "p", {"text": [1, 2]})
    assert "row 1: 'text' holds a number" in refused(tmp_path, numbers)
    whole = parquet(tmp_path / "p", {"text": TEXTS}).read_bytes()
    (tmp_path / "p").write_bytes(whole[: len(whole) // 2])
    assert f"cannot read {tmp_path}/p as parquet: " in refused(tmp_path, tmp_path / "p")
    (tmp_path / "p").write_bytes(gzip.compress(whole))
    assert "is parquet inside gzip" in refused(tmp_path, tmp_path / "p")
    (tmp_path / "p").write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(tmp_path, tmp_path / "p")
    assert message.endswith("is parquet, which takes a library to read: " + message.split(": ")[1])
    assert message.endswith("-m pip install pyarrow")


def test_a_file_that_changes_between_the_readings_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rosetrainer.data import corpus_writer

    path = lines(tmp_path / "x", TEXTS)

    def tokenizer(*_: object) -> object:
        lines(path, TEXTS[1:])
        return corpus_writer.BytesTokenizer(end_of_text=True)

    monkeypatch.setattr(corpus_writer, "make_tokenizer", tokenizer)
    assert "the files were changed while they were read" in refused(tmp_path, path)


def test_a_made_corpus_is_whole_already_and_another_text_is_another(
    tmp_path: Path, capsys: Any
) -> None:
    path = lines(tmp_path / "x", TEXTS)
    meta = make(tmp_path / "c", path)
    counts = meta["documents"]
    assert f" tokens of {counts['train']} + {counts['val']} documents (" in capsys.readouterr().out
    make(tmp_path / "c", path)
    assert "whole already" in capsys.readouterr().out
    lines(path, TEXTS[:-1])
    with pytest.raises(ConfigError, match="holds a corpus with text_sha256="):
        make(tmp_path / "c", path)


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "x"
    with path.open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"text": f"{i} " + "eight thousand bytes " * 400}) + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        make(tmp_path / "c", path, "--tokenizer", tokenizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 16_000_000
    assert peak < size / 4
    open_corpus(tmp_path / "c", 4)

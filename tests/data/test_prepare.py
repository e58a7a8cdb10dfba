"""`prepare`: what it makes, that it makes it once and whole, and each mistake as one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from rosetrainer.commands import prepare
from rosetrainer.data import corpus_folder, python_docs, shakespeare
from rosetrainer.data.batches import open_corpus, read_meta
from rosetrainer.data.bpe import BPETokenizer
from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
TEXT = "The café is open.\n" * 50


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def make(*argv: object) -> None:
    prepare.main([str(word) for word in argv])


def message(*argv: object) -> str:
    with pytest.raises(ConfigError) as error:
        make(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def script(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def docs():
    return python_docs.python_docs()


def test_python_docs_is_english_prose(docs):
    assert 200_000 < len(docs) < 10_000_000
    assert docs.count('The "yield" statement') == 1
    assert sum(c.isascii() for c in docs) > 0.999 * len(docs)
    assert all(c.isprintable() or c == "\n" for c in docs)
    words = docs.lower().split()
    assert words.count("the") / len(words) > 0.03


def test_python_docs_is_deterministic(docs):
    same = python_docs.python_docs() == docs  # apart: pytest would spend minutes on the difference
    assert same


def test_python_docs_imports_no_module_of_the_library(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text('"""This is a test, not prose at all."""')
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "a.py").write_text(
        '"""This raises an error on import."""\nraise SystemError\n'
        'class A:\n    """Too short."""\n'
        '    def f(self):\n        """This raises an error on import."""\n'
    )
    (tmp_path / "b.py").write_text('"""This raises an error on import."""')
    assert python_docs._module_docs(tmp_path) == {"a.py": "This raises an error on import."}


def test_a_python_without_its_sources_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(python_docs, "_topics", dict)
    with pytest.raises(ConfigError, match="carries 1 bytes of documentation, fewer than 200000"):
        python_docs.python_docs()


def test_python_docs_first_and_cached(tmp_path):
    out = tmp_path / "docs"
    started = time.perf_counter()
    made = script("--out", out)
    making = time.perf_counter() - started
    assert made.returncode == 0, made.stderr
    corpus = open_corpus(out, 256)
    assert corpus.meta.python == f"{sys.implementation.name} {sys.version.split()[0]}"
    assert f"{corpus.meta.train_tokens} + {corpus.meta.val_tokens} tokens" in made.stdout
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    started = time.perf_counter()
    cached = script("python-docs", "--out", out)
    seconds = time.perf_counter() - started
    assert cached.returncode == 0, cached.stderr
    assert "whole already" in cached.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files
    assert seconds < making / 2  # 0.3 s of 4 on two idle cores


def test_a_checkout_is_not_needed(tmp_path):
    command = [sys.executable, "-m", "rosetrainer", "prepare", "markov"]
    package = {**os.environ, "PYTHONPATH": str(ROOT)}  # as after `pip install .`
    small = ["--train-tokens", "99", "--val-tokens", "99"]
    done = subprocess.run([*command, *small], cwd=tmp_path, env=package, check=False)
    assert done.returncode == 0
    assert read_meta(tmp_path / "data" / "markov").train_tokens == 99


def test_a_cached_call_imports_nothing_heavy(tmp_path):
    make("markov", "--out", tmp_path / "m", "--train-tokens", 99, "--val-tokens", 99)
    code = (
        "import sys; from rosetrainer.commands import prepare; "
        f"prepare.main(['markov', '--out', {str(tmp_path / 'm')!r}, '--train-tokens', '99', "
        "'--val-tokens', '99']); print(sorted({'numpy', 'torch', 'tokenizers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_a_text_comes_back(tmp_path, text, tokenizer):
    out = tmp_path / "corpus"
    make("file", text, "--out", out, "--tokenizer", tokenizer)
    corpus = open_corpus(out, 8)
    parts = [
        corpus.tokenizer().decode(np.fromfile(out / name, "<u2"))
        for name in ("train.bin", "val.bin")
    ]
    assert parts == [TEXT[: int(0.9 * len(TEXT))], TEXT[int(0.9 * len(TEXT)) :]]
    assert corpus.meta.documents is None
    assert corpus.meta.end_of_text is None
    val_bytes = len(parts[1].encode())
    assert corpus.meta.bytes_per_token == pytest.approx(val_bytes / corpus.meta.val_tokens)
    assert (out / "tokenizer.json").exists() == (tokenizer == "bpe")


def test_a_tokenizer_that_is_there_is_taken(tmp_path, text, capsys, monkeypatch):
    """Of a folder, as Hugging Face's has it; here one of more tokens than short ids can name."""
    monkeypatch.setattr("rosetrainer.data.tokenizer.LARGEST_UINT16", 200)
    made = BPETokenizer.train("to be or not to be " * 40, 262, end_of_text=True)
    (tmp_path / "theirs").mkdir()
    made.save(tmp_path / "theirs")
    out = tmp_path / "c"
    make("file", text, "--out", out, "--tokenizer", tmp_path / "theirs")
    corpus = open_corpus(out, 8)
    assert (corpus.meta.dtype, corpus.meta.tokenizer) == ("uint32", "bpe")
    assert corpus.meta.vocab_size == made.vocab_size
    ids = np.fromfile(out / "train.bin", "<u4")
    assert made.decode(ids) in text.read_text() and len(ids) == corpus.meta.train_tokens
    assert (out / "tokenizer.json").read_text() == made.to_json()
    capsys.readouterr()
    make("file", text, "--out", out, "--tokenizer", tmp_path / "theirs" / "tokenizer.json")
    assert "made in" not in capsys.readouterr().out
    assert "; add --force to replace it" in message("file", text, "--out", out)
    assert message("file", text, "--tokenizer", tmp_path) == (
        f"tokenizer='{tmp_path}' can be bytes, chars, bpe, or the path of a tokenizer.json or of "
        "its folder"
    )
    assert "vocab_size=300 is for --tokenizer bpe; leave it out, " in message(
        *("file", text, "--tokenizer", tmp_path / "theirs", "--vocab-size", 300)
    )


def test_val_fraction(tmp_path, text):
    make("file", text, "--out", tmp_path / "c", "--val-fraction", 0.25, "--tokenizer", "chars")
    meta = read_meta(tmp_path / "c")
    assert (meta.train_tokens, meta.val_tokens) == (675, 225)
    for fraction, name in ((0, "val"), (1, "train")):
        assert f"leaves 0 tokens for {name}.bin; it needs 2 at least" in message(
            "file", text, "--out", tmp_path / "d", "--val-fraction", fraction
        )
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not there")
def test_shakespeare_out_of_a_file(tmp_path, capsys):
    make("shakespeare", SHAKESPEARE, "--out", tmp_path / "s", "--tokenizer", "chars")
    meta = read_meta(tmp_path / "s")
    assert (meta.vocab_size, meta.train_tokens, meta.val_tokens) == (65, 1003854, 111540)
    make("shakespeare", "--out", tmp_path / "s", "--tokenizer", "chars")  # needs no download
    assert "whole already" in capsys.readouterr().out


@pytest.mark.prints_commands
def test_shakespeare_without_a_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", refuse)
    assert message("shakespeare", "--out", tmp_path / "s") == (
        f"cannot download {shakespeare.URL} (no route to host); pass a file that you have: "
        f"`{prepare_command()} shakespeare PATH`"
    )
    assert os.listdir(tmp_path) == []


def test_a_download_of_something_else_is_refused(tmp_path, monkeypatch):

    monkeypatch.setattr(
        shakespeare.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>")
    )
    assert "gave 6 bytes that are not tiny-shakespeare" in message(
        "shakespeare", "--out", tmp_path / "s"
    )


@pytest.mark.parametrize("order", [1, 2])
def test_the_floor_is_the_chains_own_loss(tmp_path, order):
    out = tmp_path / "m"
    make("markov", "--out", out, "--order", order, "--alphabet", 4, "--train-tokens", 100_000)
    meta = read_meta(out)
    assert meta.chain is not None
    assert meta.floor_nats is not None
    table = np.array(meta.chain["probabilities"])
    val = np.fromfile(out / "val.bin", "<u2").tolist()
    train = np.fromfile(out / "train.bin", "<u2").tolist()
    losses = [np.log(4)] * (order - 1)
    for i in range(order, len(val)):
        row = sum(token * 4**age for age, token in enumerate(reversed(val[i - order : i])))
        losses.append(-np.log(table[row][val[i]]))
    assert meta.floor_nats == pytest.approx(np.mean(losses), rel=1e-12)
    assert meta.floor_nats < np.log(4) - 0.1

    # Counting in train.bin is the best that can be learnt; it comes near and not below.
    counts = np.full((4**order, 4), 0.5)
    rows = [
        sum(t * 4**a for a, t in enumerate(reversed(train[i - order : i])))
        for i in range(order, len(train))
    ]
    np.add.at(counts, (rows, train[order:]), 1)
    learnt = counts / counts.sum(axis=1, keepdims=True)
    rows = [
        sum(t * 4**a for a, t in enumerate(reversed(val[i - order : i])))
        for i in range(order, len(val))
    ]
    loss = -np.log(learnt[rows, val[order:]]).mean()
    assert abs(loss - np.mean(losses[order - 1 :])) < 0.002


def test_markov_is_decided_by_its_seed(tmp_path):
    small = ("--train-tokens", 500, "--val-tokens", 500)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make("markov", "--out", tmp_path / name, "--seed", seed, *small)
    a, b, c = ((tmp_path / name / "val.bin").read_bytes() for name in "abc")
    assert a == b != c
    assert open_corpus(tmp_path / "a", 8).has_floor


def test_other_options_need_force(tmp_path, text):
    out = tmp_path / "c"
    make("file", text, "--out", out)
    assert message("file", text, "--out", out, "--tokenizer", "chars") == (
        f"{out} holds a corpus with tokenizer='bytes', not 'chars'; add --force to replace it, or "
        "give another --out"
    )
    text.write_text(TEXT + "More.\n")
    assert "holds a corpus with text_sha256=" in message("file", text, "--out", out)
    make("file", text, "--out", out, "--tokenizer", "chars", "--force")
    assert read_meta(out).tokenizer == "chars"
    assert sorted(os.listdir(tmp_path)) == ["c", "text.txt"]


def test_a_damaged_corpus_is_made_again(tmp_path, text, capsys):
    out = tmp_path / "c"
    make("file", text, "--out", out)
    whole = (out / "val.bin").read_bytes()
    (out / "val.bin").write_bytes(b"zz" + whole[2:])
    make("file", text, "--out", out)
    assert f"{out / 'val.bin'} is damaged; making it again" in capsys.readouterr().out
    assert (out / "val.bin").read_bytes() == whole
    (out / "train.bin").unlink()
    make("file", text, "--out", out)
    open_corpus(out, 8)


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("name", ["notes.txt", "train.bin", "meta.json"])
def test_what_is_not_ours_is_not_replaced(tmp_path, text, name, force):
    out = tmp_path / "c"
    out.mkdir()
    (out / name).write_text("{}")
    error = message("file", text, "--out", out, *force)
    assert error.startswith(f"{out} holds ")
    assert error.endswith("did not write and does not replace; give another --out")
    assert (out / name).read_text() == "{}"


@pytest.mark.parametrize(
    "change", [{"tokenizer": "\ud800"}, {"train_tokens": "9"}, {"documents": 3}]
)
def test_a_meta_json_that_is_no_longer_ours_is_not_replaced(tmp_path, text, change):
    out = tmp_path / "c"
    make("file", text, "--out", out)
    meta = json.loads((out / "meta.json").read_text()) | change
    (out / "meta.json").write_text(json.dumps(meta))
    assert "holds files but no meta.json of ours" in message("file", text, "--out", out, "--force")


def test_a_path_that_is_no_text_is_printed_all_the_same(tmp_path, text):
    out = os.fsencode(tmp_path) + b"/caf\xe9"
    done = script("file", text, "--out", os.fsdecode(out))
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9: file, " in done.stdout
    assert sorted(os.listdir(out)) == [b"meta.json", b"train.bin", b"val.bin"]


def test_a_users_file_beside_ours_is_kept(tmp_path, text):
    make("file", text, "--out", tmp_path / "c")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert "holds notes.txt" in message("file", text, "--out", tmp_path / "c", "--force")


def test_out_that_is_a_file(tmp_path, text):
    assert message("file", text, "--out", text) == (
        f"cannot use {text}: Not a directory; give another --out"
    )


def test_an_empty_folder_and_a_link_are_filled(tmp_path, text):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make("file", text, "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    open_corpus(tmp_path / "real", 8)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("fsyncs", [0, 1, 2, 3])
def test_an_interrupt_leaves_nothing_half_written(tmp_path, text, monkeypatch, stop, fsyncs):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > fsyncs:
            raise stop
        real(descriptor)

    monkeypatch.setattr(corpus_folder.os, "fsync", fsync)
    with pytest.raises(stop):
        make("file", text, "--out", tmp_path / "c")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_an_interrupted_replacement_keeps_the_old_corpus(tmp_path, text, monkeypatch):
    out = tmp_path / "c"
    make("file", text, "--out", out)
    real = Path.rename

    def rename(self, target):
        if "-new-" in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        make("file", text, "--out", out, "--force", "--tokenizer", "chars")
    assert sorted(os.listdir(tmp_path)) == ["c", "text.txt"]
    assert open_corpus(out, 8).meta.tokenizer == "bytes"


def test_a_full_disk_is_one_line(tmp_path, text, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_folder.os, "fsync", full)
    assert message("file", text, "--out", tmp_path / "c") == (
        f"cannot write {tmp_path / 'c'}: No space left on device; make room, or give another --out"
    )
    assert os.listdir(tmp_path) == ["text.txt"]


def test_files_that_are_no_text(tmp_path):
    out, path = tmp_path / "c", tmp_path / "x.txt"
    assert message("file", path, "--out", out) == (
        f"cannot read {path}: No such file or directory; pass a text file"
    )
    path.write_bytes(b"")
    assert message("file", path, "--out", out) == f"{path} is empty; pass a file with text"
    path.write_bytes(b"abc\xe9t")
    assert message("file", path, "--out", out).startswith(
        f"{path} is not UTF-8: byte 0xe9 at offset 3; it may be WINDOWS-1252"
    )
    assert message("file", tmp_path, "--out", out) == (
        f"{tmp_path} is a directory; pass text files, for example {tmp_path}/*.txt"
    )
    assert "file needs a path" in message("file", "--out", out)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["docs"], "no corpus 'docs'; it can be python-docs, shakespeare, file, markov, import"),
        (["--vocab-size", "300"], "vocab_size=300 is for --tokenizer bpe"),
        (["--tokenizer", "bpe", "--vocab-size", "256"], "vocab_size=256 must be from 257 to 65535"),
        (["--val-fraction", "1.5"], "val_fraction=1.5 must be from 0 to 1"),
        (["markov", "--alphabet", "27"], "alphabet=27 must be from 2 to 26"),
        (["markov", "--order", "9"], "alphabet=8 and order=9 make a table of 1073741824"),
        (["--tokeniser", "chars"], "did you mean --tokenizer?"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in message(*argv)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("source", prepare.SOURCES)
def test_every_source_is_read_and_explained(source):
    """What a new source has to have besides its flags: where its text comes from, and a line."""
    with contextlib.suppress(ConfigError):  # it wants a path
        prepare._open(source, prepare.SOURCES[source]())
    assert f"\n  {source} " in prepare.__doc__, f"{source} has no line in the docstring, the help"
    for page in ("README.md", "README.zh.md"):
        text = (Path(__file__).resolve().parents[2] / page).read_text()
        assert f"`{source}`" in text, f"{page} does not name the source {source}"


def test_a_mistake_is_one_line_and_exit_status_2():
    done = script("docs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: no corpus 'docs'; it can be python-docs, shakespeare, file, markov, import\n"
    )


def test_help(capsys):
    make("--help")
    assert "python -m rosetrainer prepare" in capsys.readouterr().out
    assert script("markov", "--help").returncode == 0

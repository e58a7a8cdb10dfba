"""Input that is not plain UTF-8: told by its bytes, and taken rightly or refused with a way out."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import re
import socket
import sqlite3
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.data import text_files
from rosetrainer.data.text_files import recognise
from rosetrainer.validation import ConfigError

TEXT = "Das Café ist offen.\nÜber 中文 und 🙂 später.\n" * 40


def refused(path: Path, *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(["file", str(path), "--out", str(path.parent / "out"), *flags])
    assert "\n" not in str(error.value)
    assert not (path.parent / "out").exists()
    return str(error.value)


def corpus_of(path: Path, *flags: str) -> dict[str, bytes]:
    out = path.parent / f"{path.name}-corpus"
    prepare(["file", str(path), "--out", str(out), *flags])
    return {file.name: file.read_bytes() for file in out.iterdir()}


WRITTEN = {
    "plain": TEXT.encode(),
    "mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16-le": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16-be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "utf-32-be": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "powershell": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "old mac": TEXT.replace("\n", "\r").encode(),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip in two": gzip.compress(TEXT[:100].encode()) + gzip.compress(TEXT[100:].encode()),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "all at once": gzip.compress(TEXT.replace("\n", "\r\n").encode("utf-16")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_equal_text_gives_an_equal_corpus_however_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain.txt").write_bytes(TEXT.encode())
    (tmp_path / "other.dat").write_bytes(WRITTEN[name])
    assert corpus_of(tmp_path / "other.dat") == corpus_of(tmp_path / "plain.txt")


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    else:
        with zipfile.ZipFile(content, "w") as made:
            made.writestr(
                {"docx": "[Content_Types].xml", "pt": "archive/data.pkl"}.get(kind, "a"), "x"
            )
    return content.getvalue()


def database(path: Path) -> bytes:
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (text)")
    connection.close()
    content = path.read_bytes()
    path.unlink()
    return content


def array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    return content.getvalue()


NO_TEXT = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed by zstd; unpack it: `unzstd -k {path}`"),
    "zip": (archive("zip"), "is a zip archive; unpack it: `unzip {path}`"),
    "docx": (archive("docx"), "is a document in a zip archive"),
    "torch": (archive("pt"), "is a model of torch's; pass a text file"),
    "tar": (archive("tar"), "is a tar archive; unpack it: `tar -xkf {path}`"),
    "tar.gz": (
        gzip.compress(archive("tar")),
        "is a tar archive, inside gzip; `gzip -dc < {path} > unpacked`, and pass unpacked",
    ),
    "gzip of latin-1": (gzip.compress("né à l'été\n".encode("latin-1")), "; `gzip -dc < {path} > "),
    "xz of html": (lzma.compress(b"<html>\n"), "inside xz; `xz -dc < {path} > unpacked`, and"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "`7z x {path}`"),
    "pdf": (
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
        "is a PDF document; write its text: `pdftotext",
    ),
    "pdf of ASCII": (b"%PDF-1.4\n1 0 obj\n<< >>\n", "is a PDF document"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "is an old Office document"),
    "sqlite": (None, "is an SQLite database; write its texts as JSON lines"),
    "numpy": (array(), "is a numpy array; token ids go as bare uint16 into train.bin"),
    "pickle": (
        pickle.dumps({"itos": {0: "a"}}),
        "is a pickle, which can run code and is never opened",
    ),
    "pickle 2": (pickle.dumps(["a", "b"], protocol=2), "is a pickle"),
    "safetensors": (save_safetensors({"w": np.ones(9)}), "is a model in safetensors"),
    "llm.c": (
        struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + bytes(8),
        "is llm.c's token ids; imp",
    ),
    "elf": (b"\x7fELF\2\1\1" + bytes(99), "is a program; pass a text file"),
    "exe": (b"MZ\x90\0\3" + bytes(99), "is a program"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a picture"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a picture"),
    "mp3": (b"ID3\x04\0\0\0\0", "is sound or film"),
    "arrow": (
        b"ARROW1\0\0\xff\xff\xff\xff",
        "is a table of Arrow's; write it as JSON lines or parq",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a git-lfs pointer, not the file itself; fetch the file: `git lfs pull`",
    ),
    "html": (b"<!DOCTYPE html>\n<html><body>Hi</body></html>\n", "is an HTML page; write its text"),
    "xhtml": (b"<?xml version='1.0'?>\n<!-- a -->\n<HTML>\n", "is an HTML page"),
    "html in utf-16": ("<html>\n<p>".encode("utf-16"), "is an HTML page"),
    "rtf": (b"{\\rtf1\\ansi Hello}", "is RTF; write its text"),
    "json list": (b'[{"text": "a"},\n {"text": "b"}]', "`jq -c '.[]' {path} > texts.jsonl`"),
    "json texts": (b'["a",\n"b"]', "`jq -c '.[] | {{text: .}}' {path} > texts.jsonl`"),
    "json object": (b'{\n  "data": [1, 2]\n}\n', "`jq -c . {path} > texts.jsonl`"),
    "empty": (b"", "is empty; pass a file with text"),
    "empty packed": (gzip.compress(b""), "is empty; pass a file with text"),
    "only a mark": (b"\xef\xbb\xbf", "is empty; pass a file with text"),
    "white": (b" \n\t\r\n \n", "holds only white space; pass a file with text"),
    "NULs": (bytes(1000), "is binary data, no text: a NUL byte at offset 0; pass a text file"),
    "one NUL": (b"abc\n" * 99 + b"\0" + b"abc\n", "holds 1 NUL bytes, the first at offset 396"),
    "controls": (bytes(range(1, 32)) * 9, "of its bytes are control characters"),
    "twice": (gzip.compress(gzip.compress(b"abc\n")), "is packed twice"),
    "cut gzip": (gzip.compress(TEXT.encode())[:-12], "is gzip, but damaged or cut off"),
    "wrong gzip": (
        gzip.compress(TEXT.encode())[:40] + bytes(60),
        "is gzip, but damaged or cut off",
    ),
    "cut bzip2": (bz2.compress(TEXT.encode())[:-12], "is bzip2, but damaged or cut off"),
    "cut xz": (lzma.compress(TEXT.encode())[:-12], "is xz, but damaged or cut off"),
    "cut utf-16": (TEXT.encode("utf-16")[:-1], "is UTF-16LE, but not at offset"),
    "half a pair": (TEXT.encode("utf-16-le") + b"\0\xd8", "UTF-16LE without"),
    "utf-16-le": (
        TEXT.encode("utf-16-le"),
        "looks like UTF-16LE without a byte order mark; if `iconv",
    ),
    "utf-16-be": (TEXT.encode("utf-16-be"), "if `iconv -f UTF-16BE -t UTF-8 {path} | head` reads"),
    "chinese utf-16": ("天地玄黄\n宇宙洪荒\n".encode("utf-16-be"), "UTF-16BE"),
    "utf-32-le": (TEXT.encode("utf-32-le"), "looks like UTF-32LE"),
    "utf-32-be": (TEXT.encode("utf-32-be"), "looks like UTF-32BE"),
    "latin-1": (
        "Das Café ist für Müßige geöffnet.\n".encode("latin-1"),
        "may be WINDOWS-1252: if `ic",
    ),
    "latin-1, late": (b"plain text\n" * 9999 + b"caf\xe9 \xe0 la\n", "may be WINDOWS-1252"),
    "windows-1252": ("“It’s the café” – he said…\n".encode("cp1252"), "WINDOWS-1252"),
    "gb18030": ("这是我们的中国，他们在这里说的话。\n".encode("gb18030"), "may be GB18030"),
    "shift_jis": ("これはひらがなとカタカナです。\n".encode("shift_jis"), "may be SHIFT_JIS"),
    "euc-kr": ("한국어로 쓴 글입니다.\n".encode("euc-kr"), "may be CP949"),
    "windows-1251": ("Это русский текст, и он понятен.\n".encode("cp1251"), "may be WINDOWS-1251"),
    "koi8-r": ("Это русский текст, и он понятен.\n".encode("koi8-r"), "may be KOI8-R"),
    "no encoding": (
        b"abc" + bytes(range(0x80, 0x9F)) + b"\n",
        "nor any encoding that is known here",
    ),
    "cut off": (
        "Das Café".encode()[:-1],
        "ends in the middle of a UTF-8 character, at offset 7; was",
    ),
    "a bad byte": (
        TEXT.encode() + b"\xe9 " + TEXT.encode(),
        "though the rest is, but for 1 places",
    ),
    "surrogates": (TEXT.encode() + b"\xed\xa0\x80" + TEXT.encode(), "though the rest is"),
    "parquet": (b"PAR1\x15\x04\x15\x00 cut", "as parquet"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_each_kind_is_refused_with_what_helps_for_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "input.txt"
    content, expected = NO_TEXT[name]
    path.write_bytes(content if content is not None else database(tmp_path / "db"))
    message = refused(path)
    assert str(path) in message
    assert expected.format(path=path) in message
    assert os.listdir(tmp_path) == ["input.txt"]


@pytest.mark.parametrize(
    "name", ["cut off", "a bad byte", "one NUL", "html", "pdf", "json list", "tar.gz"]
)
def test_no_command_that_is_printed_writes_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`head -c 7 text.txt > text.txt` leaves nothing of what a user made."""
    monkeypatch.chdir(tmp_path)
    for name_taken in ("text.txt", "texts.jsonl", "unpacked"):
        Path(name_taken).write_bytes(NO_TEXT[name][0] or b"")
    command = refused(Path("text.txt")).partition("`")[2].partition("`")[0]
    assert re.search(r"(text-2\.txt|texts-2\.jsonl|unpacked-2)$|-o text-2\.txt", command), command
    assert not re.search(r"(> |-o )(text\.txt|texts\.jsonl|unpacked$)", command), command


@pytest.mark.parametrize("name", ["html", "json list", "rtf", "json object"])
def test_markup_is_taken_as_text_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / "page"
    content, _ = NO_TEXT[name]
    path.write_bytes((content or b"") * 20)
    made = corpus_of(path, "--as-text")
    assert len(made["train.bin"]) + len(made["val.bin"]) == 40 * len(content or b"")


@pytest.mark.parametrize(
    "text",
    [
        "[1] A note.\n[2] And one more.\n",
        "{ this is no JSON }\n",
        "{\\em So} wrote TeX.\n",
        "PAR1 is how parquet begins.\n",
        "<p>A fragment</p>\n",
        "MZ begins a program, and BZh a bzip2 file.\n",
        "GIF89a\nID3\nRIFF\n",
        "\x1b[31mred\x1b[0m\ttab\x0cpage\n",
        "\ufeffmark\n",
    ],
)
def test_text_that_looks_a_little_like_something_else_is_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(text.encode() * 9)
    assert len(recognise(path).read()) >= 9 * len(text) - 1


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").endswith("No such file or directory; pass a text file")
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path / "folder").endswith("for example {}/*.txt".format(tmp_path / "folder"))
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refused(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        assert "is a pipe or a device" in refused(tmp_path / "s")
    with pytest.raises(ConfigError, match="/dev/zero is a pipe or a device"):
        recognise(Path("/dev/zero"))


def test_a_python_without_a_module_to_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(WRITTEN["xz"])
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert refused(path) == (
        f"{path} is xz, and this Python was built without lzma; `xz -dc < {path} > unpacked`, and "
        "pass unpacked"
    )


def test_a_small_file_does_not_unpack_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LARGEST_UNPACKED", 1 << 20)
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(b"a line\n" * (1 << 18)))
    assert "unpacks to more than 1 MiB; if it should, `gzip -dc <" in refused(path)
    path.write_bytes(b"a line\n" * (1 << 18))  # what lies on the disk is taken
    corpus_of(path)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_no_bytes_at_all_end_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x"
    path.write_bytes(data)
    try:
        recognise(path).read()
    except ConfigError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


def test_random_bytes_are_not_advised_to_be_converted(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for size in (200, 2000, 20000):
        path = tmp_path / "x.bin"
        path.write_bytes(generator.integers(256, size=size).astype(np.uint8).tobytes())
        assert "iconv" not in refused(path)

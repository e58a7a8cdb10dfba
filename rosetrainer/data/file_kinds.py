"""What a file is, by its first bytes; for each kind that is no text, how to get text out of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from rosetrainer.durable_files import free
from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

HEAD = 1 << 16  # first bytes that decide what a file is

# These are unpacked while they are read.
COMPRESSED = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
}
LLM_C = rb"\x88\xd8\x34\x01|\xa1\xd9\x34\x01"  # 20240520 and 20240801
PASS_TEXT = "pass a text file"
JSON_LINES = 'write its texts as JSON lines, {{"text": ...}} each, with the program that made it'
ONE_JSON = "one JSON value, not JSON lines"
AS_LINES = "write each text as a line of its own, for example "
IMPORT = "`{prepare} import FOLDER --tokenizer TOKENIZER`"
Kinds = list[tuple[str, bytes, str]]
# What it is, how it begins, and how to get a text out of it; {path} is quoted for a shell. {text}
# and {lines} are files that are not there yet: a command that we print must not write over one.
BINARY: Kinds = [
    ("compressed by zstd", rb"\x28\xb5\x2f\xfd", "unpack it: `unzstd -k {path}`"),
    ("compressed by lz4", rb"\x04\x22\x4d\x18", "unpack it: `unlz4 -k {path}`"),
    ("compressed by compress", rb"\x1f\x9d", "unpack it: `gunzip -c {path} > {text}`"),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", "unpack it: `7z x {path}`; pass its texts"),
    ("a RAR archive", rb"Rar!\x1a\x07", "unpack it: `unrar x {path}`; pass its texts"),
    (
        "a document in a zip archive, as .docx, .odt and .epub are",
        rb"PK\x03\x04.{0,400}(\[Content_Types\]|mimetypeapplication/|word/|_rels/)",
        "write its text: `pandoc -t plain -o {text} {path}`",
    ),
    ("a model of torch's", rb"PK\x03\x04.{0,400}data\.pkl", PASS_TEXT),
    ("a zip archive", rb"PK(\x03\x04|\x05\x06)", "unpack it: `unzip {path}`; pass its texts"),
    ("a tar archive", rb".{257}ustar", "unpack it: `tar -xkf {path}`; pass its texts"),
    ("a PDF document", rb"%PDF-", "write its text: `pdftotext -layout {path} {text}`"),
    (
        "an old Office document",
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "write its text: `soffice --headless --cat {path} > {text}`",
    ),
    (
        "an SQLite database",
        rb"SQLite format 3\0",
        "write its texts as JSON lines, for example `sqlite3 {path} \"select json_object('text', "
        'COLUMN) from TABLE" > {lines}`',
    ),
    (
        "a numpy array",
        rb"\x93NUMPY",
        f"token ids go as bare uint16 into train.bin and val.bin, then {IMPORT}",
    ),
    (
        "a pickle, which can run code and is never opened",
        rb"\x80[\x02-\x05][\x95\x8a\x8c\]}(cNKX]",
        JSON_LINES,
    ),
    ("a model in safetensors", rb'.{4}[\0-\x0f]\0\0\0\{[ "]', PASS_TEXT),
    ("a model in GGUF", rb"GGUF[\x01-\x09]\0\0\0", PASS_TEXT),
    (
        "a table of Arrow's",
        rb"ARROW1\0\0|\xff\xff\xff\xff.[\0-\x0f]\0\0",
        "write it as JSON lines or parquet, by datasets' Dataset.to_json or to_parquet",
    ),
    ("a table in HDF5", rb"\x89HDF\r\n\x1a\n", JSON_LINES),
    ("a table in Avro or ORC", rb"Obj\x01|ORC[\0-\x08]", JSON_LINES),
    ("llm.c's token ids", LLM_C, f"import it: {IMPORT}"),
    (
        "a program",
        rb"\x7fELF|MZ.*\0|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm",
        PASS_TEXT,
    ),
    (
        "a picture",
        rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a.*\0|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*",
        "if it shows a text, write that: `tesseract {path} stdout > {text}`",
    ),
    (
        "sound or film",
        rb"ID3[\x02-\x04]|\xff[\xfb\xf3\xf2]|fLaC\0|OggS\0|"
        rb"RIFF.{4}(WAVE|AVI )|\0\0.{2}ftyp|\x1aE\xdf",
        PASS_TEXT,
    ),
]
# Text, but probably not the one that was meant; `--as-text` takes it as it is.
MARKUP: Kinds = [
    (
        "a git-lfs pointer, not the file itself",
        rb"version https://git-lfs\.github\.com/",
        "fetch the file: `git lfs pull`",
    ),
    (
        "an HTML page",
        rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)\b",
        "write its text: `pandoc -f html -t plain -o {text} {path}`",
    ),
    ("RTF", rb"\{\\rtf\d", "write its text: `pandoc -f rtf -t plain -o {text} {path}`"),
    # An object over several lines, a list of objects or of texts; JSON lines are recognised before.
    (ONE_JSON, rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:', AS_LINES + "`jq -c . {path} > {lines}`"),
    (ONE_JSON, rb"\s*\[\s*\{", AS_LINES + "`jq -c '.[]' {path} > {lines}`"),
    (ONE_JSON, rb'\s*\[\s*"', AS_LINES + "`jq -c '.[] | {{text: .}}' {path} > {lines}`"),
]


def compression(head: bytes) -> str | None:
    """gzip, bzip2 or xz, if that is how a file with this head is packed."""
    return next((name for name, magic in COMPRESSED.items() if re.match(magic, head)), None)


def is_parquet(head: bytes) -> bool:
    """Whether it begins as parquet does; a text that begins with "PAR1" does not."""
    return head.startswith(b"PAR1") and re.search(rb"[^\t\n\r -~]", head[4:64]) is not None


def refuse(path: Path, head: bytes, kinds: Kinds, otherwise: str = "") -> None:
    """Raises ConfigError if a file that begins like this is of one of `kinds`, with what to do.

    otherwise: another way out.
    """
    for what, magic, remedy in kinds:
        if re.match(magic, head, re.DOTALL):
            files = {"text": free("text.txt"), "lines": free("texts.jsonl")}
            remedy = remedy.format(path=shlex.quote(str(path)), prepare=prepare_command(), **files)
            raise ConfigError(f"{path} is {what}; {remedy}{otherwise}")

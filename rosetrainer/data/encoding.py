"""Bytes to text: Unicode is decoded; the rest is refused, with a guess at what it may be."""

from __future__ import annotations

import codecs
import re
import shlex
import unicodedata
from pathlib import Path

from rosetrainer.durable_files import free
from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

SAMPLE = 1 << 16  # bytes that a guess is based on
# The longer marks first: UTF-32's begins as UTF-16's does.
MARKS = {
    "utf-32le": codecs.BOM_UTF32_LE,
    "utf-32be": codecs.BOM_UTF32_BE,
    "utf-8": codecs.BOM_UTF8,
    "utf-16le": codecs.BOM_UTF16_LE,
    "utf-16be": codecs.BOM_UTF16_BE,
}
CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
MOST_CONTROLS = 0.02  # of the bytes; random bytes hold 0.11
# Encodings of one country's texts: characters that are frequent there, and how many of those beyond
# ASCII have to be among them to make it likely.
_CHINESE = (
    "[的一是不了人在有我他这這中大来來上个個国國到说說们們为為子和你地出道也时時年得就那要以，。、]"
)
_KANA, _CYRILLIC = "[\u3041-\u30f6]", "[а-яё]"
COUNTRIES = {
    "GB18030": (_CHINESE, 0.1),
    "BIG5": (_CHINESE, 0.1),
    "SHIFT_JIS": (_KANA, 0.3),
    "EUC-JP": (_KANA, 0.3),
    "CP949": ("[\uac00-\ud7a3]", 0.8),
    "WINDOWS-1251": (_CYRILLIC, 0.7),
    "KOI8-R": (_CYRILLIC, 0.7),
    "WINDOWS-1252": ("[éèêëàâáãåäçñíìîïóòôõöøúùûüßæœÄÖÜÉ’‘“”–—…«»°€£§¿¡]", 0.5),
}


def byte_order_mark(data: bytes) -> tuple[str, int]:
    """The Unicode encoding that data begins with the mark of, and the mark's length.

    ("utf-8", 0) without a mark.
    """
    for encoding, mark in MARKS.items():
        if data.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode(data: bytes, path: Path, offset: int = 0) -> str:
    """The text of a file's bytes: UTF-8, or Unicode that begins with a byte order mark.

    The mark goes, and each line ends in a line feed, so that one text gives one corpus wherever it
    was written. offset: where in the file the bytes stand, for messages. Raises ConfigError for
    bytes that are not certainly a text.
    """
    encoding, mark = byte_order_mark(data)
    try:
        if encoding == "utf-8":
            _check_bytes(data, path, offset)
        text = data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            raise _not_utf8(data, path, offset, error) from None
        raise ConfigError(
            f"{path} is {encoding.upper()}, but not at offset {offset + mark + error.start} "
            f"({error.reason}); was it copied whole?"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path} holds NUL, which no text has, at character {text.index(chr(0))}")
    return unix_lines(text)


def unix_lines(text: str) -> str:
    """Each line ends in a line feed: not in Windows' pair, nor in the old Mac's carriage return."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_bytes(data: bytes, path: Path, offset: int) -> None:
    """Raises ConfigError for what no UTF-8 text holds: NUL, or many control characters."""
    nul = data.find(b"\0")
    if nul < 0:
        controls = len(CONTROLS.findall(data[:SAMPLE])) / max(len(data[:SAMPLE]), 1)
        if controls > MOST_CONTROLS:
            raise ConfigError(
                f"{path} is no text: {controls:.0%} of its bytes are control characters; "
                "pass a text file"
            )
        return
    if unicode := _without_mark(data):
        raise ConfigError(
            f"{path} looks like {unicode} without a byte order mark; {_convert(unicode, path)}"
        )
    without = data.replace(b"\0", b"").decode("utf-8", "replace")
    if data.count(b"\0") < MOST_CONTROLS * len(data) and "\ufffd" not in without:
        raise ConfigError(
            f"{path} holds {data.count(0)} NUL bytes, the first at offset {offset + nul}, and no "
            "text does; was it copied whole? "
            f"`tr -d '\\000' < {shlex.quote(str(path))} > {free('text.txt')}` leaves them out"
        )
    ids = f"; if these are token ids: `{prepare_command()} import --help`"
    raise ConfigError(
        f"{path} is binary data, no text: a NUL byte at offset {offset + nul}"
        + (ids if path.suffix == ".bin" else "; pass a text file")
    )


def _without_mark(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if data, which holds NUL bytes, is text in it."""
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        whole = data[: min(len(data), SAMPLE) // 4 * 4]
        text = whole.decode(encoding, "replace")
        strange = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text)
        strange += text.count("\ufffd") - sum(text.count(c) for c in "\n\r\t")
        # Read in the wrong order, the bytes of a space are an unusual character and not a space.
        if strange <= 0.01 * len(text) and any(c in text for c in " \n。、，"):
            return encoding
    return None


def _not_utf8(data: bytes, path: Path, offset: int, error: UnicodeDecodeError) -> ConfigError:
    """The error for bytes that are not UTF-8, with what to do about them."""
    name, where = shlex.quote(str(path)), offset + len(data) - len(error.object) + error.start
    if error.reason == "unexpected end of data":
        return ConfigError(
            f"{path} ends in the middle of a UTF-8 character, at offset {where}; was it copied "
            f"whole? If so, `head -c {where} {name} > {free('text.txt')}` leaves the piece out"
        )
    start = f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {where}"
    beyond = [c for c in data.decode("utf-8", "replace") if not c.isascii()]
    bad = beyond.count("\ufffd")
    if len(beyond) - bad > 4 * bad:
        return ConfigError(
            f"{start}, though the rest is, but for {bad} places; was it damaged, or put together "
            f"out of several files? `iconv -c -f UTF-8 -t UTF-8 {name} > {free('text.txt')}` "
            "leaves them out"
        )
    likely = likely_encoding(data[max(error.start - SAMPLE // 2, 0) :])
    if likely is None:
        return ConfigError(
            f"{start}, nor any encoding that is known here; if it is text, write it as UTF-8 with "
            "the program that it comes from"
        )
    return ConfigError(f"{start}; it may be {likely}: {_convert(likely, path)}")


def likely_encoding(data: bytes) -> str | None:
    """The national encoding in which data reads most like text, None if in none."""
    sample = data[:SAMPLE]
    western = sum(byte >= 0x80 for byte in sample) < 0.3 * len(sample)
    best, likely = 0.0, None
    for encoding, (frequent, enough) in COUNTRIES.items():
        if western != (encoding == "WINDOWS-1252"):
            continue
        text = "".join(c for c in sample.decode(encoding, "replace") if not c.isascii())
        damaged = text.count("\ufffd") / max(len(text), 1)
        reached = len(re.findall(frequent, text)) / max(len(text), 1) / enough
        if damaged < 0.01 and reached >= max(best, 1):
            best, likely = reached, encoding
    return likely


def _convert(encoding: str, path: Path) -> str:
    name = shlex.quote(str(path))
    return (
        f"if `iconv -f {encoding} -t UTF-8 {name} | head` reads as it should, write that to a file "
        "and pass it"
    )

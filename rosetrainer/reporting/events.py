"""TensorBoard's events, in the bytes of their files.

TensorBoard's own writer imports protobuf, absl and fsspec: a twentieth of the time to the first
step. A file is a list of records, each a protobuf message Event between two sums:

    length (8 bytes)  sum of those (4)  Event (length)  sum of that (4)

all little-endian; see tensorflow/core/util/event.proto and tensorflow/core/lib/io/record_writer.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # how protobuf writes a field
LARGEST = (2 - 2**-23) * 2.0**127  # of a FLOAT


class EventFile:
    """A new file of events in a folder; what is written is there for other processes at once."""

    def __init__(self, folder: Path) -> None:
        now = time.time()
        place = f"{int(now):010}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = (folder / f"events.out.tfevents.{place}").open("xb", buffering=0)
        self._write(now, 0, _field(3, BYTES, b"brain.Event:2"))  # of the format
        started = _field(1, VARINT, 1)  # a TensorBoard that is running drops what it has read
        self._write(now, 0, _field(7, BYTES, started))

    def add(self, step: int, figures: Mapping[str, float], when: float) -> None:
        """Figures of a step by tag; when: seconds since 1970."""
        values = (
            _field(1, BYTES, _field(1, BYTES, tag.encode()) + _field(2, FLOAT, value))
            for tag, value in figures.items()
        )
        self._write(when, step, _field(5, BYTES, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, when: float, step: int, what: bytes) -> None:
        event = _field(1, DOUBLE, when) + _field(2, VARINT, step) + what
        length = struct.pack("<Q", len(event))
        record = length + _masked_sum(length) + event + _masked_sum(event)
        self._file.write(record)


def _field(number: int, kind: int, value: float | bytes) -> bytes:
    """A field of a protobuf message."""
    key = _varint(number << 3 | kind)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if kind == VARINT:
        return key + _varint(int(value))
    if kind == FLOAT and LARGEST < abs(value) < math.inf:
        value = math.copysign(math.inf, value)  # a norm in float64, say
    return key + struct.pack("<d" if kind == DOUBLE else "<f", value)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def _table() -> list[int]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reversed
        rows.append(byte)
    return rows


CRC = _table()


def _masked_sum(data: bytes) -> bytes:
    """CRC-32C, turned and moved, so that the sum of data that holds sums tells something."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

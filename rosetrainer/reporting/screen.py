"""Standard output that training never waits for: a separate thread writes to it.

`train | less`, Ctrl-S on a terminal, a pipe that nobody reads: all of them block whoever writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

LINES = 10_000
"""Lines that may wait for a reader; more are dropped."""

PATIENCE_SECONDS = 5.0
"""How long the end of a run waits until its output is read."""

ERASE = "\r\x1b[K"


class Screen(io.TextIOBase):
    """Takes the place of a stream. Writing returns at once; `flush` waits, but not for ever.

    An error of the stream, a closed pipe say, is raised by the next write. On a terminal a line
    that is too long is broken between words, and a progress bar may stand below the lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._descriptor = descriptor_of(stream)
        self.is_terminal = self._descriptor is not None and os.isatty(self._descriptor)
        self.has_bar = self.is_terminal and os.environ.get("TERM", "dumb") != "dumb"
        self._changed = threading.Condition()
        self._partial = ""
        self._lines: deque[str] = deque()
        self._bar: str | None = None
        self._bar_stands = self._busy = self._stuck = self._closed = False
        self._dropped = 0
        self._error: Exception | None = None
        threading.Thread(target=self._write_all, name="screen", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.is_terminal

    def fileno(self) -> int:
        return self._stream.fileno()

    def columns(self) -> int:
        """The terminal's width; 80 where it is not known."""
        with contextlib.suppress(OSError):
            return os.get_terminal_size(self._descriptor or 0).columns or 80
        return 80

    def write(self, text: str) -> int:
        if self._error is not None:
            raise self._error
        with self._changed:
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._put(self._wrapped(line))
            self._changed.notify_all()
        return len(text)

    def bar(self, text: str) -> None:
        """Shows it below all lines, in place of what stood there. A newer one may overtake it."""
        with self._changed:
            self._bar = text
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all is written; no more than once for a reader that does not read."""
        with self._changed:
            if not self._stuck:
                wait = self._changed.wait_for
                self._stuck = not wait(lambda: not (self._lines or self._busy), PATIENCE_SECONDS)

    def close(self) -> None:
        """Writes what is left, if somebody reads. The stream stays open."""
        with self._changed:
            if not self._closed:
                if self._partial:
                    self._put(self._partial)
                self._report_dropped()
                self._closed, self._partial = True, ""
                self._changed.notify_all()
        self.flush()

    def _put(self, line: str) -> None:
        if self._dropped:
            self._report_dropped()
        if len(self._lines) < LINES:
            self._lines.append(line + "\n")
        else:
            self._dropped += 1

    def _report_dropped(self) -> None:
        if self._dropped and len(self._lines) < LINES:
            line = f"({self._dropped:,} lines left out: nobody read them; log.jsonl has all)\n"
            self._lines.append(line)
            self._dropped = 0

    def _wrapped(self, line: str) -> str:
        if not self.is_terminal or len(line) <= self.columns():
            return line
        indent = "  "
        return textwrap.fill(
            line,
            max(self.columns(), 20),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._bar is not None or self._closed)
                text, self._busy = self._next(), True
                if self._closed and not text:
                    self._busy = False
                    self._changed.notify_all()
                    return
            try:
                if self._error is None:
                    self._emit(text)
            except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
                self._error = error
            with self._changed:
                self._busy = self._stuck = False
                self._changed.notify_all()

    def _next(self) -> str:
        """What to write now: all lines that wait, or else the bar."""
        erase = ERASE if self._bar_stands else ""
        if self._lines:
            text = erase + "".join(self._lines)
            self._lines.clear()
            self._bar_stands = False
            return text
        bar, self._bar = self._bar or "", None
        self._bar_stands = bool(bar)
        return erase + bar

    def _emit(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(text.encode(self.encoding, "replace"))
        while left:
            left = left[os.write(self._descriptor, left) :]


def descriptor_of(stream: TextIO) -> int | None:
    """None for a stream that is no file, as in a notebook."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            return stream.fileno()
    return None


@contextlib.contextmanager
def own_screen() -> Iterator[None]:
    """Printing in here does not wait for a reader; at the end it does, for PATIENCE_SECONDS."""
    stream: TextIO | None = sys.stdout
    if stream is None:  # the process was started without one
        yield
        return
    screen = Screen(stream)
    try:
        with contextlib.redirect_stdout(screen):
            yield
    finally:
        screen.close()
    screen.write("")  # raises what went wrong with the last lines


class ProgressBar:
    """tqdm's bar below the lines of a Screen that can show one."""

    def __init__(self, steps: int, reached: int) -> None:
        screen = sys.stdout
        self._screen = screen if isinstance(screen, Screen) and screen.has_bar else None
        self.shows = self._screen is not None
        self._steps, self._reached, self._done = steps, reached, reached
        self._began = time.monotonic()

    def update(self, text: str) -> None:
        """One step more; text: what stands behind the bar."""
        self._done += 1
        if self._screen:
            bar = tqdm.format_meter(
                self._done,
                self._steps,
                time.monotonic() - self._began,
                ncols=self._screen.columns() - 1,
                ascii=not encodes("█", self._screen.encoding),
                initial=self._reached,
                # Without steps/s, which tokens/s tells: on 60 columns all of it is seen.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {postfix}]",
                postfix=text,
            )
            self._screen.bar(bar)

    def close(self) -> None:
        if self._screen:
            self._screen.bar("")


def encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True

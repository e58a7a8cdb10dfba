"""Training does not wait for whoever reads what it says, and a terminal shows whole words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from ranks import run_ranks
from runs import run_once, tiny

from rosetrainer.reporting import screen
from rosetrainer.reporting.run_log import LOG, RunLog, read_log
from rosetrainer.reporting.screen import Screen, own_screen

ROOT = Path(__file__).resolve().parents[2]
PIPE = 64 * 1024
"""What a pipe of Linux holds before its writer waits."""


def pipe_ends() -> tuple[TextIO, TextIO]:
    reading, writing = os.pipe()
    return os.fdopen(reading), os.fdopen(writing, "w")


@pytest.fixture
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    reading, writing = pipe_ends()
    yield reading, writing
    reading.close()
    with contextlib.suppress(BrokenPipeError):
        writing.close()


def test_lines_come_in_their_order(pipe: tuple[TextIO, TextIO]) -> None:
    reading, writing = pipe
    with contextlib.redirect_stdout(writing), own_screen():
        for number in range(1000):
            print("line", number)
        print("and the last", end="")
    writing.close()
    assert reading.read().splitlines() == [*(f"line {n}" for n in range(1000)), "and the last"]


def test_what_nobody_reads_is_left_out_and_counted(
    pipe: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = pipe
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(screen, "LINES", 100)
    ours = Screen(writing)
    said = [f"line {number} ".ljust(PIPE // 10, ".") + "\n" for number in range(500)]
    for line in said:
        ours.write(line)
    ours.flush()  # comes back although nothing moves
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.extend(reading))
    thread.start()
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 600)
    ours.flush()
    ours._stuck = False  # as once the reader has read
    ours.flush()
    ours.write("and now\n")
    ours.close()
    writing.close()
    thread.join()
    *read, last = read
    assert last == "and now\n"
    position = left_out = 0
    for line in read:
        if line.startswith("("):
            assert line.endswith(" lines left out: nobody read them; log.jsonl has all)\n")
            count = int(line[1:].split()[0])
            position, left_out = position + count, left_out + count
        else:
            assert line == said[position]
            position += 1
    assert position == 500 and 250 <= left_out <= 400


def test_a_closed_pipe_is_told_by_the_next_line(pipe: tuple[TextIO, TextIO]) -> None:
    reading, writing = pipe
    reading.close()
    with pytest.raises(BrokenPipeError), contextlib.redirect_stdout(writing), own_screen():
        print("the first")
        sys.stdout.flush()
        print("the second")
    with pytest.raises(BrokenPipeError), contextlib.redirect_stdout(writing), own_screen():
        print("the last")


def test_without_a_standard_output_nothing_is_said() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with own_screen():
            print("nobody hears")
            assert sys.stdout is None


def train_unread(out: Path, data: Path) -> tuple[int, list[str]]:
    """Trains with long lines for a pipe that is read only after that: steps in the log, lines."""
    reading, writing = pipe_ends()
    longer = "x" * 2000
    screen.PATIENCE_SECONDS = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "say", lambda _, line: print(line + longer))
        patch.setattr(sys, "stdout", writing)
        run_once(tiny(data, out, steps=60, eval_every=0, checkpoint_every=0))
    steps = sum("train/loss" in line for line in read_log(out / LOG))
    lines = []
    for line in reading:
        lines.append(line.removesuffix(longer + "\n"))
        if line.startswith("saved in"):
            break
    reading.close()
    writing.close()
    return steps, lines


def test_a_pipe_that_nobody_reads_does_not_hold_training(markov: Path, tmp_path: Path) -> None:
    ((steps, lines),) = run_ranks(1, train_unread, tmp_path / "run", markov)
    assert steps == 60 and 60 * 2000 > PIPE
    assert [line.split()[1] for line in lines if "tokens/s" in line] == [
        f"{step}/60" for step in range(1, 61)
    ]


def train_on_a_terminal(out: Path, data: Path, columns: int, bar: bool) -> str:
    """What a run of a few steps has shown on a terminal so wide, as it came."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    read: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(ours, read))
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as tty:
        patch.setenv("TERM", "xterm" if bar else "dumb")
        patch.setattr(sys, "stdout", tty)
        run_once(tiny(data, out, checkpoint_every=1))
    reader.join()
    os.close(ours)
    return b"".join(read).decode()


def read_all(descriptor: int, read: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # Linux says so of a terminal that has been left
        while more := os.read(descriptor, 4096):
            read.append(more)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_run_on_a_terminal(columns: int, markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (shown,) = run_ranks(1, train_on_a_terminal, out, markov, columns, columns != 100)
    lines = [line.split("\r")[-1] for line in shown.replace("\x1b[K", "").split("\r\n")]
    words = " ".join(lines).split()
    can_be_broken = [line for line in lines if len(line.split()) > 1]
    assert not [line for line in can_be_broken if len(line) > columns]
    assert {"context_length=8", "checkpoint_every=1;", "loss.svg,", f"{out}/step_000005;"} <= {
        *words
    }
    assert not {"grad_clip=1.0", "eval_every=50", "held"} & {*words}
    assert "●" in shown and "loss in nats per token, by step" in " ".join(words)
    assert ("%|" in shown) == (columns != 100)
    assert columns == 40 or shown.count("%|") <= shown.count("tokens/s]") + 1  # the first has none


def shown_on_a_terminal(columns: int, program: str, **environment: str) -> str:
    """What the program has written to a terminal so wide, as it came."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    ended = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm"} | environment,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    read: list[bytes] = []
    read_all(ours, read)
    os.close(ours)
    assert ended.wait() == 0, read
    return b"".join(read).decode()


PROGRAM = """
from rosetrainer.reporting.screen import ProgressBar, own_screen
with own_screen():
    print("word " * 30)
    bar = ProgressBar(9, 0)
    bar.update("loss 5.000, 7 tokens/s")
    print(bar.shows)
    bar.close()
    print("the end")
"""


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_breaks_no_word_and_keeps_the_bar_below(columns: int) -> None:
    shown = shown_on_a_terminal(columns, PROGRAM)
    *words, says_so, end = [line for line in shown.replace("\x1b[K", "").splitlines() if line]
    assert max(len(line) for line in words if "|" not in line) <= columns
    assert "".join(words).count("word") == 30
    assert (says_so.split("\r")[-1], end.split("\r")[-1]) == ("True", "the end")


def test_a_terminal_without_control_codes_gets_none() -> None:
    shown = shown_on_a_terminal(80, PROGRAM, TERM="dumb")
    assert "\x1b" not in shown and "False" in shown

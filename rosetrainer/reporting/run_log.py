"""What rank 0 logs during a run: to the terminal, log.jsonl and TensorBoard.

log.jsonl is the source: when a run is resumed, TensorBoard's events are written again from it. Its
viewers would show repeated steps of an appended file twice, or none if the clock was set back.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rosetrainer.durable_files import write_whole
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.reporting.loss_curve import LossCurves
from rosetrainer.reporting.screen import ProgressBar

LOG = "log.jsonl"
EVENTS = "events.out.tfevents.*"

SLOW_SAVE_SECONDS = 10.0
"""A checkpoint that blocks training for longer is reported on the screen."""


class RunLog:
    """A progress bar on a terminal, one line a step elsewhere; the same figures in both files."""

    def __init__(self, folder: Path, steps: int, reached: int = 0) -> None:
        """reached: steps that are done already; lines of later ones are removed from the log."""
        self._folder, self._steps = folder, steps
        cut_log(folder / LOG, reached)
        self._file = (folder / LOG).open("a", buffering=1)
        self._bar = ProgressBar(steps, reached)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """figures: by TensorBoard tag; `train/loss` and `perf/tokens_per_s` among them."""
        loss, speed = figures["train/loss"], figures["perf/tokens_per_s"]
        if self._bar.shows:
            self._bar.update(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        else:
            self.say(
                f"step {step:5d}/{self._steps}  loss {loss:.6f}  lr {figures['train/lr']:.2e}  "
                f"norm {figures['train/grad_norm']:.3f}  {speed:,.0f} tokens/s"
            )
        self._write(step, figures)

    def skipped(self, step: int, count: int, why: str) -> None:
        self._write(step, {"train/skipped": count})
        self.say(f"step {step:5d}/{self._steps}  skipped, {why}")

    def evaluation(self, step: int, figures: dict[str, float], remark: str) -> None:
        self._write(step, figures)
        bits = figures.get("val/bits_per_byte")
        unit = "" if bits is None else f" nats per token, {bits:.4f} bits per byte"
        self.say(f"step {step:5d}/{self._steps}  val loss {figures['val/loss']:.6f}{unit}{remark}")

    def checkpoint(self, step: int, blocked: float, seconds: float) -> None:
        """blocked: seconds for which training stood still; seconds: until it was on the disk."""
        self._write(step, {"perf/checkpoint_s": seconds, "perf/checkpoint_blocked_s": blocked})
        if blocked > SLOW_SAVE_SECONDS:
            self.say(
                f"step {step:5d}/{self._steps}  training blocked for {blocked:.0f} s by a "
                f"checkpoint; --async-checkpoint overlaps the two, --checkpoint-every saves "
                f"less often"
            )

    def curves(self) -> LossCurves:
        """Of the whole run, however often it was resumed."""
        return LossCurves.of(read_log(self._folder / LOG))

    def say(self, line: str) -> None:
        print(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        self._events.close()
        curves = self.curves()
        if curves.can_be_drawn:
            with contextlib.suppress(OSError):  # a full disk is reported elsewhere
                curves.write(self._folder)

    @cached_property
    def _events(self) -> Any:
        """Opened once the first line is on the screen: nobody waits for what that imports."""
        return events_of(self._folder)

    def _write(self, step: int, figures: dict[str, float]) -> None:
        rounded = {tag: _rounded(tag, value) for tag, value in figures.items()}
        line = {"step": step, "time": round(time.time(), 3), **rounded}
        events = self._events  # before the file has this line, for it begins with the file's
        self._file.write(json.dumps(line) + "\n")
        add_event(events, line)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log.jsonl but for a partial one, which a killed process may leave."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line


def cut_log(path: Path, reached: int) -> None:
    """Removes the lines after step `reached`, from which the run is resumed, and a partial one."""
    if path.exists():
        kept = (json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= reached)
        write_whole(path, lambda part: _write_lines(part, kept))


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with path.open("w") as file:
        file.writelines(lines)


def has_evaluation(path: Path, step: int) -> bool:
    """Whether the log has the evaluation of that step."""
    return any("val/loss" in line and line["step"] == step for line in read_log(path))


def events_of(folder: Path) -> Any:
    """A writer of TensorBoard's events, in a new file that holds what log.jsonl does."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from torch.utils.tensorboard import FileWriter

    old = list(folder.glob(EVENTS))
    events = FileWriter(str(folder), filename_suffix=f".{secrets.token_hex(4)}")
    # A TensorBoard that is running drops what it has read.
    events.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=0)
    for line in read_log(folder / LOG):
        add_event(events, line)
    events.flush()
    for path in old:
        path.unlink(missing_ok=True)
    return events


def add_event(events: Any, line: dict[str, Any]) -> None:
    """A line of the log, with its time."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    figures = {tag: value for tag, value in line.items() if "/" in tag}
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
    events.add_summary(Summary(value=values), line["step"], line.get("time"))


def last_evaluation(path: Path) -> int:
    """The last step of which a log has an evaluation, or 0."""
    return max((line["step"] for line in read_log(path) if "val/loss" in line), default=0)


def _rounded(tag: str, value: float) -> float:
    """Losses to six decimals, counts whole, the rest to six digits: a learning rate is small."""
    if tag.endswith("loss"):
        return round(value, 6)
    return int(value) if value == int(value) else float(f"{value:.6g}")


def traffic(context: ParallelContext) -> dict[str, float]:
    """Payload bytes since the last call, by axis and operation; empties the ledgers."""
    moved: dict[str, float] = {}
    for axis in context.axes:
        for (operation, _), entry in axis.ledger.entries.items():
            tag = f"comm/bytes_per_step/{axis.name}_{operation}"
            moved[tag] = moved.get(tag, 0) + entry.payload_bytes
        axis.ledger.clear()
    return moved

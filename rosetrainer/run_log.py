"""What a run says while it goes: the terminal, log.jsonl and TensorBoard. Rank 0 has one."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from rosetrainer.durable_files import write_whole
from rosetrainer.environment import gpu_remark
from rosetrainer.parallel_context import ParallelContext

LOG = "log.jsonl"


class RunLog:
    """A progress bar on a terminal, one line a step elsewhere; the same figures in both files."""

    def __init__(self, folder: Path, steps: int, reached: int = 0) -> None:
        """reached: steps that are done already; what the log says of later ones is taken back."""
        # Late, for its import is not needed to show a user's mistake.
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder), purge_step=reached + 1)
        cut_log(folder / LOG, reached)
        self._file = (folder / LOG).open("a", buffering=1)
        self._steps = steps
        silent = not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=reached, unit="step", disable=silent, leave=False)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """figures: by TensorBoard tag; `train/loss` and `perf/tokens_per_s` among them."""
        self._write(step, figures)
        loss, speed = figures["train/loss"], figures["perf/tokens_per_s"]
        if self._bar.disable:
            print(
                f"step {step:5d}/{self._steps}  loss {loss:.6f}  lr {figures['train/lr']:.2e}  "
                f"norm {figures['train/grad_norm']:.3f}  {speed:,.0f} tokens/s",
                flush=True,
            )
        else:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def skipped(self, step: int, count: int, why: str) -> None:
        self._write(step, {"train/skipped": count})
        self.say(f"step {step:5d}/{self._steps}  skipped, {why}")

    def evaluation(self, step: int, figures: dict[str, float], remark: str) -> None:
        self._write(step, figures)
        self.say(f"step {step:5d}/{self._steps}  val loss {figures['val/loss']:.6f}{remark}")

    def say(self, line: str) -> None:
        with tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        self._events.close()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        rounded = {tag: _rounded(tag, value) for tag, value in figures.items()}
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        for tag, value in figures.items():
            self._events.add_scalar(tag, value, step)


def cut_log(path: Path, reached: int) -> None:
    """Keeps what a log says of steps up to `reached`, but for that step's evaluation.

    A run that goes on from there says the rest again. A last line may be torn.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            figures = json.loads(line)
            step, evaluation = figures["step"], "val/loss" in figures
            if step + evaluation <= reached:
                kept.append(line)
    write_whole(path, lambda part: part.write_text("".join(kept)))


def last_evaluation(path: Path) -> int:
    """The last step of which a log has an evaluation; 0 if there is none."""
    last = 0
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                figures = json.loads(line)
                last = int(figures["step"]) if "val/loss" in figures else last
    return last


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


def describe(context: ParallelContext, dtype: torch.dtype, wanted: str) -> str:
    """One line: what the ranks are and what they run on."""
    where = "CUDA with nccl" if context.device.type == "cuda" else "CPU with gloo"
    if context.world_size == 1:
        where = context.device.type.upper()
    if remark := gpu_remark(context.device, wanted):
        where += f" ({remark})"
    threads = torch.get_num_threads()
    ranks = f"{context.world_size} rank{'s' if context.world_size > 1 else ''}"
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    return (
        f"{ranks}: tensor parallel {context.tp.size} x data parallel {context.dp.size}, "
        f"on {where}, {each}, {str(dtype).removeprefix('torch.')}"
    )

"""Measures the curves of the pages: python steps/plots.py [NN ...]

It trains with a step's own code and keeps the losses in NN_name/plot.json; `steps.py readme` draws
plot.svg from them. The last decimals depend on the machine, so runs are made when asked for.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ladder import StepError, find, python_files
from pictures.album import write_pictures
from tries import capture, command

STEPS_OF_A_RUN = 200
SCRIPT = """
import json, sys
import torch, train
from config import GPTConfig
from data import MarkovCorpus

out, steps, dtype, ranks = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
corpus = MarkovCorpus()
given, first = [GPTConfig(vocab_size=corpus.alphabet), corpus, steps], True
if ranks != "0":
    import parallel_context
    context = parallel_context.init_tensor_parallel(device="cpu")
    given, first = [*given, context, dtype], context.rank == 0
losses = train.train(*given)[:-1]
if first:
    with open(out, "w") as file:
        json.dump({"floor": corpus.floor, "losses": losses}, file)
if ranks != "0":
    parallel_context.end_parallel()
"""


@dataclass(frozen=True)
class Run:
    """A training of a step's code on some ranks (0: it has none), with a line replaced."""

    name: str
    step: str
    ranks: int = 0
    dtype: str = "float32"
    file: str = ""
    old: str = ""
    new: str = ""


F = "        x = copy_to_tensor_parallel_region(x, self.tp)"
PLOTS = {
    "02": (
        Run("y = w[1:]", "02"),
        Run("y = w[:-1]", "02", 0, "float32", "data.py", "window[:, 1:]", "window[:, :-1]"),
    ),
    "04": (
        Run("1", "05", 1),
        Run("f on", "05", 2),
        Run("f off", "05", 2, "float32", "tensor_parallel.py", F, "        x = x"),
    ),
    "09": tuple(
        Run(f"{dtype} {ranks}", "09", ranks, dtype)
        for dtype in ("float32", "float64")
        for ranks in (1, 2)
    ),
}


def losses_of(run: Run) -> dict:
    """The loss of each step and the corpus's floor. Raises StepError where a run fails."""
    step = find(run.step)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in python_files(step):
            shutil.copy(step / name, folder / name)
        if run.file:
            source = (folder / run.file).read_text()
            if source.count(run.old) != 1:
                raise StepError(f"{step.name}/{run.file} has {source.count(run.old)} x {run.old!r}")
            (folder / run.file).write_text(source.replace(run.old, run.new))
        (folder / "measured.py").write_text(SCRIPT)
        start = command("measured.py", step, run.ranks)
        done = capture([*start, "out.json", str(STEPS_OF_A_RUN), run.dtype, str(run.ranks)], folder)
        if done.returncode:
            raise StepError(f"the run {run.name} of {step.name} failed: {done.stderr[-300:]}")
        return json.loads((folder / "out.json").read_text())


def measure(numbers: list[str]) -> None:
    """Runs what the plots of these steps (all of them if none is named) show, and draws them."""
    for number in numbers or list(PLOTS):
        if number not in PLOTS:
            raise StepError(f"step {number} has no plot; it can be {', '.join(PLOTS)}")
        measured = {run.name: losses_of(run) for run in PLOTS[number]}
        step = find(number)
        digits = {run.name: 16 if run.dtype == "float64" else 9 for run in PLOTS[number]}
        kept = {n: [round(x, digits[n]) for x in run["losses"]] for n, run in measured.items()}
        floor = next(iter(measured.values()))["floor"]
        (step / "plot.json").write_text(json.dumps({"floor": round(floor, 6), "losses": kept}))
        write_pictures([step])
        print(f"{step.name}/plot.svg: {', '.join(kept)}")


if __name__ == "__main__":
    try:
        measure(sys.argv[1:])
    except StepError as error:
        sys.exit(f"error: {error}")

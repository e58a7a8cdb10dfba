"""Measures the curves of the pages: python steps/plots.py [NN ...]

It trains with a step's own code and keeps the losses in NN_name/plot.json and pair.json, and when
its ranks wait in timeline.json; `steps.py readme` draws plot.svg, pair.svg and timeline.svg from
them. The last decimals and all times depend on the machine, so runs are made when asked for.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from curves import PAIRS, PLOTS, Run
from ladder import StepError, find, python_files
from pictures.album import write_pictures
from timelines import TIMELINES, measured
from tries import capture, command

STEPS_OF_A_RUN = 200
SCRIPT = """
import json, sys
import torch, train
from config import GPTConfig
from data import MarkovCorpus

out, steps, dtype, ranks = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
corpus = MarkovCorpus()
given, first = [GPTConfig(vocab_size=corpus.alphabetCONFIG), corpus, steps], True
if ranks != "0":
    import parallel_context
    from environment import world_from_environment
    context = parallel_context.START
    given, first = [*given, context, dtype], world_from_environment()[0] == 0
losses = train.train(*given)[:-1]
if first:
    with open(out, "w") as file:
        json.dump({"floor": corpus.floor, "losses": losses}, file)
if ranks != "0":
    parallel_context.end_parallel()
"""


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
        script = SCRIPT.replace("CONFIG", run.config).replace("START", run.start)
        (folder / "measured.py").write_text(script)
        start = command("measured.py", step, run.ranks)
        done = capture([*start, "out.json", str(STEPS_OF_A_RUN), run.dtype, str(run.ranks)], folder)
        if done.returncode:
            raise StepError(f"the run {run.name} of {step.name} failed: {done.stderr[-300:]}")
        return json.loads((folder / "out.json").read_text())


def measure(numbers: list[str]) -> None:
    """Runs what the plots of these steps (all of them if none is named) show, and draws them."""
    known = sorted(PLOTS.keys() | PAIRS.keys() | TIMELINES.keys())
    for number in numbers or known:
        if number not in known:
            raise StepError(f"step {number} has no plot; it can be {', '.join(known)}")
        step = find(number)
        for name, runs in (("plot.json", PLOTS.get(number)), ("pair.json", both(number))):
            if runs:
                keep(step / name, runs)
        if number in TIMELINES:
            (step / "timeline.json").write_text(json.dumps(measured(number)) + "\n")
            print(f"{step.name}/timeline.svg: {', '.join(TIMELINES[number].variants)}")
        write_pictures([step])


def both(number: str) -> tuple[Run, ...]:
    """Of a pair: A is the step as it is, B with the line that looks right."""
    pair = PAIRS.get(number)
    return (replace(pair, name="A", file=""), pair) if pair else ()


def keep(path: Path, runs: tuple[Run, ...]) -> None:
    measured = {run.name: losses_of(run) for run in runs}
    digits = {run.name: 16 if run.dtype == "float64" else 9 for run in runs}
    kept = {n: [round(x, digits[n]) for x in run["losses"]] for n, run in measured.items()}
    floor = next(iter(measured.values()))["floor"]
    path.write_text(json.dumps({"floor": round(floor, 6), "losses": kept}))
    print(f"{path.parent.name}/{path.stem}.svg: {', '.join(kept)}")


if __name__ == "__main__":
    try:
        measure(sys.argv[1:])
    except StepError as error:
        sys.exit(f"error: {error}")

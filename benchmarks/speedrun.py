"""nanoGPT's laptop demo against `train --preset speedrun`: seconds to the last update, and losses.

make speedrun

The plain side is timed from its first update to its 2000th, ours from the start of the command, its
imports included, to its last update. Both then see all of the validation text, in windows of 64.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.side_by_side import Figures, Side, in_turn, introduce, keep, median, ratio_of
from rosetrainer.commands.flags import parse_flags
from rosetrainer.commands.train import parse_command
from rosetrainer.environment import prepare_command
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.rank import run_rank
from rosetrainer.validation import ConfigError, Count, CountOrZero

PLAIN, OURS = "nanoGPT's recipe", "speedrun"
TIMES = {torch.bfloat16: 25.0, torch.float32: 18.0}
"""As fast, by what `train` multiplies in on this machine."""
LOSS = 1.88


@dataclass(frozen=True)
class Speedrun:
    """Compares the recipe with the preset, in turn, each round with seeds of its own."""

    corpus: Path = Path("data/shakespeare-chars")
    """What `prepare` made of tiny-shakespeare with --tokenizer chars."""
    rounds: Count = 5
    first_seed: CountOrZero = 101
    """Of the first round; seeds below 100 were used in tuning."""


@dataclass
class SeededSide:
    """A fresh process each round, with the next seed as its last argument."""

    name: str
    arguments: list[str]
    seed: int

    def run(self) -> Figures:
        words, self.seed = [*self.arguments, str(self.seed)], self.seed + 1
        return Side(self.name, words, {"OMP_NUM_THREADS": str(os.cpu_count())}).run()


def ours(corpus: Path, seed: int) -> dict[str, float]:
    """One run of the command: seconds from its start to its last update, and its loss then."""
    steps = parse_command(["--preset", "speedrun"]).config.run.steps
    last = f"step {steps:5d}/{steps}  loss"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "rosetrainer", "train", "--preset", "speedrun"]
        command += ["--data", str(corpus), "--out", str(out), "--seed", str(seed)]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        seconds = 0.0
        for line in process.stdout:
            if line.startswith(last):
                seconds = time.perf_counter() - started
        if process.wait() or not seconds:
            sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"seconds": seconds, "updates": steps, "loss": log[-1]["val/loss"], "seed": seed}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--round"]:
        print(json.dumps(ours(Path(argv[1]), int(argv[2]))))
        return 0
    bench = parse_flags(Speedrun, argv, "python benchmarks/speedrun.py")
    if not (bench.corpus / "meta.json").exists():
        raise ConfigError(
            f"{bench.corpus} holds no corpus; make it: {prepare_command()} shakespeare "
            f"--tokenizer chars --out {bench.corpus}"
        )
    recipe, corpus = str(Path(__file__).resolve().parent / "baseline_recipe.py"), str(bench.corpus)
    sides = [
        SeededSide(PLAIN, [recipe, corpus, "2000"], bench.first_seed),
        SeededSide(OURS, [__file__, "--round", corpus], bench.first_seed),
    ]
    introduce("one process with all cores on both sides")
    # All seeds belong to the claim, however long they take.
    found = in_turn(sides, bench.rounds, {"speedrun": (PLAIN, OURS)}, longest=math.inf)
    for side, rounds in found.items():
        losses = ", ".join(f"{figures['loss']:.4f}" for figures in rounds)
        print(f"  {side:18} {median(found, side, 'seconds'):7.2f} s  val loss {losses}")
    ratio, times = ratio_of(found, PLAIN, OURS), TIMES[choose_dtype("auto", torch.device("cpu"))]
    worst = max(figures["loss"] for figures in found[OURS])
    keep("speedrun", ratio, times, found, worst_loss=worst, wanted_loss=LOSS)
    print(f"worst loss {worst:.4f}, wanted {LOSS} or lower: {'yes' if worst <= LOSS else 'NO'}")
    return 0 if ratio >= times and worst <= LOSS else 1


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))

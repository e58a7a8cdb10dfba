"""What `make train` shows: data, proof, training, a sample, and what to do next."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rosetrainer.environment import python_command
from rosetrainer.fields import Count, check_fields
from rosetrainer.flags import parse_flags

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["data", "proof", "training", "sample"]  # the first of the five is the installation
# Wide rather than deep: there are few all-reduces, and the ranks of a CPU wait in each.
MODEL = ["--n-layers", "2", "--n-heads", "4", "--d-model", "256", "--context-length", "64"]


@dataclass(frozen=True)
class TourCommand:
    """Runs the five stages one after the other."""

    steps: Count = 1500
    """Updates of the training stage."""


def main(argv: list[str]) -> int:
    """The command. Stops with the exit status of the first stage that fails."""
    command = parse_flags(TourCommand, argv, "python -m rosetrainer tour")
    check_fields(command)
    layout = ["--nproc", "2", "--tp-size", "2"]
    schedule = ["--steps", str(command.steps), "--eval-every", str(max(command.steps // 5, 1))]
    stages = [
        ["-m", "rosetrainer", "prepare", "python-docs"],
        ["-m", "rosetrainer", "parity", *layout, *MODEL],
        ["-m", "rosetrainer", "train", *layout, *MODEL, *schedule],
        ["-m", "rosetrainer", "generate", "--prompt", "The ", "--tokens", "300"],
    ]
    for number, (name, stage) in enumerate(zip(STAGES, stages, strict=True), 2):
        print(f"[{number}/5] {name}: {python_command()} {shlex.join(stage)}\n", flush=True)
        started = time.monotonic()
        try:
            status = subprocess.run([sys.executable, *stage], cwd=ROOT, check=False).returncode
        except KeyboardInterrupt:
            return 130  # the stage has had the same Ctrl-C, and has said so
        if status:
            return status
        print(f"[{number}/5] took {time.monotonic() - started:.0f} s\n", flush=True)
    print(what_next())
    return 0


def what_next() -> str:
    python = python_command()
    model = " ".join(MODEL)
    return f"""What next:
  more text            {python} -m rosetrainer generate --prompt "If " --tokens 500
  the curves           {python} -m tensorboard.main --logdir out
  your own text        {python} -m rosetrainer prepare file README.md GLOSSARY.md --out data/mine
                       {python} -m rosetrainer train --nproc 2 --data data/mine {model}
  how it is built      less steps/README.md"""

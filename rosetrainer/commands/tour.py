"""What `make train` shows: data, proof, training, a sample, and what to do next."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rosetrainer.commands.flags import parse_flags
from rosetrainer.environment import python_command, trainer_command
from rosetrainer.validation import Count

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
    layout = ["--nproc", "2", "--tp-size", "2"]
    schedule = ["--steps", str(command.steps), "--eval-every", str(max(command.steps // 5, 1))]
    stages = [
        ["prepare", "python-docs"],
        ["parity", *layout, *MODEL],
        ["train", *layout, *MODEL, *schedule],
        ["generate", "--prompt", "The ", "--tokens", "300"],
    ]
    for number, (name, stage) in enumerate(zip(STAGES, stages, strict=True), 2):
        print(f"[{number}/5] {name}: {trainer_command()} {shlex.join(stage)}\n", flush=True)
        started = time.monotonic()
        try:
            words = [sys.executable, "-m", "rosetrainer", *stage]
            status = subprocess.run(words, check=False).returncode
        except KeyboardInterrupt:
            return 130  # the stage has had the same Ctrl-C, and has said so
        if status:
            return status
        print(f"[{number}/5] took {time.monotonic() - started:.0f} s\n", flush=True)
    print(what_next())
    return 0


def what_next() -> str:
    trainer, model = trainer_command(), " ".join(MODEL)
    is_checkout = Path("steps/README.md").exists()
    text = "README.md GLOSSARY.md" if is_checkout else "PATH"
    reading = "\n  how it is built      less steps/README.md" if is_checkout else ""
    return f"""What next:
  more text            {trainer} generate --prompt "If " --tokens 500
  the curves           {python_command()} -m tensorboard.main --logdir out
  your own text        {trainer} prepare file {text} --out data/mine
                       {trainer} train --nproc 2 --data data/mine {model}{reading}"""

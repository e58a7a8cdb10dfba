"""rosetrainer, or python -m rosetrainer: prepare, train and the other commands with their flags."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from rosetrainer.environment import trainer_command
from rosetrainer.launch.rank import STOP, run_rank
from rosetrainer.validation import ConfigError

COMMANDS = {
    "train": "train a GPT, on one rank or many",
    "generate": "write text with a trained model",
    "checkpoint": "list, verify or export what a training run has saved",
    "convert": "make a run of a Hugging Face checkpoint, or a checkpoint of theirs of a run",
    "parity": "show who holds what, and prove that a layout equals one process",
    "plan": "predict what a layout moves and holds, without starting any process",
    "prepare": "make a corpus, of your own text say",
    "tour": "data, proof, a training run of about three minutes, a sample",
}


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {trainer_command()} COMMAND [flags]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        print(f"\n{trainer_command()} COMMAND --help shows a command's flags")
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[0]}; it can be {', '.join(COMMANDS)}")
    status = import_module(f"rosetrainer.commands.{argv[0]}").main(argv[1:])
    return status if isinstance(status, int) else None


def start(argv: list[str]) -> NoReturn:
    """The process's whole life."""
    if argv[:1] == ["train"]:
        STOP.listen()  # before torch's seconds of importing: a signal must not get lost there
    run_rank(lambda: main(argv))


def run_command() -> NoReturn:
    """What the command `rosetrainer` and `python -m rosetrainer` run."""
    start(sys.argv[1:])


if __name__ == "__main__":
    run_command()

"""python -m rosetrainer train|generate|parity|plan|tour [flags]"""

from __future__ import annotations

import sys
from importlib import import_module

from rosetrainer.fields import ConfigError
from rosetrainer.rank import run_rank

COMMANDS = {
    "train": "train a GPT, on one rank or many",
    "generate": "write text with a trained model",
    "parity": "show who holds what, and prove that a layout equals one process",
    "plan": "predict what a layout moves and holds, without starting any process",
    "tour": "data, proof, a training run of about three minutes, a sample",
}


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m rosetrainer COMMAND [flags]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\npython -m rosetrainer COMMAND --help shows a command's flags")
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[0]}; it can be {', '.join(COMMANDS)}")
    status = import_module(f"rosetrainer.{argv[0]}").main(argv[1:])
    return status if isinstance(status, int) else None


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))

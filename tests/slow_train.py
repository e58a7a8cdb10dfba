"""rosetrainer, but the ranks' fourth step ends when the test lets it: `slow_train FOLDER train ...`

In FOLDER `begun` appears when it has begun, and the test makes `end`. It then took a save, as far
as the ranks know, 1000 seconds.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import rosetrainer.launch.launcher
from rosetrainer.__main__ import start
from rosetrainer.launch.rank import STOP

FOLDER = "SLOW_TRAIN"


def wait_in_the_fourth_step(folder: Path) -> None:
    from rosetrainer.training import trainer

    original = trainer.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] == 3:
            STOP.save_seconds = 1000.0
            (folder / "begun").touch()
            while not (folder / "end").exists():
                time.sleep(0.005)
        return original(*arguments)

    vars(trainer)["train_step"] = train_step


if __name__ == "__main__":
    if "RANK" in os.environ:
        wait_in_the_fourth_step(Path(os.environ[FOLDER]))
        start(sys.argv[1:])
    os.environ[FOLDER] = sys.argv[1]
    launch = partial(rosetrainer.launch.launcher.launch, module="slow_train")
    vars(rosetrainer.launch.launcher)["launch"] = launch
    start(sys.argv[2:])

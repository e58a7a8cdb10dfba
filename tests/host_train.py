"""rosetrainer, but the ranks of this host are another in one thing: `host_train WHAT train ...`

clock: what Python reads is a day ahead; the kernel's clock, which is one for all hosts of a test,
stays. version: the source is another one. save: the rank that writes its first part of a checkpoint
says so in the file HOST_TRAIN_MARK, and goes no further.
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

WHAT = "HOST_TRAIN"


def a_day_ahead() -> None:
    now = time.time
    vars(time)["time"] = lambda: now() + 24 * 3600


def of_another_version() -> None:
    from rosetrainer.training import agreement

    vars(agreement)["source_version"] = lambda: "another"


def stay_in_the_first_save() -> None:
    from rosetrainer.checkpoint import slices

    def stay(*_: Any) -> None:
        Path(os.environ["HOST_TRAIN_MARK"]).touch()
        while True:
            time.sleep(60)

    vars(slices)["save_file"] = stay


CHANGES = {"clock": a_day_ahead, "version": of_another_version, "save": stay_in_the_first_save}


if __name__ == "__main__":
    if "RANK" in os.environ:
        CHANGES[os.environ[WHAT]]()
        start(sys.argv[1:])
    os.environ[WHAT] = sys.argv[1]
    launch = partial(rosetrainer.launch.launcher.launch, module="host_train")
    vars(rosetrainer.launch.launcher)["launch"] = launch
    start(sys.argv[2:])

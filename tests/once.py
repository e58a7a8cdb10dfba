"""What several tests need is made once, though many workers run them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

Once = Callable[[str, Callable[[Path], Any]], Any]
"""once(name, make): what make(an empty folder) gives; the type of the fixture of this name."""


def make_once(shared: Path, name: str, make: Callable[[Path], Any]) -> Any:
    """What make gives, which the first to ask makes; shared: the folder of all who ask."""
    folder, result = shared / f"once_{name}", shared / f"once_{name}.pickle"
    with FileLock(f"{folder}.lock"):
        if not result.exists():
            folder.mkdir(exist_ok=True)
            result.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(result.read_bytes())

"""Makes a corpus, out of a checkout that need not be installed: python data/prepare.py --help

The same as `python -m rosetrainer prepare`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rosetrainer.commands.prepare import main
from rosetrainer.launch.rank import run_rank

if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))

"""What a picture takes from its step: numbers out of the Python files and the page."""

from __future__ import annotations

import re
from functools import cache

from ladder import StepError, find


@cache
def text_of(number: str, file: str) -> str:
    return (find(number) / file).read_text()


def value(number: str, file: str, name: str) -> float:
    """The number behind the first `name = 1`, `name: int = 1` or `name=1` of a step's file.

    Raises StepError if there is none.
    """
    pattern = rf"\b{re.escape(name)}(?:: \w+)? ?= ?(-?[\d.]+)"
    return float(found(number, file, pattern))


def whole_number(number: str, file: str, name: str) -> int:
    return int(value(number, file, name))


def found(number: str, file: str, pattern: str) -> str:
    """The first group of the first match. Raises StepError if there is none."""
    match = re.search(pattern, text_of(number, file), re.MULTILINE)
    if match is None:
        raise StepError(f"the picture of step {number} finds no {pattern} in {file}")
    return match[1]

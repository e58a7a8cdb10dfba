"""What is learned from a corpus where it is not the next token, by the architecture."""

from __future__ import annotations

from collections.abc import Callable

from rosetrainer.config import GPTConfig
from rosetrainer.data.batches import Corpus

Objective = Callable[[Corpus, GPTConfig, bool], tuple[GPTConfig, Corpus]]
"""The model and corpus of the objective, out of those of the next token; the last argument: whether
it is a checkpoint's model, which has its vocabulary."""


def objective_of(architecture: str) -> Objective | None:
    """None for the next token. Imports the one that is used: imports are time to the first step."""
    if architecture == "bert":
        from rosetrainer.data.masked_tokens import hide_tokens

        return hide_tokens
    if architecture == "t5":
        from rosetrainer.data.span_corruption import corrupt_spans

        return corrupt_spans
    if architecture == "glm":
        from rosetrainer.data.blank_infilling import fill_blanks

        return fill_blanks
    return None

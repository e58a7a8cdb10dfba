"""Predicts what a layout moves and holds, without starting a process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rosetrainer.commands.train import TrainCommand, parse_train_flags
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.span_corruption import SENTINELS
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.planner.report import describe
from rosetrainer.validation import ConfigError, Count

SPECIAL = {"bert": 1, "glm": 3, "t5": 2 + SENTINELS}
"""Ids that an architecture has behind those of its corpus."""
MOST_LOGITS = 2**42  # of a micro-batch: they are counted chunk by chunk


@dataclass(frozen=True)
class PlanCommand(TrainCommand):
    """Predicts a step's communication and a rank's memory, by train's flags; starts no process."""

    vocabulary: Count | None = None
    """Number of token ids; the corpus's unless given."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake."""
    command = parse_train_flags(PlanCommand, argv, "plan")
    config, parallel = command.config, command.config.parallel
    tp_size, dp_size, pp_size = parallel.tp_size or 1, parallel.dp_size or 1, parallel.pp_size
    hosts = len(command.hosts.split(",")) if command.hosts else 1
    if command.nproc or command.hosts:
        tp_size, dp_size = parallel.resolve((command.nproc or 1) * hosts)
    parallel = replace(parallel, tp_size=tp_size, dp_size=dp_size)
    given = config.model.vocab_size if config.run.init_from else None
    vocabulary = command.vocabulary or given or corpus_vocabulary(config)
    config = replace(config.with_settings(vocab_size=vocabulary), parallel=parallel)
    config.check(tp_size * dp_size * pp_size)
    rows = config.optim.micro_batch(dp_size)
    logits = rows * config.model.context_length * vocabulary
    if logits > MOST_LOGITS:
        raise ConfigError(
            f"{rows} sequences x context_length={config.model.context_length} x {vocabulary} ids "
            f"are {logits:.1e} logits in a forward pass, at most {MOST_LOGITS:.1e} can be planned; "
            f"try a smaller micro_batch_size or context_length"
        )
    dtype = choose_dtype(config.precision.dtype, torch.device("cpu"))
    print(describe(config, dtype))
    return 0


def corpus_vocabulary(config: TrainConfig) -> int:
    try:
        corpus = open_corpus(config.run.data, config.model.context_length)
        return corpus.meta.vocab_size + SPECIAL.get(config.model.architecture, 0)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --vocabulary") from None

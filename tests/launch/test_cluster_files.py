"""The files for schedulers: their flags are ours, their fields those of the published schema."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from rosetrainer.commands.train import parse_command
from rosetrainer.config import ParallelConfig

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def trainjob() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())
    return loaded


def test_the_flags_are_train_s() -> None:
    (srun,) = (
        line for line in (CLUSTER / "slurm.sh").read_text().splitlines() if line.startswith("exec")
    )
    words = shlex.split(srun)
    flags = words[words.index("train") + 1 : -1]
    assert words[-1] == "$@"
    assert parse_command(flags).config.parallel == ParallelConfig(tp_size=2)
    trainer = trainjob()["spec"]["trainer"]
    assert trainer["args"][:3] == ["-m", "rosetrainer", "train"]
    parallel = parse_command(trainer["args"][3:]).config.parallel
    assert parallel.tp_size == trainer["numNodes"] * trainer["numProcPerNode"]


def test_every_field_of_the_job_is_in_the_published_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    given = trainjob()
    assert models.TrainerV1alpha1TrainJob.from_dict(given).to_dict() == given
    given["spec"]["trainer"]["numNode"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(given).to_dict() != given

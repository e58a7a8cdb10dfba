"""What a run is: the settings and the data that decide its numbers."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    checkpoints,
    read_manifest,
    step_of,
)
from rosetrainer.checkpoint.run_folder import read_config, same_place
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.hardware import measured
from rosetrainer.hardware.kernels import choose_kernels
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.reporting.run_log import LOG, last_evaluation
from rosetrainer.run_config import must_match_on_resume
from rosetrainer.validation import ConfigError

MUST_MATCH_ON_RESUME = {
    component: must_match_on_resume(type(getattr(TrainConfig(), component)))
    for component in must_match_on_resume(TrainConfig)
}
"""The settings that decide a run's numbers, by component; and the dtype that it resolved to."""


def settle(
    config: TrainConfig, resumed: tuple[str, str], device: torch.device
) -> tuple[TrainConfig, list[str]]:
    """The config with what its dtype and its kernels resolve to, and lines about that.

    resumed: came_to of the run that is resumed, which keeps it. The lines say why auto is what it
    is here, and where a new run's would be another.
    """
    own, on_cpu = config.precision, device.type == "cpu"
    here = str(choose_dtype(own.dtype, device)).removeprefix("torch.")
    dtype = resumed[0] if resumed[0] and own.dtype == "auto" else here
    choose = partial(choose_kernels, dtype=getattr(torch, dtype), device=device)
    fast = choose(own.kernels)
    kernels = choose(resumed[1]) if resumed[1] and own.kernels == "auto" else fast
    lines = []
    by_time = on_cpu and own.dtype == "auto" and dtype == here
    also = on_cpu and own.kernels == "auto" and kernels == fast and dtype == "float32"
    if by_time or also:
        lines.append(measured.machine().why(dtype * by_time, kernels * also))
    if dtype != here:
        line = f"dtype=auto is {here} here, but the run began in {dtype} and goes on in it"
        lines.append(line + ", which may be slower here" * (dtype == "bfloat16"))
    if kernels != fast:
        lines.append(
            f"kernels=auto is {fast} here, but the run began with {resumed[1]} and goes on with "
            f"{kernels}"
        )
    # A run that goes on with a CPU's kernels after a while on CUDA has none to keep.
    kept = kernels if on_cpu else None
    return config.with_settings(compute_dtype=dtype, compute_kernels=kept), lines


def came_to(saved: TrainConfig) -> tuple[str, str]:
    """What a run computes in and with; "" for what it has not written down."""
    return dtype_of(saved), saved.precision.compute_kernels or ""


def dtype_of(saved: TrainConfig) -> str:
    """In which a run computes; "" if it has not written that down."""
    dtype = saved.precision.dtype
    return saved.precision.compute_dtype or ("" if dtype == "auto" else dtype)


def differences(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """The settings that must match on resume and do not: "seed=1 and not 2", ...

    dtype=auto matches any: a resumed run keeps its dtype.
    """
    found = []
    for component, keys in MUST_MATCH_ON_RESUME.items():
        old, new = asdict(getattr(saved, component)), asdict(getattr(wanted, component))
        found += [f"{key}={new[key]} and not {old[key]}" for key in keys if old[key] != new[key]]
    dtype, saved_dtype = wanted.precision.dtype, dtype_of(saved)
    if dtype != "auto" and saved_dtype and dtype != saved_dtype:
        found.append(f"dtype={dtype} and not {saved_dtype}")
    return found


def check_same_run(where: Path, saved: TrainConfig, wanted: TrainConfig, instead: str) -> None:
    """Raises ConfigError unless they compute the same; a run may be given more steps.

    instead: what a user can do to keep the new settings.
    """
    found = [one for one in differences(saved, wanted) if not one.startswith("steps=")]
    if found:
        raise ConfigError(
            f"this run has {', '.join(found)} like {where}; give the same flags to go on with that "
            f"one, or {instead}"
        )


def check_data(where: Path, saved: dict[str, Any], corpus: Corpus, instead: str) -> None:
    """Raises ConfigError unless the corpus is the one that `saved`, of a meta.json, describes."""
    for name, digest in saved["sha256"].items():
        if corpus.meta.sha256.get(name) != digest:
            raise ConfigError(
                f"{corpus.folder / name} is not what {where} was trained on; give the same corpus, "
                f"or {instead}"
            )
    for key in ("tokenizer", "characters"):
        if key in saved and saved[key] != getattr(corpus.meta, key):
            raise ConfigError(
                f"{corpus.folder / 'meta.json'} has another {key} than {where}; give the same "
                f"corpus, or {instead}"
            )


def check_fits(
    where: Path, manifest: Manifest, config: TrainConfig, corpus: Corpus, instead: str
) -> None:
    """Raises ConfigError if the run cannot go on from there with this corpus and so few steps."""
    if manifest.progress.step > config.run.steps:
        raise ConfigError(
            f"steps={config.run.steps} is less than the {manifest.progress.step} of {where}; give "
            f"more steps, or {instead}"
        )
    check_data(where, {"sha256": manifest.progress.data}, corpus, instead)


def newest_readable(candidates: list[Path]) -> tuple[Path, Manifest] | None:
    """The first whose manifest can be read; its other files are not."""
    for candidate in candidates:
        try:
            return candidate, read_manifest(candidate)
        except CheckpointError:
            continue  # newest_sound reports it
    return None


def has_ended(folder: Path, steps: int) -> bool:
    """Whether the run has finished its last step, with the evaluation and the checkpoint.

    The log shows it even where all checkpoints are gone.
    """
    found = checkpoints(folder)
    reached = step_of(found[0]) if found else steps
    return reached >= steps and last_evaluation(folder / LOG) >= steps


def was_resumed_from(out: Path, path: Path) -> bool:
    """Whether --resume of this very path started the run there, or resumed it last."""
    try:
        resumed = read_config(out).checkpoint.resume
    except ConfigError:
        return False
    return resumed == str(path) or same_place(Path(resumed), path)

"""The weights of a checkpoint as one safetensors file, whole, in whatever layout it was written."""

from __future__ import annotations

from pathlib import Path

import torch

from rosetrainer.checkpoint.manifest import CheckpointError, Manifest
from rosetrainer.checkpoint.safetensors_file import Entry, write_safetensors
from rosetrainer.checkpoint.saver import read_whole
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, shard_spec
from rosetrainer.validation import ConfigError

DTYPES = ("float32", "float64")
"""What parameters can be."""


def whole_layers(folder: Path, manifest: Manifest) -> dict[str, ShardSpec]:
    """The parameters of the model by name. Raises CheckpointError if they are not all there."""
    shapes_only = ParallelContext(device=torch.device("meta"))
    model = build_model(manifest.progress.config.model, shapes_only)
    layers = {name: shard_spec(parameter) for name, parameter in model.named_parameters()}
    for name, spec in layers.items():
        saved = manifest.tensors.get(name)
        if saved is None or saved.shape != spec.shape or saved.dtype not in DTYPES:
            raise CheckpointError(f"{folder} does not hold {name} as its own config describes it")
    return layers


def write_weights(
    path: Path, folder: Path, manifest: Manifest, layers: dict[str, ShardSpec]
) -> None:
    """A safetensors file of the whole parameters, shaped as nn.Linear would hold them.

    Raises CheckpointError if the checkpoint does not hold what its manifest says.
    """
    entries = [
        Entry(name, spec.dense_shape, getattr(torch, manifest.tensors[name].dtype))
        for name, spec in layers.items()
    ]
    whole = (
        read_whole(folder, manifest, name).reshape(spec.dense_shape)
        for name, spec in layers.items()
    )
    try:
        write_safetensors(path, entries, whole, {"step": str(manifest.progress.step)})
    except (ConfigError, RuntimeError) as error:  # the latter of a shape with other numbers
        raise CheckpointError(f"{folder} does not hold what its manifest says: {error}") from None

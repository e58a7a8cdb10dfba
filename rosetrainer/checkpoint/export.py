"""The weights of a checkpoint as one safetensors file, whole, in whatever layout it was written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from rosetrainer.checkpoint.manifest import CheckpointError, Manifest
from rosetrainer.checkpoint.saver import read_whole
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, shard_spec

DTYPES = {"float32": "F32", "float64": "F64"}
"""torch's names of what parameters can be, and those of safetensors."""


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

    The library would want all of them at once; this holds one at a time. The format: the header's
    length in 8 bytes, the header in JSON, then the tensors in its order.
    """
    header: dict[str, object] = {"__metadata__": {"step": str(manifest.progress.step)}}
    end = 0
    for name, spec in layers.items():
        kind = manifest.tensors[name].dtype
        start, end = end, end + math.prod(spec.dense_shape) * getattr(torch, kind).itemsize
        shape = list(spec.dense_shape)
        header[name] = {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in layers:
            file.write(read_whole(folder, manifest, name).contiguous().numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise CheckpointError(f"{folder} does not hold what its manifest says")

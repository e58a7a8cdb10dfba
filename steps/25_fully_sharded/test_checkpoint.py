"""A run that was saved and loaded against one that was not: bitwise, and in every other layout.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_checkpoint.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
import train as trainer
from checkpoint import find_start, meet, read_manifest
from config import ConfigError, GPTConfig, ParallelConfig
from environment import run, say
from non_finite import NonFiniteGradientError
from oracle import TOLERANCE, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel, init_tensor_parallel
from safetensors.torch import load_file

from data import MarkovCorpus

# Of 139 ids four ranks hold 64, 64, 11 and 0 rows of the token table; the rest of them is pad.
CORPUS = MarkovCorpus(139, 2_000, 129)
CONFIG = GPTConfig(vocab_size=139, context_length=8, n_layers=1, d_model=16, dropout=0.1)
HALF, END = "step_000003", "step_000006"


def train(context: ParallelContext, out: Path, start: Path | None = None) -> list[float]:
    """The losses of six steps, or of those after `start`; saved after three and six.

    The second step is skipped, so AdamW's count of its updates is not the step.
    """
    verdicts = [None] * 3 if start else [None, NonFiniteGradientError("planted"), *[None] * 4]
    with mock.patch.object(trainer, "check_gradients", side_effect=verdicts):
        return trainer.train(CONFIG, CORPUS, 6, context, torch.float64, 1.0, 1, 3, out, start)


def wholes(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor, by other code than load's; the files hold each number once, no pad."""
    manifest = read_manifest(folder)
    files = {file: load_file(folder / file) for file in manifest["files"]}
    whole = {}
    for name, tensor in manifest["tensors"].items():
        pieces = [files[file].pop(name) for file, _, _ in tensor["slices"]]
        whole[name] = torch.cat(pieces, tensor["whole"]["dim"])
        assert list(whole[name].shape) == tensor["whole"]["shape"], name
    assert not any(files.values()), "a file holds what the manifest does not name"
    return whole


def check_layouts(layouts: dict[Path, ParallelContext]) -> None:
    """Each goes on from each one's checkpoint; from its own bitwise, down to the files."""
    runs = {folder: train(context, folder) for folder, context in layouts.items()}
    alone, *_ = layouts
    for number, source in enumerate(layouts):
        for target, context in layouts.items():
            losses = train(context, again := target / str(number), source / HALF)
            worst = worst_difference(wholes(again / END), wholes(alone / END))
            say(f"{source.name} -> {target.name}: max diff vs alone: {worst:.1e}")
            torch.testing.assert_close(losses, runs[alone][3:], rtol=TOLERANCE, atol=0)
            if source == target:
                assert losses == runs[target][3:], "losses differ"
                assert read_manifest(again / END) == read_manifest(target / END), "files differ"


def check_damage(folder: Path, scratch: Path) -> None:
    """One bit, in each of the files."""
    for path in sorted(folder.iterdir()):
        broken = shutil.copytree(folder, scratch / path.name) / path.name
        content = path.read_bytes()
        broken.write_bytes(content[:-99] + bytes([content[-99] ^ 1]) + content[-98:])
        try:
            read_manifest(broken.parent)
            raise AssertionError(f"a flipped bit of {path.name} is not seen")
        except ConfigError as error:
            assert str(error).startswith(f"{broken} is damaged: "), error


def main() -> None:
    context = init_tensor_parallel()
    say(f"world_size: {context.world_size}")
    with tempfile.TemporaryDirectory() as name:
        own, out = Path(name), Path(bytes(meet(context, *name.encode())[0]).decode())
        degrees = [n for n in (1, 2, 4) if context.world_size % n == 0]
        layouts = {out / f"tp{n}": init_parallel(ParallelConfig(n)) for n in degrees}
        check_layouts({own / "alone": ParallelContext(device=context.device), **layouts})
        with mock.patch.object(Path, "rename"):  # killed when only that is left to do
            train(context, out / "killed")
        find_start(out / "killed", False, 3)  # raises if it takes that for a checkpoint
        check_damage(out / "tp1" / END, own)
        meet(context, 0)
    end_parallel()


if __name__ == "__main__":
    run(main)

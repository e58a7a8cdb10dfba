"""Every damaged byte is named, and nothing that a file says is run or followed."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.harness import FLAGS, Outcome, contents, launch, run, state

from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    checkpoints,
    read_manifest,
    with_own_hash,
)
from rosetrainer.training import trained
from rosetrainer.training.agreement import world_axis
from rosetrainer.validation import ConfigError

TRIALS = 200
COMMAND = [*FLAGS, "--tp-size", "2"]


@pytest.fixture(scope="module")
def finished(markov: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("damage") / "run"
    outcome = run(2, [*COMMAND, "--data", str(markov), "--out", str(out)])
    assert outcome.statuses == [0, 0], outcome.complained
    assert [folder.name for folder in checkpoints(out)] == ["step_000008", "step_000006"]
    return out


def damage(folder: Path, number: int) -> str:
    """Does trial `number`'s harm to the checkpoint; the name of the file that it is about."""
    draw = random.Random(number)
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    kind = ("flip", "flip", "cut", "lose", "add")[number % 5]
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "lose":
        path.unlink()
    else:
        path = folder / draw.choice(["rank_00002.safetensors", ".hidden", "model.safetensors"])
        path.write_bytes(b"more")
    return path.name


def sound_one(run_folder: Path) -> str:
    """The checkpoint that a run would go on from; on one rank, where no launch is needed."""
    import torch

    found = trained.newest_sound(checkpoints(run_folder), False, world_axis(), torch.device("cpu"))
    return found[0].name if found else "none"


def test_a_checkpoint_of_another_version_is_not_taken_for_damaged(
    finished: Path, markov: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in checkpoints(out):
        rewritten(folder, lambda values: values.update(format=1))
    before = contents(out)
    refused = run(2, [*COMMAND, "--data", str(markov), "--out", str(out)])
    assert refused.refused, refused
    assert "has format 1, and this program reads 2 and 3" in refused.complained
    assert contents(out) == before


def test_each_damage_is_named_and_the_checkpoint_before_it_is_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sound_one(finished) == "step_000008"
    named = 0
    for number in range(TRIALS):
        copy = tmp_path / str(number)
        shutil.copytree(finished, copy)
        name = damage(copy / "step_000008", number)
        capsys.readouterr()
        assert sound_one(copy) == "step_000006", (number, name)
        named += f"step_000008/{name}" in capsys.readouterr().out
        shutil.rmtree(copy)
    assert named == TRIALS


def test_control_without_the_hashes_damage_goes_unseen(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    file = tmp_path / "copy" / "step_000008" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(trained, "check_files", lambda *_: None)
    assert sound_one(tmp_path / "copy") == "step_000008"


def test_the_ranks_fall_back_together(markov: Path, finished: Path, tmp_path: Path) -> None:
    """Each of them has read a part of the files; rank 1's part is the damaged one."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "step_000008" / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = run(2, [*COMMAND, "--data", str(markov), "--out", str(out)])
    assert again.statuses == [0, 0], again.complained
    assert "step_000008/rank_00001.safetensors has" in again.said
    assert "going on from" in again.said
    assert state(out / "step_000008") == state(finished / "step_000008")
    given = [*COMMAND, "--data", str(markov), "--out", str(tmp_path / "other")]
    file.write_bytes(file.read_bytes()[:-1])
    refused = run(2, [*given, "--resume", str(out / "step_000008")])
    assert refused.refused, refused
    assert refused.complained.count("error: ") == 1
    assert "rank_00001.safetensors has" in refused.complained


def test_with_no_sound_checkpoint_nothing_is_touched(
    markov: Path, finished: Path, tmp_path: Path
) -> None:
    """Someone may still mend one; and the advice works."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in checkpoints(out):
        (folder / "manifest.json").write_text("{")
    before = contents(out)
    command = [*COMMAND, "--data", str(markov), "--out"]
    refused = run(2, [*command, str(out)])
    assert refused.refused, refused
    assert f"no checkpoint of {out} is sound; to begin anew give a new --out" in refused.complained
    assert contents(out) == before
    assert run(2, [*command, str(tmp_path / "new")]).statuses == [0, 0]


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    """A manifest that says something else, with its own hash right: what an attacker would do."""
    import json

    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_bytes(with_own_hash(values))


def rename_file(values: dict, name: str) -> None:
    values["files"][name] = values["files"].pop("rank_00001.safetensors")
    for tensor in values["tensors"].values():
        for one in tensor["slices"]:
            if one["file"] == "rank_00001.safetensors":
                one["file"] = name


@pytest.mark.parametrize(
    "name", ["../rank_00001.safetensors", "/etc/passwd", "a/../../b", "..", ""]
)
def test_a_name_that_leads_outside_is_refused(finished: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step_000008"
    shutil.copytree(finished / "step_000008", folder)
    rewritten(folder, lambda values: rename_file(values, name))
    with pytest.raises(CheckpointError, match="is refused"):
        read_manifest(folder)


def test_a_file_that_is_a_link_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000008"
    shutil.copytree(finished / "step_000008", folder)
    file = folder / "rank_00001.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is a link, and refused"):
        trained.check_files(folder, read_manifest(folder))


LIES: dict[str, Callable[[dict], object]] = {
    "shape": lambda v: v["tensors"]["final_norm.weight"].update(shape=[10**12]),
    "negative": lambda v: v["tensors"]["final_norm.weight"].update(shape=[-16]),
    "dim": lambda v: v["tensors"]["final_norm.weight"].update(dim=7),
    "first": lambda v: v["tensors"]["final_norm.weight"]["slices"][0].update(first=[0, 0]),
    "slice": lambda v: v["tensors"]["final_norm.weight"]["slices"][0].update(size=[10**9]),
    "hole": lambda v: v["tensors"]["final_norm.weight"]["slices"].clear(),
    "stranger": lambda v: v["tensors"].update(intruder=v["tensors"]["final_norm.weight"]),
    "lost": lambda v: v["tensors"].pop("final_norm.weight"),
    "text": lambda v: v["progress"].update(step="8"),
    "step": lambda v: v["progress"].update(step=7),
    "key": lambda v: v["progress"].update(command="rm"),
    "format": lambda v: v.update(format=99),
    "list": lambda v: v.update(tensors=[]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_an_error_in_one_line(
    lie: str, markov: Path, finished: Path, tmp_path: Path
) -> None:
    """Its own hash is right; --resume PATH trusts no more than auto does."""
    folder = tmp_path / "step_000008"
    shutil.copytree(finished / "step_000008", folder)
    rewritten(folder, LIES[lie])
    command = [*COMMAND, "--data", str(markov), "--out", str(tmp_path / "new")]
    refused = run(2, [*command, "--resume", str(folder)])
    assert refused.refused, refused
    assert refused.complained.count("error: ") == 1
    assert refused.complained.count("\n") == 1, refused.complained


class Bomb:
    """Unpickled, it leaves a sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.sentinel),)


def test_control_a_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()


READ = {
    "corpus": ["train.bin", "val.bin", "meta.json", "tokenizer.json"],
    "run": ["tokenizer.json", "config.json", "meta.json", "log.jsonl"],
    "run/step_000008": ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"],
}


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, names in READ.items() for name in names]
)
def test_a_pickle_anywhere_is_not_run(
    place: str, name: str, markov: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(markov, tmp_path / "corpus")
    shutil.copytree(finished, tmp_path / "run")
    sentinel = tmp_path / "sentinel"
    (tmp_path / place / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    data, out = ["--data", str(tmp_path / "corpus")], ["--out", str(tmp_path / "run")]
    ended: Outcome = launch(1, [*COMMAND[:-2], *data, *out, "--steps", "9"]).wait()
    assert ended.statuses[0] in (0, 2), ended.complained
    assert "Traceback" not in ended.complained
    from rosetrainer.checkpoint.run_folder import read_run
    from rosetrainer.commands import checkpoint as checkpoint_command

    for read in (
        lambda: read_run(tmp_path / "run"),
        lambda: checkpoint_command.main(["verify", str(tmp_path / "run")]),
        lambda: checkpoint_command.main(["ls", str(tmp_path / "run")]),
    ):
        try:
            read()
        except ConfigError as error:
            assert "\n" not in str(error)
    assert not sentinel.exists()

"""Where a run begins: what another run has written is never touched, and a run stays what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.harness import contents
from machine import like

from rosetrainer.checkpoint import slices
from rosetrainer.checkpoint.manifest import checkpoints, read_manifest
from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.reporting.run_log import has_evaluation
from rosetrainer.training import open_run, trainer
from rosetrainer.training.setup import check_config, train
from rosetrainer.validation import ConfigError

STEPS = 4


class Killed(BaseException):
    """Nothing that a run catches."""


@pytest.fixture
def config(markov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Four tiny steps, each evaluated, and one checkpoint, at the end."""
    monkeypatch.setattr(
        "rosetrainer.training.setup.matmul_peak", lambda *_: 1.0
    )  # a third of a second
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        GPTConfig(context_length=8, n_layers=1, n_heads=2, d_model=8),
        optim=OptimConfig(warmup_steps=2, global_batch_size=4),
    ).with_settings(
        data=markov,
        out=tmp_path / "run",
        steps=STEPS,
        eval_every=1,
        eval_tokens=16,
        checkpoint_every=0,
    )


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "markov"
    prepare(["markov", "--seed", "5", "--out", str(folder)])
    return folder


def with_run(config: TrainConfig, **run: Any) -> TrainConfig:
    return config.with_settings(**run)


def start(config: TrainConfig, **run: Any) -> None:
    train(*check_config(with_run(config, **run), 1))


def start_and_kill(config: TrainConfig, at_step: int = 2, **run: Any) -> None:
    """Killed in that step, after the evaluation of the one before it."""
    original = trainer.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] + 1 == at_step:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "train_step", train_step)
        start(config, **run)


def refusal(config: TrainConfig, **run: Any) -> str:
    """The one line with which it is refused, after which every byte is as it was."""
    before = contents(Path.cwd())
    with pytest.raises(ConfigError) as caught:
        start(config, **run)
    assert contents(Path.cwd()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def steps_logged(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def test_a_run_killed_before_its_first_checkpoint_is_not_overwritten_by_another(
    config: TrainConfig, other_data: Path, tmp_path: Path
) -> None:
    start_and_kill(config)
    out = tmp_path / "run"
    assert not checkpoints(out)
    assert "seed=2 and not 1337 like" in refusal(config, seed=2)
    assert f"train.bin is not what {out} was trained on" in refusal(config, data=other_data)
    assert "is not empty" in refusal(config, resume="never")
    wider = replace(config, model=replace(config.model, d_model=16))
    assert "d_model=16 and not 8 like" in refusal(wider)
    assert "give the same flags to go on with that one, or a new --out" in refusal(wider)
    start(wider, out=tmp_path / "new")


def test_the_same_command_begins_again_in_its_folder_and_says_so(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_and_kill(config, at_step=3)
    start_and_kill(config, at_step=3)
    capsys.readouterr()
    start(config)
    out = tmp_path / "run"
    assert f"{out} holds no checkpoint yet; beginning at step 1 again" in capsys.readouterr().out
    assert steps_logged(out) == [1, 2, 3, 4]


def test_without_out_another_run_takes_a_new_folder(
    config: TrainConfig, other_data: Path, tmp_path: Path
) -> None:
    config = with_run(config, out=None)
    start_and_kill(config)
    killed = contents(tmp_path / "out" / "run-001")
    start(config, data=other_data)
    start(config, seed=2)
    assert contents(tmp_path / "out" / "run-001") == killed
    start(config)
    runs = [tmp_path / "out" / f"run-{number:03d}" for number in (1, 2, 3)]
    assert sorted((tmp_path / "out").iterdir()) == runs
    assert [steps_logged(run) for run in runs] == [[1, 2, 3, 4]] * 3


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta": (lambda run: (run / "meta.json").unlink(), "has no meta.json that says what"),
    "half a meta": (lambda run: (run / "meta.json").write_text("{"), "has no meta.json that says"),
    "no config": (lambda run: (run / "config.json").unlink(), "is not empty; choose another --out"),
    "half a config": (
        lambda run: (run / "config.json").write_text("{"),
        "config.json cannot be read",
    ),
    "another program": (
        lambda run: (run / "config.json").write_text('{"model_type": "gpt2"}'),
        "it is of another program; choose another --out",
    ),
    "an empty config": (
        lambda run: (run / "config.json").write_text("{}"),
        "it is of another program; choose another --out",
    ),
    "another version": (
        lambda run: change_config(run, lambda values: values["run"].update(flux=7)),
        "unknown keys flux, which a newer rosetrainer may have written; choose another --out",
    ),
}


def change_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((run / "config.json").read_text())
    change(values)
    (run / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_does_not_say_what_it_is_is_left_alone(
    case: str, config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config)
    harm, told = REFUSED[case]
    harm(tmp_path / "run")
    assert told in refusal(config)
    start(config, out=None)
    assert checkpoints(tmp_path / "out" / "run-001")


def test_what_a_start_leaves_that_was_killed_at_once_stops_nobody(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Killed before config.json, and between it and meta.json: nothing was trained there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on another machine\n")
    (tmp_path / "run" / ".config.json.part").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rosetrainer.checkpoint.run_folder.shutil.copyfile", kill)
        with pytest.raises(Killed):
            start(config)
    assert (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "meta.json").exists()
    assert "seed=2 and not 1337" in refusal(config, seed=2)
    start(config)
    assert checkpoints(tmp_path / "run")


def kill(*_: object) -> None:
    raise Killed


def test_of_two_starts_at_the_same_moment_one_gives_way(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has come and gone between the look at the folder and its lock."""
    original = open_run.lock_run

    def lock_late(folder: Path) -> Any:
        monkeypatch.setattr(open_run, "lock_run", original)
        start_and_kill(config)
        return original(folder)

    monkeypatch.setattr(open_run, "lock_run", lock_late)
    with pytest.raises(ConfigError, match=f"another start has written to {tmp_path}/run since"):
        start(config, seed=2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["seed"] == 1337
    assert steps_logged(tmp_path / "run") == [1]
    start(config)


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_again(
    config: TrainConfig, tmp_path: Path
) -> None:
    start(config)
    shutil.rmtree(tmp_path / "run" / "step_000004")
    assert "holds a finished run and no checkpoint to go on from" in refusal(config)
    config = with_run(config, out=None)
    start(config)
    shutil.rmtree(tmp_path / "out" / "run-001" / "step_000004")
    start(config)
    assert checkpoints(tmp_path / "out" / "run-002")


def test_every_name_of_a_folder_is_the_same_folder(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_and_kill(config, out=Path("run"), at_step=3, checkpoint_every=2)
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "sub").mkdir()
    for name in ("link", "./run", "sub/../run", "../" + tmp_path.name + "/run"):
        assert "seed=2 and not 1337" in refusal(config, seed=2, out=Path(name))
    monkeypatch.chdir(tmp_path / "run")
    start_and_kill(config, out=Path(), at_step=4, checkpoint_every=1)
    assert steps_logged(tmp_path / "run") == [1, 2, 3]
    monkeypatch.chdir(tmp_path)
    start(config, out=Path("link"), resume="run")
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(("out", "path"), [("link", "run"), ("run", "link")])
def test_out_and_resume_may_name_one_folder_in_two_ways(
    out: str, path: str, config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=3)
    (tmp_path / "link").symlink_to("run")
    start_and_kill(config, out=Path(out), resume=f"{path}/step_000002", at_step=4)
    start(config, out=Path(out), resume=path)
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4]


def test_no_run_begins_inside_another(config: TrainConfig, tmp_path: Path) -> None:
    """Were it called like a checkpoint, retention would take it for one."""
    start(config)
    for name in ("step_000002", "step_000004/more", "again"):
        assert f"lies inside the run {tmp_path / 'run'};" in refusal(config, out=Path("run") / name)


def test_a_branch_killed_before_its_first_checkpoint_goes_on_as_itself(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=4)
    branch = {"out": tmp_path / "branch", "resume": "run/step_000002"}
    start_and_kill(config, at_step=4, **branch)
    assert "branch is not empty" in refusal(config, **branch | {"resume": "run/step_000003"})
    assert "seed=2 and not 1337" in refusal(config, **branch, seed=2)
    capsys.readouterr()
    start(config, **branch)
    assert "going on from run/step_000002" in capsys.readouterr().out
    assert steps_logged(tmp_path / "branch") == [3, 4]


def test_a_branch_without_a_checkpoint_of_its_own_is_not_begun_at_step_1(
    config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=4)
    branch = {"out": tmp_path / "branch", "resume": "run/step_000002"}
    start_and_kill(config, at_step=4, **branch)
    assert "went on from run/step_000002 and holds no checkpoint of its own; add --resume " in (
        refusal(config, out=tmp_path / "branch")
    )
    (tmp_path / "run" / "step_000002").rename(tmp_path / "step_000002")
    assert "run/step_000002 holds no checkpoint; give a run folder" in refusal(config, **branch)
    (tmp_path / "step_000002").rename(tmp_path / "run" / "step_000002")
    start(config, **branch)
    assert steps_logged(tmp_path / "branch") == [3, 4]
    start(config, out=tmp_path / "branch")


def test_a_run_killed_before_its_last_evaluation_goes_on_without_out(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_run(config, out=None, eval_every=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "evaluate", kill)
        start(config)
    run = tmp_path / "out" / "run-001"
    assert not has_evaluation(run / "log.jsonl", STEPS)
    start(config)
    assert has_evaluation(run / "log.jsonl", STEPS)
    assert not (tmp_path / "out" / "run-002").exists()
    start(config)
    assert checkpoints(tmp_path / "out" / "run-002")


def test_a_checkpoint_handed_on_alone_does_not_make_its_folder_a_run(
    config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=3)
    (tmp_path / "mine").mkdir()
    shutil.copytree(tmp_path / "run" / "step_000002", tmp_path / "mine" / "step_000002")
    given = {"resume": "mine/step_000002", "out": None}
    assert "mine has no config.json" in refusal(config, **given)
    (tmp_path / "mine" / "config.json").write_text('{"mine": 1}')
    assert "it is of another program" in refusal(config, **given)
    start(config, **given | {"out": tmp_path / "new"})


def test_the_advice_about_a_damaged_checkpoint_works(config: TrainConfig, tmp_path: Path) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=4)
    (tmp_path / "run" / "step_000003" / "manifest.json").write_text("{")
    given = {"resume": "run/step_000003", "out": tmp_path / "new"}
    with pytest.raises(ConfigError, match=f"give {tmp_path}/run instead, and its newest sound"):
        start(config, **given)
    start(config, **given | {"resume": "run"})
    assert steps_logged(tmp_path / "new") == [3, 4]


def move_and_link(folder: Path, to: Path) -> None:
    shutil.move(folder, to)
    folder.symlink_to(to)


def test_a_checkpoint_that_the_user_has_moved_and_linked_is_read_and_retired(
    config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=3)
    out, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    for step in (1, 2):
        move_and_link(out / f"step_00000{step}", disk / f"kept{step}")
    kept = contents(disk)
    assert read_manifest(out / "step_000002").progress.step == 2
    start(config, checkpoint_every=1)
    assert steps_logged(out) == [1, 2, 3, 4], "it went on from the link"
    assert [folder.name for folder in checkpoints(out)] == ["step_000004", "step_000003"]
    assert contents(disk) == kept, "what lies outside of the run folder is the user's"


def test_a_link_to_a_disk_that_is_not_there_is_said_and_kept(
    config: TrainConfig, tmp_path: Path
) -> None:
    """The checkpoint may be whole: falling back behind it would train those steps again."""
    start_and_kill(config, checkpoint_every=1, at_step=4)
    move_and_link(tmp_path / "run" / "step_000003", tmp_path / "disk")
    shutil.move(tmp_path / "disk", tmp_path / "unmounted")
    assert f"step_000003 leads to {tmp_path}/disk, which is not there now" in refusal(config)
    shutil.move(tmp_path / "unmounted", tmp_path / "disk")
    start(config)


def test_a_damaged_checkpoint_behind_a_link_is_replaced_and_the_user_s_files_stay(
    config: TrainConfig, tmp_path: Path
) -> None:
    start_and_kill(config, checkpoint_every=1, at_step=4)
    out, disk = tmp_path / "run", tmp_path / "disk"
    move_and_link(out / "step_000003", disk)
    (disk / "rank_00000.safetensors").write_bytes(b"half")
    kept = contents(disk)
    start(config, checkpoint_every=1)
    assert not (out / "step_000003").is_symlink()
    assert slices.is_sound(out / "step_000003")
    assert contents(disk) == kept


def native_bf16(patch: pytest.MonkeyPatch, has: bool) -> None:
    """What --dtype auto asks of this machine."""
    patch.setattr("rosetrainer.hardware.measured.machine", lambda: like(bf16=has))


WAYS: dict[str, dict[str, Any]] = {
    "the same command": {},
    "the dtype given": {"dtype": "bfloat16"},
    "a path": {"resume": "run/step_000002"},
    "a path to a branch": {"resume": "run/step_000002", "out": Path("branch")},
}


IN_ITS_FOLDER = [way for way in WAYS if "resume" not in WAYS[way]]


@pytest.mark.parametrize(
    ("way", "every"), [*((way, 1) for way in WAYS), *((way, 0) for way in IN_ITS_FOLDER)]
)
def test_a_run_goes_on_in_its_dtype_on_a_machine_where_auto_is_another(
    way: str,
    every: int,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    native_bf16(monkeypatch, True)
    start(config, out=tmp_path / "whole")
    start_and_kill(config, at_step=3, checkpoint_every=every)
    native_bf16(monkeypatch, False)
    capsys.readouterr()
    start_and_kill(config, at_step=4, **WAYS[way])
    start(config, **WAYS[way])
    said = capsys.readouterr().out
    line = "dtype=auto is float32 here, but the run began in bfloat16 and goes on in it, which may"
    assert said.count(line) == 2 * ("dtype" not in WAYS[way])
    out = WAYS[way].get("out", tmp_path / "run")
    ours, whole = (losses(folder) for folder in (out, tmp_path / "whole"))
    assert ours == {step: loss for step, loss in whole.items() if step in ours}
    assert max(ours) == STEPS
    assert read_manifest(out / "step_000004").progress.dtype == "bfloat16"
    written = json.loads((out / "config.json").read_text())["precision"]
    assert written["compute_dtype"] == "bfloat16"
    assert written["compute_kernels"] == "layer_norm,attention"


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_without_out_a_run_that_moved_is_found_again_and_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the commands it is that goes on; one that asked for another dtype is not it."""
    config = with_run(config, out=None, checkpoint_every=1)
    native_bf16(monkeypatch, True)
    start_and_kill(config, at_step=2)
    native_bf16(monkeypatch, False)
    start_and_kill(config, at_step=3, dtype="bfloat16")
    start_and_kill(config, at_step=4)
    start_and_kill(config, at_step=2, dtype="float32")
    start(config)
    runs = [tmp_path / "out" / f"run-{number:03d}" for number in (1, 2)]
    assert sorted((tmp_path / "out").iterdir()) == runs
    assert [steps_logged(run) for run in runs] == [[1, 2, 3, 4], [1]]


def test_another_dtype_is_refused_with_advice_that_works(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_bf16(monkeypatch, True)
    start_and_kill(config, checkpoint_every=1, at_step=3)
    native_bf16(monkeypatch, False)
    other: dict[str, Any] = {"dtype": "float32"}
    assert refusal(config, **other) == (
        f"this run has dtype=float32 and not bfloat16 like {tmp_path}/run; give the same flags to "
        f"go on with that one, or a new --out"
    )
    path = other | {"resume": "run/step_000002", "out": tmp_path / "branch"}
    assert refusal(config, **path) == (
        "this run has dtype=float32 and not bfloat16 like run/step_000002; give the same flags to "
        "go on with that one, or leave --resume out"
    )
    start(config, **path | {"resume": "auto"})
    start(config, **other | {"out": tmp_path / "new"})
    start(config, **path | {"dtype": "bfloat16", "out": tmp_path / "branch2"})
    start(config, dtype="bfloat16")
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4]

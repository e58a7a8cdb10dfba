"""Who started a rank, and with which GPU: torchrun's, Slurm's and Open MPI's variables."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rosetrainer.commands.flags import ranks_to_start
from rosetrainer.commands.train import main
from rosetrainer.config import ParallelConfig
from rosetrainer.environment import (
    LAUNCHED,
    choose_device,
    reports_for_machine,
    world_from_environment,
)
from rosetrainer.launch.process_group import check_devices, init_process_group
from rosetrainer.launch.rank import run_rank
from rosetrainer.reporting.messages import gpu_remark
from rosetrainer.validation import ConfigError

RANK_3 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
SRUN_3 = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
MPIRUN_3 = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PREFIXES = ("SLURM_", "OMPI_", "TORCHELASTIC_", "LOCAL_", "MASTER_", "CUDA_VISIBLE", LAUNCHED)


Start = Callable[..., None]


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Sets what a launcher would, and nothing of another's; `gpus` is what torch then sees."""

    def start(environment: dict[str, str], gpus: int = 0) -> None:
        for name in [*os.environ, "RANK", "WORLD_SIZE"]:
            if name in ("RANK", "WORLD_SIZE") or name.startswith(PREFIXES):
                monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)

    return start


@pytest.mark.parametrize(
    "environment, world",
    [
        ({}, (0, 1, 0, 1)),
        (RANK_3, (3, 4, 3, 4)),
        (SRUN_3, (3, 4, 1, 2)),
        (SRUN_3 | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, (3, 4, 0, 1)),
        (MPIRUN_3, (3, 4, 1, 2)),
        (RANK_3 | SRUN_3 | MPIRUN_3, (3, 4, 3, 4)),
        # mpirun's daemons are started by srun, one a node.
        (SRUN_3 | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | MPIRUN_3, (3, 4, 1, 2)),
        # Scripts that set two of four from Slurm's.
        ({"RANK": "3", "WORLD_SIZE": "4"} | SRUN_3, (3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | SRUN_3, (3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | MPIRUN_3, (3, 4, 1, 2)),
        (BATCH_SCRIPT, (0, 1, 0, 1)),
        (SRUN_3 | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 0, 1)),  # nothing tells
    ],
)
def test_the_place_among_the_ranks(
    started_with: Start, environment: dict[str, str], world: tuple[int, ...]
) -> None:
    started_with(environment)
    assert world_from_environment() == world


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
        (RANK_3 | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        (RANK_3 | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5, and that at most WORLD_SIZE=4"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 must be below LOCAL_WORLD_SIZE=1"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            "LOCAL_RANK is known and LOCAL_WORLD_SIZE is not",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' should be a number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' should be a number"),
        (SRUN_3 | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID='x' should be a number"),
    ],
)
def test_variables_that_contradict_each_other_are_one_line(
    started_with: Start, environment: dict[str, str], said: str
) -> None:
    started_with(environment)
    with pytest.raises(ConfigError) as refused:
        world_from_environment()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_rank_alone_in_its_mistake_tells_of_it(
    started_with: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    started_with({"RANK": "5", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(SystemExit) as ended:
        run_rank(lambda: world_from_environment()[0])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: RANK=5 must be below WORLD_SIZE=4; torchrun")


def test_one_visible_gpu_for_each_rank_is_that_rank_s(started_with: Start) -> None:
    """As Slurm binds them, by a number of the machine's or, in a cgroup, 0 for each."""
    for variable in ("3", "0", "GPU-8a56a4bc"):
        started_with(RANK_3 | {"CUDA_VISIBLE_DEVICES": variable}, gpus=1)
        assert choose_device("auto") == torch.device("cuda", 0)
        assert choose_device("cuda") == torch.device("cuda", 0)
        assert choose_device("cpu") == torch.device("cpu")
        assert gpu_remark(torch.device("cuda", 0), "auto") == ""
    for bound in (1, 2):  # by srun's --gpu-bind
        started_with(RANK_3 | {"SLURM_GPUS_ON_NODE": "8"}, gpus=bound)
        assert choose_device("auto") == torch.device("cuda", 0)


def test_several_gpus_for_each_rank(started_with: Start) -> None:
    for per_task in (
        {"SLURM_GPUS_PER_TASK": "2"},
        {"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:a100:2"},
    ):
        started_with(RANK_3 | per_task | {"CUDA_VISIBLE_DEVICES": "0,1"}, gpus=2)
        device = choose_device("auto")
        assert device == torch.device("cuda", 0)
        assert gpu_remark(device, "auto") == "its own GPUs: 2, 1 idle: a rank uses one"
        started_with(RANK_3 | per_task, gpus=8)  # all tasks see all: --gpu-bind=none
        assert choose_device("auto") == torch.device("cuda", 3)


def test_gpus_that_ranks_share(started_with: Start) -> None:
    started_with(RANK_3, gpus=4)
    assert choose_device("auto") == torch.device("cuda", 3)
    assert gpu_remark(torch.device("cuda", 3), "auto") == ""
    started_with(RANK_3, gpus=8)
    assert choose_device("auto") == torch.device("cuda", 3)
    assert gpu_remark(torch.device("cuda", 3), "auto") == "GPUs: 8, 4 idle: a rank uses one"


@pytest.mark.parametrize(
    "environment, gpus",
    [
        (RANK_3, 1),
        (RANK_3, 3),
        # One for all: these give their ranks the environment that they have themselves.
        (RANK_3 | {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "x"}, 1),
        (RANK_3 | {"CUDA_VISIBLE_DEVICES": "0", LAUNCHED: "1"}, 1),
        (RANK_3 | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, 1),
        (RANK_3 | {"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
    ],
)
def test_fewer_gpus_than_ranks(started_with: Start, environment: dict[str, str], gpus: int) -> None:
    started_with(environment, gpus=gpus)
    device = choose_device("auto")
    assert device == torch.device("cpu")
    assert gpu_remark(device, "auto") == f"GPUs: {gpus}, fewer than the 4 local ranks"
    assert gpu_remark(device, "cpu") == ""
    with pytest.raises(ConfigError, match=f"each of the 4 local ranks, here are {gpus}; start"):
        choose_device("cuda")


def test_srun_s_tasks_take_a_gpu_each_of_a_shared_set(started_with: Start) -> None:
    for environment in (SRUN_3, SRUN_3 | {"RANK": "3", "WORLD_SIZE": "4"}, MPIRUN_3):
        started_with(environment, gpus=2)
        assert choose_device("auto") == torch.device("cuda", 1)
        assert not reports_for_machine()


def test_a_gpu_that_cannot_be_told_is_one_line(started_with: Start) -> None:
    started_with({"RANK": "1", "WORLD_SIZE": "2"}, gpus=4)
    for wanted in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="which of the 4 GPUs is this rank's; set LOCAL_RANK"):
            choose_device(wanted)
    assert choose_device("cpu") == torch.device("cpu")
    started_with({"RANK": "1", "WORLD_SIZE": "2"}, gpus=1)  # a machine each
    assert choose_device("auto") == torch.device("cuda", 0)


def test_ranks_with_the_same_gpu_are_named_on_both() -> None:
    store = dist.HashStore()
    said: dict[int, str] = {}

    def check(rank: int, uuid: str) -> None:
        try:
            check_devices(store, rank, 3, "cuda", uuid)
        except ConfigError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=args) for args in enumerate("aba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [0, 1, 2]
    assert said[0].startswith("ranks 0 and 2 have the same GPU, a; give each rank its own")
    check_devices(dist.HashStore(), 0, 1, "cuda", "a")


@pytest.mark.parametrize(
    "address", [{}, {"MASTER_ADDR": "a"}, {"MASTER_ADDR": "a", "MASTER_PORT": "x"}]
)
def test_ranks_that_do_not_know_where_to_meet(started_with: Start, address: dict[str, str]) -> None:
    started_with(SRUN_3 | address)
    with pytest.raises(ConfigError, match="do not say where 4 ranks meet; torchrun sets them"):
        init_process_group("cpu", timedelta(seconds=300))


def test_srun_s_ranks_are_ranks(started_with: Start) -> None:
    started_with(SRUN_3)
    assert ranks_to_start("train", [], None, ParallelConfig(tp_size=4)) == (4, False)
    with pytest.raises(ConfigError, match="nproc=2 under torchrun, srun or mpirun"):
        ranks_to_start("train", [], 2, ParallelConfig())
    started_with(BATCH_SCRIPT)
    assert ranks_to_start("train", [], 2, ParallelConfig()) == (2, True)


ELSEWHERE = "203.0.113.7"
"""An address of no machine (RFC 5737)."""


def test_each_of_several_machines_starts_its_own_ranks(
    started_with: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, tuple[int, int], str]] = []

    def launch(nproc: int, argv: list[str], threads: int, machine: tuple[int, int]) -> int:
        started.append((nproc, machine, os.environ["MASTER_ADDR"]))
        return 0

    monkeypatch.setattr("rosetrainer.launch.launcher.launch", launch)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    started_with({})
    for hosts, own in ((f"127.0.0.1,{ELSEWHERE}", 0), (f"{ELSEWHERE}, 127.0.0.1", 1)):
        main(["--hosts", hosts, "--tp-size", "2"])
        main(["--hosts", hosts, "--nproc", "2", "--tp-size", "4"])
        first = hosts.split(",")[0]
        assert started[-2:] == [(1, (own, 2), first), (2, (own, 2), first)]
    main(["--hosts", f"{ELSEWHERE},a,b,c", "--host-rank", "2", "--tp-size", "4"])
    assert started[-1] == (1, (2, 4), ELSEWHERE)
    with pytest.raises(ConfigError, match="world size 2 is not tp_size x dp_size = 2 x 2; start 4"):
        main(["--hosts", hosts, "--tp-size", "2", "--dp-size", "2"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hosts", "a"], "hosts=a should be two or more addresses, A,B say"),
        (["--hosts", "a,,b"], "hosts=a,,b should be two or more addresses"),
        (["--hosts", "a,a"], "hosts=a,a should be two or more addresses"),
        (["--hosts", f"{ELSEWHERE},203.0.113.8"], "0 of them are addresses of this machine; give"),
        (["--hosts", "127.0.0.1,127.0.0.2"], "2 of them are addresses of this machine; give"),
        (["--hosts", "a,b", "--host-rank", "2"], "there are 2; it can be 0 to 1"),
        (["--host-rank", "1"], "there are 0; give --hosts A,B too"),
    ],
)
def test_hosts_that_are_none_are_one_line(started_with: Start, flags: list[str], said: str) -> None:
    started_with({})
    with pytest.raises(ConfigError) as refused:
        main(flags)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)

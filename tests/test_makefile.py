"""`make` on a new machine: which torch is taken, and what is said; pip and nvidia-smi are faked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU = "https://download.pytorch.org/whl/cpu"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")

# Stands for the Python that makes the environment, and for the environment's own.
PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"pip config list"*) echo "$PIP_CONFIG" ;;
*"pip install"*) echo "pip: $*"; exit ${PIP_STATUS:-0} ;;
*urlopen*) echo "asked: $*" >&2; exit ${UNREACHED:-0} ;;
*"-m rosetrainer"*) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    write_command(tmp_path, "python3", PYTHON)
    write_command(tmp_path, "uname", "#!/bin/sh\necho Linux\n")
    write_command(tmp_path, "nvidia-smi", "#!/bin/sh\nexit 127\n")
    return tmp_path


def write_command(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """In an environment without pip's settings, and without those of a `make test` around it."""
    others = ("PIP_", "MAKE", "MFLAGS", "PYTHON")
    own = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    own["PATH"] = f"{folder / 'bin'}{os.pathsep}{own['PATH']}"
    return subprocess.run(
        ["make", *words], cwd=folder, env=own | settings, capture_output=True, text=True
    )


def pip_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("pip: ")]


def test_without_a_gpu_torch_is_for_cpus(folder: Path) -> None:
    for smi in ("exit 127", "echo NVIDIA-SMI has failed; exit 9", "echo 'No devices were found'"):
        shutil.rmtree(folder / ".venv", ignore_errors=True)
        write_command(folder, "nvidia-smi", f"#!/bin/sh\n{smi}\n")
        done = make(folder, "train")
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = pip_lines(done)
        assert f"--extra-index-url {CPU} -r requirements.txt" in line
        assert "--quiet" not in line
        said = f"nvidia-smi shows no GPU: torch for CPUs, 0.3 GB to download, from {CPU}\n"
        assert said in done.stdout


def test_with_a_gpu_torch_brings_cuda(folder: Path) -> None:
    write_command(folder, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-8a)'\n")
    done = make(folder, "train")
    assert "index" not in pip_lines(done)[0]
    assert "nvidia-smi shows a GPU: torch with CUDA, about 3 GB to download.\n" in done.stdout


def test_an_index_out_of_reach_is_said_and_done_without(folder: Path) -> None:
    done = make(folder, "train", UNREACHED="14")
    assert (done.returncode, done.stderr) == (0, "")
    assert "index" not in pip_lines(done)[0]
    assert f"no GPU, but {CPU}, which has torch for CPUs alone, is out\nof reach" in done.stdout


@pytest.mark.parametrize(
    "setting", ["global.index-url='x'", ":env:.extra-index-url='x'", "install.no-index='1'"]
)
def test_a_user_s_own_index_is_never_added_to(folder: Path, setting: str) -> None:
    done = make(folder, "train", PIP_CONFIG=f"global.timeout='9'\n{setting}")
    assert "index" not in pip_lines(done)[0]
    assert "no GPU; torch is taken from where your pip settings say.\n" in done.stdout


def test_elsewhere_than_on_linux_there_is_one_torch(folder: Path) -> None:
    write_command(folder, "uname", "#!/bin/sh\necho Darwin\n")
    done = make(folder, "train")
    assert "index" not in pip_lines(done)[0]
    assert "torch for this system, 0.3 GB to download.\n" in done.stdout


def test_the_first_of_five_stages_begins_before_pip_and_ends_after(folder: Path) -> None:
    done = make(folder, "train")
    wanted = (
        "Five stages",
        "[1/5] environment: ",
        "pip: ",
        "[1/5] took ",
        "ran: -m rosetrainer tour",
    )
    places = [done.stdout.index(text) for text in wanted]
    assert places == sorted(places)
    again = make(folder, "train")
    assert not pip_lines(again)
    assert "[1/5] environment" in again.stdout
    assert "[1/5] took " in again.stdout


def test_an_installation_that_fails_is_not_taken_for_done(folder: Path) -> None:
    failed = make(folder, "train", PIP_STATUS="1")
    assert failed.returncode != 0
    assert "[1/5] took" not in failed.stdout
    assert pip_lines(make(folder, "train"))

"""How a user starts this very Python, wherever `python` on PATH leads."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rosetrainer import environment

pytestmark = pytest.mark.prints_commands
ROOT = Path(__file__).resolve().parent.parent
BASE = os.path.realpath(sys.executable)
SHOW = "import rosetrainer.environment as e; print(e.python_command())"
# What lies on PATH as `python`, and whether it runs with our packages.
SCRIPTS = {
    "a shim of ours": (f'exec {shlex.quote(sys.executable)} "$@"', True),
    "one that speaks first": (f'echo hello; exec {shlex.quote(sys.executable)} "$@"', True),
    "a shim of another": (f'exec {shlex.quote(BASE)} "$@"', False),
    "one that fails": ("exit 127", False),
    "one that lies": ("echo", False),
    "one that knows no -I": ('echo "Unknown option: -I" >&2; exit 2', False),
    "one that hangs": ("exec sleep 600", False),
}


def runs(command: str) -> str:
    """The prefix of what the command starts, as a user's shell reads it."""
    show = shlex.quote("import sys; print(sys.prefix)")
    done = subprocess.run(
        f"{command} -I -c {show}", shell=True, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`python` in the one folder of PATH, for a test to make; the Python that runs is elsewhere."""
    folder = tmp_path / "on path"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.chdir(tmp_path)
    return folder / "python"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_python_on_path_is_named_where_it_runs_with_our_packages(
    kind: str, on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, ours = SCRIPTS[kind]
    on_path.write_text(f"#!/bin/sh\n{script}\n")
    on_path.chmod(0o755)
    if kind == "one that hangs":
        monkeypatch.setattr(environment, "ANSWER_SECONDS", 0.1)
    ours |= sys.prefix == sys.base_prefix and kind == "a shim of another"
    command = environment.python_command()
    assert command == ("python" if ours else shlex.quote(sys.executable))
    assert runs(command) == sys.prefix


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python is in no environment")
def test_the_file_that_the_environment_links_to_is_another_python(on_path: Path) -> None:
    on_path.symlink_to(BASE)
    assert on_path.samefile(sys.executable)
    assert runs("python") != sys.prefix
    assert environment.python_command() == shlex.quote(sys.executable)


def test_the_environment_s_own_python_on_path_is_python(
    on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}/usr/bin")
    assert environment.python_command() == "python"


def test_what_cannot_be_started_is_not_named(on_path: Path) -> None:
    on_path.write_bytes(b"\x7fELF, and nothing more")
    on_path.chmod(0o755)
    assert environment.python_command() == shlex.quote(sys.executable)


def test_a_path_with_spaces_is_quoted(on_path: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my own" / "venv"
    spaced.parent.mkdir()
    spaced.symlink_to(sys.prefix)
    python = spaced / "bin" / Path(sys.executable).name
    for cwd, expected in ((Path("/"), str(python)[1:]), (on_path.parent, str(python))):
        done = subprocess.run(
            [python, "-c", SHOW],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"'{expected}'\n"


def test_a_python_right_here_is_not_looked_for_on_path(
    on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(sys.executable).parent.resolve()
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.chdir(here)
    command = environment.python_command()
    assert command == "./python"
    assert runs(command) == str(here.parent)

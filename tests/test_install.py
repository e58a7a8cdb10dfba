"""What `pip install .` brings: every module, and a command that does what `-m rosetrainer` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with bin/rosetrainer in it; built in a copy: setuptools writes into its source."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rosetrainer", source / "rosetrainer", ignore=skip)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]
    words = [sys.executable, "-m", "pip", "install", "--quiet", *options]
    done = subprocess.run(
        [*words, "--ignore-installed", "--prefix", str(folder / "prefix"), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "prefix"


def run(installed: Path, *words: str, on_path: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs bin/rosetrainer in a folder of its own, found on PATH or by its path."""
    (packages,) = installed.glob("lib/*/site-packages")
    script = installed / "bin" / "rosetrainer"
    environment = os.environ | {"PYTHONPATH": str(packages)}
    if on_path:
        environment["PATH"] = f"{script.parent}{os.pathsep}{environment['PATH']}"
    words = ("rosetrainer" if on_path else str(script), *words)
    elsewhere = installed.parent
    return subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True)


def test_every_module_is_installed(installed: Path) -> None:
    (packages,) = installed.glob("lib/*/site-packages")
    modules = {
        path.relative_to(ROOT / "rosetrainer")
        for path in (ROOT / "rosetrainer").rglob("*")
        if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
    }
    there = {p.relative_to(packages / "rosetrainer") for p in (packages / "rosetrainer").rglob("*")}
    assert modules <= there
    assert not (packages / "tests").exists()


def test_the_command_names_itself_where_that_works(installed: Path) -> None:
    helped, mistaken = run(installed, "--help"), run(installed, "train", "--tp-size", "2")
    assert helped.stdout.startswith("usage: rosetrainer COMMAND [flags]\n")
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr == (
        "error: 2 ranks are asked for, and this is one; "
        "run: rosetrainer train --nproc 2 --tp-size 2\n"
    )
    by_path = run(installed, "--help", on_path=False)
    assert by_path.stdout.startswith(
        f"usage: {installed / 'bin' / 'rosetrainer'} COMMAND [flags]\n"
    )


def test_the_command_prepares_and_trains_without_a_checkout(installed: Path) -> None:
    """Ranks too, which it starts by -m; the flags' help names it."""
    prepared = run(installed, "prepare", "markov", "--out", "corpus")
    assert prepared.returncode == 0, prepared.stderr
    shape = "--n-layers 1 --n-heads 2 --d-model 16 --context-length 16 --global-batch-size 4"
    flags = [*shape.split(), *["--steps", "2", "--eval-tokens", "64", "--threads", "1"]]
    trained = run(installed, "train", "--nproc", "2", "--data", "corpus", *flags)
    assert trained.returncode == 0, trained.stderr
    assert list((installed.parent / "out").iterdir())
    assert "usage: rosetrainer prepare markov" in run(installed, "prepare", "markov", "-h").stdout

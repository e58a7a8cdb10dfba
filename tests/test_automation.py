"""What runs the tests elsewhere: the workflow on a push, and the container in a browser."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST = re.findall(r'^requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.M)


def workflow() -> Any:
    yaml = import_module("yaml")  # comes with transformers, without types
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_the_workflow_runs_what_runs_on_any_machine() -> None:
    (job,) = workflow()["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(), re.M) == ["lint", "mutants"]
    assert workflow()["permissions"] == {"contents": "read"}
    for action in (step["uses"] for step in job["steps"] if "uses" in step):
        assert re.fullmatch(r"actions/(checkout|setup-python)@v\d+", action)


def test_the_workflow_meets_each_system_and_the_oldest_python() -> None:
    (job,) = workflow()["jobs"].values()
    machines = {(one["os"], one["python"]) for one in job["strategy"]["matrix"]["include"]}
    assert {os for os, _ in machines} == {"ubuntu-latest", "macos-latest"}
    assert ("ubuntu-latest", f"3.{LEAST[0]}") in machines, "the oldest that pyproject.toml allows"
    assert not job["strategy"]["fail-fast"], "each machine says what fails there"


def test_the_container_makes_the_environment_that_the_tests_use() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    image = re.fullmatch(r"python:3\.(\d+)-bookworm", container["image"])  # has git and make
    assert image
    assert int(image[1]) >= int(LEAST[0])
    program, *targets = container["postCreateCommand"].split()
    assert (program, targets) == ("make", [".venv/.installed-dev"])
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in targets)
    python = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python == "${containerWorkspaceFolder}/.venv/bin/python"

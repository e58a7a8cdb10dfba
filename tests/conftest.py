"""Environment of the tests, set before anything imports torch, and the corpus of many of them."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface
import pytest
from machine import keep_by_its_words
from once import Once, make_once
from order import ordered
from progress import Progress

from rosetrainer.commands.prepare import main as prepare


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # which inherits it
        kept = tempfile.mkdtemp(prefix="rosetrainer-tests-")
        config.add_cleanup(functools.partial(shutil.rmtree, kept, ignore_errors=True))
        os.environ["ROSETRAINER_CACHE"] = kept
        keep_by_its_words(Path(kept))
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))
    if config.pluginmanager.hasplugin("hypothesispytest"):  # tests/test_mutants.py goes without
        from hypothesis import HealthCheck, settings

        # A slow machine is no fault of what is tested.
        slow = [HealthCheck.too_slow]
        settings.register_profile("suite", deadline=None, suppress_health_check=slow)
        settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if worker := getattr(config, "workerinput", None):
        items[:] = ordered(items, worker["workercount"])


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Once:
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # then it lies in the folder of the whole run
        shared = shared.parent
    return functools.partial(make_once, shared)


@pytest.fixture(scope="session")
def markov(once: Once) -> Path:
    def make(folder: Path) -> Path:
        prepare(["markov", "--out", str(folder / "markov")])
        return folder / "markov"

    return Path(once("markov", make))


@pytest.fixture(scope="session")
def made(once: Once) -> huggingface.Made:
    return lambda case: Path(once(f"huggingface_{case}", functools.partial(huggingface.make, case)))

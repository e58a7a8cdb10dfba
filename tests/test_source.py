"""No file that is read can run: a look over the source for what executes or unpickles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("rosetrainer", "data", "steps", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "torch.hub.load"}
PICKLING = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}


def dangers(source: str) -> Iterator[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [a for node in nodes if isinstance(node, ast.Import) for a in node.names]
    torches = {a.asname or "torch" for a in names if a.name.split(".")[0] == "torch"} | {"torch"}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if unpickles(a.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{a.name}" for a in node.names}
            if unpickles(node.module) or any(map(unpickles, full)) or "torch.load" in full:
                yield node.module
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            yield node.arg
        elif isinstance(node, ast.Attribute) and node.attr in PICKLING:
            yield node.attr
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and is_true(k.value) for k in node.keywords)
            shell = any(k.arg == "shell" and is_true(k.value) for k in node.keywords)
            loads = name.split(".")[0] in torches and name.endswith(".load") and not safe
            if name.removeprefix("builtins.") in CALLS | METHODS or shell or loads:
                yield name


def unpickles(module: str) -> bool:
    """torch's own checkpoints unpickle their .metadata."""
    return module.split(".")[0] in MODULES or module.startswith("torch.distributed.checkpoint")


def is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_unpickles_or_executes_what_it_reads(path: Path) -> None:
    assert not list(dangers(path.read_text()))


def test_control_each_danger_is_seen() -> None:
    for source in (
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "eval('1')",
        "exec(open('x').read())",
        "yaml.load(text)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "np.load('x', allow_pickle=True)",
        "dist.broadcast_object_list(x)",
        "subprocess.run('ls', shell=True)",
        "from torch.distributed.checkpoint import load",
        "from torch.distributed import checkpoint",
        "import torch.distributed.checkpoint as dcp",
        "from torch import load",
        "import torch as t\nt.load('x')",
        "torch.serialization.load('x')",
        "torch.jit.load('x')",
        "import builtins\nbuiltins.eval('1')",
    ):
        assert list(dangers(source)), source
    assert not list(dangers("torch.load('x', weights_only=True)"))


def spoken(source: str) -> Iterator[str]:
    """The texts of a module that a user may see: all but docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    silent = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in silent
        ):
            yield node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_advises_to_remove_what_a_user_may_have_made(path: Path) -> None:
    for text in spoken(path.read_text()):
        assert not re.search(r"\b([Rr]emove|[Dd]elete|rm|rmtree)\b", text), text

"""The house as it is drawn: imports point down, the oracle stands apart, files hold one idea."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rosetrainer"
FLOORS = [
    {"fields", "cgroup", "heartbeat"},
    {"model_size"},
    {
        *("config", "environment", "durable_files", "interfaces", "screen", "text_parts"),
        "token_pieces",
    },
    {
        *("parallel_context", "reference", "manifest", "presets", "loss_curve", "rank"),
        *("tokenizer", "text_encoding", "file_kinds", "corpus_folder", "python_docs"),
        "shakespeare",
    },
    {
        *("comm", "flags", "ending", "stop", "performance", "process_group", "failures"),
        *("reference_rotary", "text_files", "corpus_advice"),
    },
    {
        *(
            "launch",
            "overlap",
            "dropout",
            "recompute",
            "precision",
            "watch",
            "pace",
            "checkpoint_files",
        ),
        "adamw",
        *("step_profile", "document_files", "corpus_files"),
    },
    {"attention", "products", "token_writer", "documents"},
    {"tensor_parallel", "text_corpus"},
    {"vocab_parallel", "corpus_import"},
    {"model"},
    {"blocks", "muon"},
    {
        *("attention_planner", "encoder_decoder", "data", "data_parallel", "replicas", "clip"),
        *("optim", "checkpoint", "run_folder", "run_log", "block_compile", "loss_planner"),
    },
    {
        "proof",
        "evaluation",
        "planner",
        "training_step",
        "agreement",
        "markov",
        "introduction",
        "run_identity",
    },
    {"loop", "beginning", "comparison"},
    {"parity", "resume"},
    {"train", "generate", "tour", "checkpoint_command", "prepare"},
    {"train_command"},
    {"plan"},
    {"__main__"},
]


def imports(module: str) -> set[str]:
    """The modules of the package that `module` imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rosetrainer"):
            names = (node.module or "").split(".")[1:] or [alias.name for alias in node.names]
            found.add(names[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("rosetrainer.")}
    return found


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if module in floor)


# What a module other than comm may use of torch.distributed.
NO_COLLECTIVES = {
    *("ProcessGroup", "ReduceOp", "is_initialized", "get_rank", "get_world_size"),
    *("init_process_group", "destroy_process_group", "new_subgroups_by_enumeration", "group"),
    *("Store", "FileStore", "PrefixStore", "rendezvous", "DistNetworkError"),
}


def imported_from(module: str) -> set[str]:
    """The modules out of which `module` imports names."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    for other in imports(module):
        assert floor_of(other) < floor_of(module), f"{module} imports {other}"


def test_the_oracle_imports_no_layer_of_ours() -> None:
    assert imports("reference") == {"config"}
    assert imports("reference_rotary") == {"config", "reference"}


@pytest.mark.parametrize("module", MODULES)
def test_collectives_stand_in_comm_alone(module: str) -> None:
    assert module == "comm" or "torch.distributed" not in imported_from(module)
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "dist",
            "torch.distributed",
        ):
            allowed = module == "comm" or node.attr in NO_COLLECTIVES
            assert allowed, f"{module}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_idea(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_page_that_shows_the_floors_shows_these(page: str) -> None:
    text = (PACKAGE.parent / "steps" / page).read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    shown = [set(re.findall(r"`(\w+)\.py`", files)) for _, files in rows]
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS)))
    oracles = {"reference", "reference_rotary"}
    assert [floor - oracles for floor in FLOORS] == shown

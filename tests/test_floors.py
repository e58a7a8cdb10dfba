"""The house as it is drawn: imports point down, the oracle stands apart, files hold one idea."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rosetrainer"
GROUND = {
    *("config", "run_config", "validation", "environment", "cgroup", "durable_files", "heartbeat"),
    *("model_config", "model_choices", "model_size", "model_flops", "parallel_config"),
}
FLOORS = [  # from the top; what stands on one floor does not import each other's folders
    {"__main__"},
    {"commands"},
    {"proof"},
    {"training"},
    {"reporting"},
    {"checkpoint", "planner"},
    {"models", "optim"},
    {"parallel"},
    {"hardware", "launch", "data"},
    GROUND,
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
FOLDERS = sorted({module.partition(".")[0] for module in MODULES if "." in module})


def imports(module: str) -> set[str]:
    """The modules of the package that `module` imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rosetrainer"):
            name = (node.module or "").removeprefix("rosetrainer").removeprefix(".")
            names = [f"{name}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name} if name in MODULES else set(names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("rosetrainer.") for n in names if n.startswith("rosetrainer")}
    assert found <= set(MODULES), f"{module} imports {found - set(MODULES)}"
    return found


def floor_of(module: str) -> int:
    top = module.partition(".")[0]
    return next(number for number, floor in enumerate(FLOORS) if top in floor)


# What a module other than comm may use of torch.distributed.
NO_COLLECTIVES = {
    *("ProcessGroup", "ReduceOp", "is_initialized", "get_rank", "get_world_size"),
    *("init_process_group", "destroy_process_group", "new_subgroups_by_enumeration", "group"),
    *("Store", "FileStore", "PrefixStore", "rendezvous", "DistNetworkError"),
}


def imported_from(module: str) -> set[str]:
    """The modules out of which `module` imports names."""
    tree = ast.parse(MODULES[module].read_text())
    return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


def test_every_folder_and_every_module_on_the_ground_has_a_floor() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    for other in imports(module):
        same_folder = other.partition(".")[0] == module.partition(".")[0]
        on_the_ground = floor_of(other) == floor_of(module) == len(FLOORS) - 1
        below = floor_of(other) > floor_of(module)
        assert below or same_folder or on_the_ground, f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_s_front_page_names_its_files_and_holds_no_code(folder: str) -> None:
    page = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    text = ast.get_docstring(page) or ""
    assert len(page.body) == 1
    files = {path.stem for path in (PACKAGE / folder).glob("[!_]*")}
    missing = sorted(files - set(re.findall(r"\w+", text)))
    assert not missing, f"rosetrainer/{folder}/__init__.py does not name {', '.join(missing)}"


def test_the_oracle_imports_no_layer_of_ours() -> None:
    assert imports("proof.reference") == {"config"}
    assert imports("proof.reference_rotary") == {"config", "proof.reference"}
    assert imports("proof.reference_llama") == {"config", "proof.reference"}
    for family in ("bert", "t5"):
        names = {"config", "proof.reference", "proof.reference_llama"}
        assert imports(f"proof.reference_{family}") == names


@pytest.mark.parametrize("module", MODULES)
def test_collectives_stand_in_comm_alone(module: str) -> None:
    """And two of them, as CPUs like them better, in gloo_sums and shared_sums."""
    tricks = ("hardware.gloo_sums", "hardware.shared_sums", "hardware.shared_memory")
    of_comm = module == "parallel.comm" or module in tricks
    assert of_comm or "torch.distributed" not in imported_from(module)
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "dist",
            "torch.distributed",
        ):
            allowed = of_comm or node.attr in NO_COLLECTIVES
            assert allowed, f"{module}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_idea(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 250


@pytest.mark.parametrize("folder", ["steps", "rosetrainer"])
@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_page_that_shows_the_floors_shows_these(folder: str, page: str) -> None:
    text = (PACKAGE.parent / folder / page).read_text()
    shown = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert sorted(shown) == FOLDERS
    assert [floor_of(folder) for folder in shown] == sorted(map(floor_of, shown))


def test_the_steps_programs_and_the_tests_have_no_module_of_one_name() -> None:
    """Both folders are on the path of a test that calls a program, and one would hide the other."""
    folders = (PACKAGE.parent / "steps", PACKAGE.parent / "tests")
    programs, tests = ({path.name for path in folder.glob("*.py")} for folder in folders)
    assert "steps.py" in programs and "ranks.py" in tests
    assert not programs & tests

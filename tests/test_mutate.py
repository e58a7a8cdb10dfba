"""Mutants made by machine: which there are, and how it is told what became of each."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutate
import mutations
import planted
import pytest

SOURCE = '''"""A number, 1 < 2."""

LIMIT: int = 3


def total(x: list[int], tp: object, wide: bool = True) -> int:
    if len(x) < LIMIT:
        raise ValueError(f"{1 + 1}")
    x = sorted(x)
    assert x[0] + 1
    return all_reduce(x, tp, "forward", tp.size) + divmod(x[0], wide)[0]


def alone(x: list[int]) -> object:
    return zip(x, strict=True)
'''


def test_each_kind_of_mistake_is_made_and_nothing_that_only_speaks_is_changed() -> None:
    mutants = mutations.mutants_of("total.py", SOURCE.encode())
    lines = {
        (m.kind, m.applied(SOURCE.encode()).decode().splitlines()[m.line - 1]) for m in mutants
    }
    given = '    return all_reduce(x, tp, "forward", tp.size) + divmod(x[0], wide)[0]'
    made = {
        "collective dropped": given.replace('all_reduce(x, tp, "forward", tp.size)', "(x)"),
        "another axis": given.replace("x, tp", "x, _all_ranks(tp)"),
        "forward for backward": given.replace("forward", "backward"),
        "argument swapped": given.replace("x[0], wide", "wide, x[0]"),
        "<= for <": "    if (len(x) <= LIMIT):",
        "condition reversed": "    if (not len(x) < LIMIT):",
    }
    assert set(made.items()) <= lines
    assert ("off by one", "LIMIT: int = 4") in lines
    assert ("line removed", "    pass") in lines
    kept = {1, 6, 8, 10, 15}  # docstring, signature, error, assertion, strict
    assert not kept & {m.line for m in mutants}
    assert {m.line for m in mutants if m.kind == "line removed"} == {7, 9}


def test_a_draw_is_of_all_and_the_same_by_seed_with_rare_kinds_first() -> None:
    mutants = mutate.all_mutants()
    order = mutations.drawn(mutants, 1)
    assert order == mutations.drawn(mutants, 1) != mutations.drawn(mutants, 2)
    assert sorted(order) == sorted(mutants)
    kinds = {mutant.kind for mutant in mutants}
    assert {mutant.kind for mutant in order[: len(kinds)]} == kinds
    for mutant in order[:60]:
        compile(mutant.applied(mutate.source_of(mutant.file)), mutant.file, "exec")


def test_every_file_of_the_core_is_changed_under_tests_of_its_own() -> None:
    files = [
        str(path.relative_to(package))
        for package in [mutate.ROOT / "rosetrainer"]
        for folder in ("parallel", "models", "optim")
        for path in (package / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(files) > 30
    assert not [file for file in files if not any(file.startswith(name) for name in mutate.TESTS)]
    for first, then in mutate.TESTS.values():
        for test in [*first, *then]:
            assert (mutate.ROOT / "tests" / test.partition("::")[0]).exists(), test


def test_what_is_explained_is_a_mutant_still() -> None:
    shown = {mutant.shown(mutate.source_of(mutant.file)) for mutant in mutate.all_mutants()}
    assert not set(mutate.explanations()) - shown


CODE = """def larger(a: int, b: int) -> int:
    if a < b:
        a = ([b] + [0])[0]
    return a
"""
TEST = """from rosetrainer.optim.larger import larger


def test_larger() -> None:
    assert larger(1, 2) == 2


def test_smaller() -> None:
    assert larger(5, 2) == 5
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of one file and its test, which is mutated in place of ours."""
    tree = tmp_path / "tree"
    for folder in ("rosetrainer/optim", "data", "tests/optim"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(mutate.ROOT / "pyproject.toml", tree)
    (tree / "rosetrainer/optim/larger.py").write_text(CODE)
    (tree / "tests/optim/test_larger.py").write_text(TEST)
    for module in (mutate, planted):
        monkeypatch.setattr(module, "ROOT", tree)
    monkeypatch.setattr(mutate, "RESULTS", tree / "out")
    monkeypatch.setattr(mutate, "EXPLAINED", tree / "SURVIVORS.md")
    monkeypatch.setattr(mutate, "TESTS", {"optim/": (["optim/test_larger.py"], ["optim"])})
    return tree


def test_what_becomes_of_a_mutant_is_told_apart(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main([]) == 0
    out = capsys.readouterr().out
    results = mutate.read(small / "out/seed_1.jsonl").values()
    file, same = "optim/larger.py: ", "`if a < b:` is `if (a <= b):`"
    assert {one["shown"].removeprefix(file): one["outcome"] for one in results} == {
        "`if a < b:` is `if (not a < b):`": "killed",
        "`if a < b: a = ([b] + [0])[0]` is `pass`": "killed",
        "`a = ([b] + [0])[0]` is `a = ([b] + [0])[1]`": "killed",
        "`a = ([b] + [0])[0]` is `a = (([b] - [0]))[0]`": "broken",
        "`a = ([b] + [0])[0]` is `a = ([b] + [1])[0]`": "survived",
        same: "survived",
    }
    assert (small / "rosetrainer/optim/larger.py").read_text() == CODE
    assert "killed by an assertion: 3 of 5 that run to their end, 60.0 %" in out
    assert "survived: 2, of which 0 are explained in SURVIVORS.md" in out
    (small / "SURVIVORS.md").write_text(f"# The same\n- {file}{same}\n")
    assert mutate.main([]) == 0  # nothing is tried again
    out = capsys.readouterr().out
    assert "killed by an assertion: 3 of 4 that compute something else, 75.0 %" in out
    assert "survived: 2, of which 1 are explained" in out
    assert out.count("not explained:") == 1


def test_a_mutant_that_never_ends_is_ended(small: Path) -> None:
    never = mutations.Mutant("optim/larger.py", 4, "", 0, 0, "while True:\n    pass\n")
    mutate.copy_tree(small / "copy")
    assert mutate.try_mutant(never, small / "copy", 2.0) == ("hung", "after 2 s")


def test_a_test_that_is_red_by_itself_and_a_wrong_budget_are_one_line(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(["--budget", "soon"]) == 2
    assert capsys.readouterr().err == "error: BUDGET=soon is no time; it can be 90s, 30m or 2h\n"
    path = small / "tests/optim/test_larger.py"
    path.write_text(TEST.replace("== 5", "== 6"))
    assert mutate.main([]) == 1
    assert "error: red without a mutant, so no kill of theirs" in capsys.readouterr().err


def test_what_a_test_killed_that_is_no_more_is_tried_again(small: Path) -> None:
    path, results = small / "tests/optim/test_larger.py", small / "out/seed_1.jsonl"
    for name in ("test_larger", "test_renamed"):
        path.write_text(TEST.replace("test_larger", name))
        assert mutate.main([]) == 0
        found = mutate.read(results).values()
        where = {one["where"] for one in found if one["outcome"] == "killed"}
        assert where == {f"{path.relative_to(small)}::{name}"}

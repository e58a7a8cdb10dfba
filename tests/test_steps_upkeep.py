"""What steps.py keeps and does: each thing that it keeps can fail, and a reader's way through."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import LONGEST_SECONDS

ROOT = Path(__file__).resolve().parent.parent
STALE = "is stale; run steps.py readme: the diff and the code on a page are those of the files"
NAMES = sorted(path.name for path in (ROOT / "steps").glob("[0-9][0-9]_*"))


def steps(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "steps/steps.py", *words],
        cwd=root,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The steps and the package in a repository of their own, all committed."""
    skip = shutil.ignore_patterns("__pycache__", ".propagate")
    for name in ("steps", "rosetrainer"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def refused(root: Path, *which: str) -> str:
    """Why `check` of all, of one step, or of the core says no."""
    done = steps(root, "check", *which)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_what_check_keeps_holds() -> None:
    done = steps(ROOT, "check")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == NAMES


def test_readme_changes_nothing_in_the_present_tree(root: Path) -> None:
    before = {page: page.read_text() for page in root.glob("steps/*/README*.md")}
    assert steps(root, "readme").returncode == 0
    assert {page: page.read_text() for page in root.glob("steps/*/README*.md")} == before


def test_check_fails_on_a_stale_diff(root: Path) -> None:
    path = root / "steps/02_loss_and_train_loop/data.py"
    path.write_text(path.read_text() + "\nEXTRA = 1\n")
    stale = f"02_loss_and_train_loop/README.md {STALE}"
    assert refused(root, "02") == refused(root) == stale
    assert steps(root, "check", "01").returncode == 0


def test_check_fails_on_a_stale_excerpt(root: Path) -> None:
    page = root / "steps/04_column_parallel_linear/README.md"
    name = "ColumnParallelLinear.forward"
    block = f"\n<!-- code: tensor_parallel.py {name} -->\nold\n<!-- /code -->\n"
    page.write_text(page.read_text() + block)
    assert refused(root, "04") == f"04_column_parallel_linear/README.md {STALE}"
    assert steps(root, "readme", "04").returncode == 0
    assert "        y = F.linear(x, self.weight, self.bias)" in page.read_text().split(name)[-1]


def test_an_excerpt_of_nothing_is_refused(root: Path) -> None:
    page = root / "steps/04_column_parallel_linear/README.md"
    page.write_text(page.read_text() + "\n<!-- code: comm.py nothing -->\n<!-- /code -->\n")
    assert refused(root, "04") == (
        "04_column_parallel_linear/comm.py has no nothing, which a line <!-- code: --> of its page "
        "asks for; name a class, function or method that is there"
    )


def test_check_fails_on_a_page_without_a_place_for_its_diff(root: Path) -> None:
    page = root / "steps/04_column_parallel_linear/README.md"
    page.write_text(page.read_text().replace("<!-- diff ", "<!-- "))
    assert refused(root, "04") == (
        "04_column_parallel_linear/README.md has no lines <!-- diff NAME.py --> and <!-- /diff "
        "-->; write them where the diff belongs and name the files that hold the step's idea, then "
        "run steps.py readme, which fills in what changed"
    )


def test_a_diff_shows_the_idea_first_and_folds_the_rest(root: Path) -> None:
    page = root / "steps/07_row_parallel_ffn/README.md"
    shown = page.read_text().split("<!-- diff model.py -->")[1].split("<!-- /diff -->")[0]
    idea, _, rest = shown.partition("<details>")
    counts = [
        len(re.findall(r"```diff\n(.*?)```", text, re.S)[0].splitlines()) for text in (idea, rest)
    ]
    assert f"in {counts[0]} of the diff's {sum(counts)} lines, in `model.py`" in idea
    assert f": {counts[1]} lines</summary>" in rest
    assert "+++ 07_row_parallel_ffn/model.py" in idea
    assert "+++ 07_row_parallel_ffn/test_forward_tp.py" in rest
    page.write_text(page.read_text().replace("<!-- diff model.py -->", "<!-- diff comm.py -->"))
    assert refused(root, "07") == (
        "07_row_parallel_ffn/README.md names comm.py in its line <!-- diff -->, which the step "
        "does not change; it can be model.py, test_forward_tp.py"
    )


def test_check_fails_on_what_is_not_python(root: Path) -> None:
    path = root / "steps/02_loss_and_train_loop/data.py"
    path.write_text(path.read_text() + "\ndef broken(:\n")
    number = len(path.read_text().splitlines())
    assert refused(root, "02") == (
        f"02_loss_and_train_loop/data.py line {number} is not Python: invalid syntax"
    )


def test_check_fails_on_two_hundred_lines_of_code_but_not_of_comments(root: Path) -> None:
    path = root / "steps/07_row_parallel_ffn/data.py"
    source = path.read_text()
    path.write_text(source + "".join(f"A{n} = {n}\n" for n in range(200)))
    steps(root, "readme", "07")
    assert re.fullmatch(
        r"07_row_parallel_ffn adds 2\d\d lines of code; at most 200, so that a step is read in one "
        "sitting: leave out what is not its idea, or make two steps",
        refused(root, "07"),
    )
    # Comments do not count, nor do lines that only moved.
    path.write_text(source + "\n# a comment\n\n" * 200)
    steps(root, "readme", "07")
    assert steps(root, "check", "07").returncode == 0


def test_check_fails_on_an_import_of_the_package(root: Path) -> None:
    edit(
        root / "steps/00_two_ranks/two_ranks.py", "import sys\n", "import sys\nimport rosetrainer\n"
    )
    steps(root, "readme", "00")
    assert refused(root, "00") == (
        "00_two_ranks/two_ranks.py imports the package; write what it needs into the step: a step "
        "is complete and runs from inside its own folder"
    )


@pytest.mark.parametrize(
    "old, new, what",
    [
        (
            "python train.py\n",
            "python trian.py\n",
            r"code, in line \d+ of them `python train.py` and `python trian.py`",
        ),
        ("\n## ", "\n### ", "headings, in line 2 of them `##` and `###`"),
        ("0.025780", "0.025870", "figures, 0.025780 and 0.025870"),
    ],
)
def test_check_fails_where_the_languages_differ(root: Path, old: str, new: str, what: str) -> None:
    page = root / "steps/01_minimal_gpt/README.zh.md"
    text = page.read_text()
    assert old in text
    page.write_text(text.replace(old, new, 1))
    assert re.fullmatch(
        f"01_minimal_gpt: the two languages show different {what}; make README.md and "
        "README.zh.md equal there: both teach the same facts",
        refused(root, "01"),
    )


def test_check_fails_on_a_heading_that_the_other_pages_do_not_have(root: Path) -> None:
    for name, old, new in (
        ("README.md", "\n## Still naive\n", "\n## What is missing\n"),
        ("README.zh.md", "\n## 还有哪些不足\n", "\n## 缺什么\n"),
    ):
        edit(root / "steps/07_row_parallel_ffn" / name, old, new)
    steps(root, "readme", "07")
    assert refused(root, "07") == (
        "07_row_parallel_ffn/README.md has the heading `What is missing` where `Still naive` "
        "belongs; all pages have the same ones in the same order (SECTIONS in steps/pages.py), so "
        "that a reader finds them"
    )


def test_check_fails_on_a_script_that_imports_what_the_step_has_not(root: Path) -> None:
    for page in (root / "steps/04_column_parallel_linear").glob("README*.md"):
        edit(page, "import ColumnParallelLinear, shard_spec\n", "import RowParallelLinear\n")
    assert refused(root, "04") == (
        "04_column_parallel_linear/README.md has a script that imports RowParallelLinear from "
        "tensor_parallel.py, which has none; write the file that it is in now, and run the script: "
        "its output stands on the page"
    )


def test_check_fails_on_a_patch_to_what_the_step_has_not(root: Path) -> None:
    for page in (root / "steps/07_row_parallel_ffn").glob("README*.md"):
        text = page.read_text()
        at = text.index("```diff\n-        self.dense_h_to_4h")
        page.write_text(text[:at] + "```diff\n-    old = 1\n+    new = 1\n```\n\n" + text[at:])
    assert refused(root, "07") == (
        "07_row_parallel_ffn/README.md has a patch to `old = 1`, which no file of the step has; "
        "write it for the code as it is, and look whether its answer still holds"
    )


def test_check_fails_on_a_prediction_without_an_answer(root: Path) -> None:
    page = root / "steps/07_row_parallel_ffn/README.zh.md"
    page.write_text(re.sub(r"\n2\. .*\n3\. .*\n\n</details>", "\n\n</details>", page.read_text()))
    assert refused(root, "07") == (
        "07_row_parallel_ffn/README.zh.md asks 3 predictions and answers 1; under `答案`, folded "
        "in <details>, each gets an answer in a numbered line"
    )


def test_check_fails_on_a_page_without_a_place_for_its_end(root: Path) -> None:
    page = root / "steps/07_row_parallel_ffn/README.md"
    page.write_text(page.read_text().replace("<!-- built -->\n", ""))
    assert refused(root, "07") == (
        "07_row_parallel_ffn/README.md has no lines <!-- built --> and <!-- /built -->; write "
        "them under `What you have built`, then run steps.py readme, which fills it in"
    )


def test_an_end_counts_lines_and_checks_and_links_what_comes_next(root: Path) -> None:
    page = root / "steps/07_row_parallel_ffn/README.md"
    table = page.read_text().split("<!-- built -->")[1]
    code = re.findall(r"code \| (\d+) lines with the tests, 11 of them new", table)
    (root / "steps/07_row_parallel_ffn/more.py").write_text('"""Not counted."""\n\nX = 1  # code\n')
    test = root / "steps/07_row_parallel_ffn/test_forward_tp.py"
    test.write_text(test.read_text() + "\n\ndef check_nothing() -> None:\n    pass\n")
    assert steps(root, "readme", "07").returncode == 0
    table = page.read_text().split("<!-- built -->")[1]
    assert f"code | {int(code[0]) + 3} lines with the tests, 14 of them new" in table
    assert "| 6 checks in `test_forward_tp.py` |" in table
    assert "(../08_row_parallel_attention/README.md); on the afternoon's route: [09" in table
    nine = (root / "steps/09_parallel_attention/README.zh.md").read_text()
    assert "(../10_cross_attention/README.zh.md)（支线）；[11 · " in nine
    assert "(../../rosetrainer/README.md)" in (root / f"steps/{NAMES[-1]}/README.md").read_text()


@pytest.mark.parametrize(
    "line, what",
    [
        ("每个 rank 拿着一片。", "says 拿着; the field says 持有"),
        ("再收集 logits。", "says 收集; the field says gather 或 all-gather"),
        ("读参数的 shard spec。", "says shard spec; the field says 切分说明"),
        ("存 checkpoint，再读。", "says checkpoint; the field says 检查点"),
        (
            "见[下一步](../08_row_parallel_attention/)。",
            "links to a folder, which shows the English page: ](../08_row_parallel_attention/)",
        ),
        ("见[首页](../../README.md#a)。", "links to the English page: ](../../README.md"),
        (
            "在 08 的基础上修改。",
            "names a step without 步骤 in front of its number: 在 08 的基础",
        ),
        ("到 08 步为止。", "names a step without 步骤 in front of its number: 08 步"),
        ("对,错。", "has half-width punctuation between Chinese characters: 对,"),
        ("每个rank", "lacks a space between Chinese and Latin: 个r"),
        ("**真，**假", "does not show 真， bold: let it end before its ，"),
    ],
)
def test_check_fails_on_chinese_that_breaks_a_rule(root: Path, line: str, what: str) -> None:
    page = root / "steps/07_row_parallel_ffn/README.zh.md"
    told = (
        "import sys; sys.path.insert(0, 'steps'); from pathlib import Path; import chinese; "
        f"chinese.check_chinese([Path({str(page)!r})])"
    )
    text = page.read_text()
    page.write_text(f"{text}\n`拿着`\n```text\n拿着\n```\n")  # code does not count
    assert subprocess.run([sys.executable, "-c", told], cwd=root, check=False).returncode == 0
    page.write_text(f"{text}\n{line}\n")
    done = subprocess.run(
        [sys.executable, "-c", told], cwd=root, capture_output=True, text=True, check=False
    )
    number = page.read_text().count("\n")
    assert done.stderr.splitlines()[-1] == (
        f"ladder.StepError: steps/07_row_parallel_ffn/README.zh.md line {number} {what}"
    )


def test_check_fails_where_a_pair_replaces_what_is_no_longer_there(root: Path) -> None:
    page = root / "steps/14_dropout_by_coordinates/README.md"
    assert 'text = f"{seed.seed}:{self.site}"\n```' in page.read_text().split("<!-- pair -->")[1]
    edit(
        root / "steps/14_dropout_by_coordinates/dropout.py",
        'text = f"{seed.seed}:{seed.step}:{self.site}"',
        'text = f"{seed.step}:{seed.seed}:{self.site}"',
    )
    assert refused(root, "14") == (
        "14_dropout_by_coordinates/dropout.py has no longer what the pair of the step replaces "
        "(PAIRS in steps/curves.py); change it there, then measure it by steps/plots.py: the page "
        "shows it"
    )


def test_check_fails_on_a_missing_page(root: Path) -> None:
    (root / "steps/01_minimal_gpt/README.zh.md").unlink()
    assert refused(root, "01") == (
        "01_minimal_gpt/README.zh.md is missing; write it with the headings of the other "
        "language's page: a step is taught in both"
    )


def test_check_fails_on_a_mistake_that_does_not_apply(root: Path) -> None:
    edit(root / "steps/09_parallel_attention/mistake.patch", "stride=3, tp=tp", "stride=4, tp=tp")
    assert re.fullmatch(
        r"09_parallel_attention/mistake.patch does not apply: patch failed: model.py:\d+; make its "
        "change once more, write `git diff --relative` under the patch's first paragraph, and take "
        "it back: readers try it with steps.py",
        refused(root, "09"),
    )


def test_check_fails_on_a_step_without_a_mistake(root: Path) -> None:
    (root / "steps/09_parallel_attention/mistake.patch").unlink()
    assert refused(root, "09") == (
        "09_parallel_attention/mistake.patch is missing; say what is wrong in its first paragraph, "
        "and under it `git diff --relative` of a mistake that the step's test catches: readers "
        "plant it with steps.py break"
    )


NOT_THE_PACKAGE_S = f"{NAMES[-1]}/comm.py is not the package's parallel/comm.py"
CARRY_ON = "then run steps.py propagate and readme: what a step teaches is what the package does"


def test_check_fails_where_the_core_is_not_the_package_s(root: Path) -> None:
    edit(
        root / "rosetrainer/parallel/comm.py",
        "    return x if axis.size == 1 else _Copy",
        "    return _Copy",
    )
    line = "return x if axis.size == 1 else _Copy.apply(x, axis)"
    assert refused(root, "core") == (
        f"{NOT_THE_PACKAGE_S}: `{line}` against `return _Copy.apply(x, axis)`; change it in "
        f"04_column_parallel_linear, the first step that has the line, {CARRY_ON}"
    )


def test_check_fails_where_the_core_imports_something_else(root: Path) -> None:
    old = "from contextlib import nullcontext\n"
    edit(root / "rosetrainer/parallel/recompute.py", old, f"import os\n{old}")
    assert refused(root, "core") == (
        f"{NAMES[-1]}/recompute.py is not the package's parallel/recompute.py: only "
        f"one of them imports os; make them equal, {CARRY_ON}"
    )


def test_check_fails_where_a_file_of_the_core_has_another_name(root: Path) -> None:
    (root / "rosetrainer/parallel/comm.py").rename(root / "rosetrainer/parallel/collectives.py")
    assert refused(root) == (
        "rosetrainer/parallel/comm.py is not there; CORE in steps/upkeep.py names it as code that "
        "the steps and the package share: give it its new name"
    )


def test_check_fails_where_a_function_is_not_that_of_the_step(root: Path) -> None:
    """Where the package may have more of them."""
    path = root / "rosetrainer/optim/non_finite.py"
    assert path.read_text().count("\ndef ") > 1
    path.write_text(re.sub(r"\ndef (\w+)\(", r"\ndef its_\1(", path.read_text(), count=1))
    assert " is not the package's optim/non_finite.py: `" in refused(root, "core")


def test_check_fails_where_the_package_computes_something_else(root: Path) -> None:
    """Outside the core too: here the config's idea of the feed-forward layer's width."""
    edit(root / "rosetrainer/model_config.py", "else 4 * self.d_model", "else 3 * self.d_model")
    assert refused(root, "core") == (
        "step 09 and the package compute different logits; a default or an initial weight has "
        "changed outside the core (config.py, models/): take it back, or change it in the steps "
        "too: their pages show the package's numbers"
    )


def test_check_fails_in_one_line_where_the_package_does_not_run(root: Path) -> None:
    edit(root / "rosetrainer/config.py", "IGNORED = -100", "IGNORED = nothing")
    assert refused(root, "core") == (
        f"rosetrainer.models.gpt in {root.name} makes no logits: NameError: name 'nothing' is not "
        "defined"
    )


NOTHING = "nothing to carry: no step differs from the last commit\n"
FIX = ("x - x.mean()", "x - x.sum() / len(x)")


def test_propagate_of_the_present_tree_changes_nothing(root: Path) -> None:
    done = steps(root, "propagate")
    assert (done.returncode, done.stdout) == (0, NOTHING)
    assert subprocess.run(["git", "diff", "--quiet"], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("committed", [False, True])
def test_check_fails_on_a_fix_that_was_not_carried_on(root: Path, committed: bool) -> None:
    edit(root / "steps/06_row_parallel_linear/oracle.py", *FIX)
    if committed:
        git(root, "commit", "-qam", "a fix in one step alone")
    first = "steps/07_row_parallel_ffn/oracle.py"
    command = ["propagate", "HEAD~1"] if committed else ["propagate"]
    assert refused(root, "core") == (
        f"{first} lacks a change of its parent; run steps.py {' '.join(command)}: a fix in one "
        "step alone leaves the fault in those that grow out of it"
    )
    assert steps(root, *command).returncode == 0
    assert steps(root, "check", "core").returncode == 0


def test_propagate_carries_a_fix_to_all_that_grow_out_of_it_and_to_the_package(root: Path) -> None:
    edit(root / "steps/02_loss_and_train_loop/oracle.py", *FIX)
    name, better = "def own_slice(", "# A slice.\ndef own_slice("
    edit(root / "steps/04_column_parallel_linear/comm.py", name, better)
    done = steps(root, "propagate")
    assert done.returncode == 0, done.stderr
    later = [folder for folder in NAMES if folder > "03"]
    for folder in later:
        assert FIX[1] in (root / "steps" / folder / "oracle.py").read_text()
    assert all(f"steps/{folder}/oracle.py" in done.stdout for folder in later)
    for path in (root / "steps/10_cross_attention/comm.py", root / "rosetrainer/parallel/comm.py"):
        assert better in path.read_text()
    assert steps(root, "propagate").stdout == NOTHING
    steps(root, "readme")
    done = steps(root, "check")
    assert done.returncode == 0, done.stderr


def test_propagate_stops_at_a_conflict_and_goes_on_once_it_is_mended(root: Path) -> None:
    file = "comm.py"
    old = "    width = tensor.shape[dim] // axis.size\n"
    edit(root / "steps/06_row_parallel_linear" / file, old, old + "    width = int(width)\n")
    assert steps(root, "propagate").returncode == 0
    git(root, "commit", "-qam", "from step 06 on, the line has a neighbour")
    edit(root / "steps/04_column_parallel_linear" / file, old, old + "    assert width\n")
    done = steps(root, "propagate")
    assert done.returncode == 2
    conflict = "steps/06_row_parallel_linear/comm.py"
    assert done.stderr == (
        f"error: conflict in {conflict}; mend it at <<<<<<<, then run propagate again\n"
    )
    assert "    assert width\n" in (root / "steps/05_use_column_parallel" / file).read_text()
    again = steps(root, "propagate")
    assert again.stderr == done.stderr, "it is not mended yet"
    assert refused(root, "06") == (
        f"{conflict[6:]} holds a conflict; mend it at <<<<<<<, then run steps.py "
        "propagate, which goes on from there"
    )
    text = (root / conflict).read_text()
    before, rest = text.split("<<<<<<<")
    _, after = rest.split(">>>>>>>")
    mended = "    width = int(width)\n    assert width\n"
    (root / conflict).write_text(before + mended + after.split("\n", 1)[1])
    done = steps(root, "propagate")
    assert done.returncode == 0, done.stderr
    for folder in ("07_row_parallel_ffn", "10_cross_attention"):
        assert mended in (root / "steps" / folder / file).read_text()
    assert mended in (root / "rosetrainer/parallel" / file).read_text()


def test_start_gives_the_step_before_with_this_step_s_tests(root: Path) -> None:
    done = steps(root, "start", "07", "mine")
    assert done.returncode == 0, done.stderr
    mine, six, seven = (
        root / "mine",
        root / "steps/06_row_parallel_linear",
        root / "steps/07_row_parallel_ffn",
    )
    test = "test_forward_tp.py"
    assert (mine / "model.py").read_text() == (six / "model.py").read_text()
    assert (mine / test).read_text() == (seven / test).read_text()
    assert "test --mine mine 07" in done.stdout
    assert steps(root, "start", "07", "mine").stderr == (
        "error: mine is not empty; name a new folder\n"
    )


def test_mine_is_red_until_it_is_written_and_green_then(root: Path) -> None:
    assert steps(root, "start", "02", "mine").returncode == 0
    done = steps(root, "test", "--mine", "mine", "02")
    assert (done.returncode, done.stderr) == (1, "")
    red, error = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"red: mine/test_forward\.py line \d+: (from|import) .*", red)
    assert error.startswith(("ImportError", "ModuleNotFoundError"))
    for file in (root / "steps/02_loss_and_train_loop").glob("*.py"):
        shutil.copy(file, root / "mine")
    (root / "mine/test_forward.py").write_text("raise SystemExit(3)")  # the step's own counts
    done = steps(root, "test", "--mine", "mine", "02")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "green: step 02 is yours"
    edit(root / "mine/model.py", "    itself = torch.eye(", "    itself = torch.eyes(")
    done = steps(root, "test", "--mine", "mine", "02")
    assert done.returncode == 1
    red, error = done.stdout.splitlines()[-2:]
    line = (root / "mine/model.py").read_text().split("torch.eyes")[0].count("\n") + 1
    assert red.startswith(f"red: mine/model.py line {line}: itself = torch.eyes(")
    assert error.startswith("AttributeError: module 'torch' has no attribute 'eyes'")
    missing = steps(root, "test", "--mine", "yours", "02")
    assert (
        missing.stderr == "error: there is no folder yours; begin with: steps.py start 02 yours\n"
    )


@pytest.mark.parametrize(
    "rank_0, red",
    [
        (
            "RuntimeError: Connection closed by peer [127.0.0.1]:1.",
            'mine/test_it.py line 2: difference("Y", y, dense)\n'
            "AssertionError: Y differs by 2.1e+00, see mine/model.py\n",
        ),
        ("ValueError: no", "mine/model.py line 1: y = layer(x)\nValueError: no\n"),
    ],
)
def test_red_is_the_first_rank_that_failed_by_itself_and_not_one_that_was_left_waiting(
    tmp_path: Path, rank_0: str, red: str
) -> None:
    """Nor torchrun's report, nor the oracle's comparison, but the line that asked for it."""
    (tmp_path / "test_it.py").write_text('first\n    difference("Y", y, dense)\n')
    (tmp_path / "model.py").write_text("y = layer(x)\n")
    at = f'  File "{tmp_path}/'
    stderr = "".join(
        line + "\n"
        for line in (
            "[rank1]: Traceback (most recent call last):",
            "[rank0]: Traceback (most recent call last):",
            f'[rank0]: {at}model.py", line 1, in forward',
            f'[rank1]: {at}test_it.py", line 2, in main',
            f'[rank1]: {at}oracle.py", line 9, in difference',
            f"[rank0]: {rank_0}",
            f"[rank1]: AssertionError: Y differs by 2.1e+00, see {tmp_path}/model.py",
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        )
    )
    told = (
        "import sys; sys.path.insert(0, 'steps'); from pathlib import Path; from tries import "
        "failure; print(failure(sys.stdin.read(), Path(sys.argv[1]), Path('mine')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", told, str(tmp_path)],
        cwd=ROOT,
        input=stderr,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == red


@pytest.mark.mutant
def test_break_shows_what_turns_red_and_what_stays_green() -> None:
    done = steps(ROOT, "break", "06")
    assert done.returncode == 0, done.stderr
    told, _, listed = done.stdout.partition("\nred, and by how much of its largest value\n")
    assert told.startswith("Every rank adds the bias before the sum")
    assert "test_forward_tp.py: red, AssertionError: Y differs by" in told
    red, _, green = listed.partition("\ngreen\n")
    assert [line.split("  ")[-1] for line in red.split("\n") if line] == ["Y"]
    assert "  logits\n" in green


def test_new_makes_the_next_step_with_pages_to_fill_in(root: Path) -> None:
    done = steps(root, "new", "42_from_the_last")
    assert done.returncode == 0, done.stderr
    step = root / "steps/42_from_the_last"
    assert (step / "model.py").exists()
    page = (step / "README.zh.md").read_text()
    assert "\n## 代码改动\n\n<!-- diff -->" in page
    assert "\n## 自己写一遍\n\n<!-- mine -->" in page
    assert "grows out of" not in (step / "README.md").read_text()
    assert steps(root, "new", "43_from_09", "09").returncode == 0
    assert not (root / "steps/43_from_09/encoder_decoder.py").exists()
    page = (root / "steps/43_from_09/README.md").read_text()
    assert "It grows out of [09](../09_parallel_attention/README.md)." in page
    again = steps(root, "new", "42_from_the_last")
    assert again.stderr.startswith("error: 42_from_the_last should be like 42_what_it_adds")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["test", "77"],
            f"there is no step 77; it can be {', '.join(n[:2] for n in NAMES)}",
        ),
        (["propagate", "x"], "git knows no commit x; git log --oneline lists them"),
        (["tset", "01"], "no such command: tset 01; steps.py --help lists them"),
        (["test", "03", "0"], "no such command: test 03 0; steps.py --help lists them"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], message: str) -> None:
    done = steps(ROOT, *words)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")

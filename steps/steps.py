"""Reads, tries and keeps the steps: python steps/steps.py COMMAND

for readers
  test NN [N]         runs the tests of step NN, on N ranks (2) where it has ranks
  start NN DIR        the step before, with this step's tests: write the step yourself in DIR
  test --mine DIR NN  runs the tests of step NN on what you wrote
  break NN            plants a known mistake, and shows what turns red and what stays green

for keepers
  readme [NN]         writes each page's diff, excerpts and picture from the real files
  propagate [COMMIT]  carries a fix, what changed since COMMIT (HEAD), from its step to those that
                      grow out of it, and to the package
  check               all of it holds: fresh pages, both languages, 200 lines, the core, propagate
  rehearse            runs each step's tests and a short training, on 1, 2 and 4 ranks
  new NN_NAME [NN]    the next step, a copy of the last one (or of NN) with pages to fill in
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import check
from ladder import STEPS, StepError, added_code, find, folders, parent, python_files
from pages import SECTIONS, readme
from upkeep import git, propagate, with_mistake

REPORT = """    worst_of_all = worst / max(float(largest), 1e-300)
    color = "green" if worst <= TOLERANCE * largest else "red"
    import os
    os.write(1, f"{color}\\t{name}\\t{worst_of_all:.1e}\\n".encode())
"""
SHOWN = 12  # names of tensors in a list
BLANKS = {  # of a new page, for `readme` and the author to fill in
    "The diff": "\n<!-- diff -->\n<!-- /diff -->\n",
    "What you have built": "\n<!-- built -->\n<!-- /built -->\n",
}


def test_files(step: Path) -> list[str]:
    return [name for name in python_files(step) if name.startswith("test_")]


def has_ranks(step: Path) -> bool:
    return (step / "comm.py").exists()


def command(script: str, step: Path, ranks: int) -> list[str]:
    """How to start a script of the step: by torchrun where the step has ranks."""
    if not has_ranks(step):
        return [sys.executable, script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *torchrun, script]


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1"} | os.environ


def test(number: str, ranks: int = 2, mine: Path | None = None) -> int:
    """The exit status of the step's tests, on the reader's files if they are given."""
    step = find(number)
    if mine and not mine.is_dir():
        raise StepError(f"there is no folder {mine}; begin with: steps.py start {number} {mine}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = step
        if mine:
            folder = Path(scratch)
            copy(mine, folder, python_files(mine))
            copy(step, folder, given(step))
        for script in test_files(step):
            done = subprocess.run(
                command(script, step, ranks), cwd=folder, env=environment(), check=False
            )
            if done.returncode:
                return done.returncode
    return 0


def copy(origin: Path, target: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(origin / name, target / name)


def given(step: Path) -> list[str]:
    """The files that a reader who writes the step is given: its tests and their oracle."""
    return [name for name in python_files(step) if name.startswith("test_") or name == "oracle.py"]


def start(number: str, folder: Path) -> None:
    step = find(number)
    if folder.exists() and any(folder.iterdir()):
        raise StepError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if before := parent(step):
        dropped = set(python_files(before)) - set(python_files(step))
        copy(before, folder, [name for name in python_files(before) if name not in dropped])
    copy(step, folder, given(step))
    print(f"{folder}: {before.name if before else 'nothing'}, with the tests of {step.name}")
    python = shlex.quote(os.path.relpath(sys.executable))
    print(f"Write the step, then: {python} steps/steps.py test --mine {folder} {number}")


def plant(number: str) -> int:
    """Runs the step's tests on a copy with its mistake; status 0 if they turn red."""
    step = find(number)
    what, _, patch = (step / "mistake.patch").read_text().partition("\n\n")
    print(" ".join(what.split()), patch, sep="\n\n")
    red = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, text in with_mistake(step).items():
            (folder / name).write_text(text)
        for script in test_files(step):
            red |= bool(tell(script, step, folder))
        oracle = folder / "oracle.py"
        if oracle.exists():
            asserts = r"    assert worst <= TOLERANCE \* largest,.*\n"
            oracle.write_text(re.sub(asserts, lambda match: REPORT, oracle.read_text()))
            compared(step, folder)
    if not red:
        print("nothing turned red: the tests do not see this mistake")
    return 0 if red else 1


def tell(script: str, step: Path, folder: Path) -> int:
    """Runs a test; prints where it stopped. Returns its exit status."""
    done = capture(command(script, step, 2), folder)
    if done.returncode == 0:
        print(f"{script}: green")
        return 0
    frames = re.findall(r'File "[^"]*?(\w+\.py)", line (\d+)', done.stderr)
    own = [f"{name} line {line}" for name, line in frames if name in test_files(step)]
    errors = re.findall(r"AssertionError(?:: .*)?$", done.stderr, re.MULTILINE)
    print(f"{script}: red, {errors[-1] if errors else 'no assertion'} ({own[-1] if own else '?'})")
    return done.returncode


def capture(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def compared(step: Path, folder: Path) -> None:
    """Prints each compared tensor: red, by how much of its largest value, or green."""
    worst: dict[str, tuple[bool, float]] = {}
    for script in test_files(step):
        for line in capture(command(script, step, 2), folder).stdout.splitlines():
            color, _, rest = line.partition("\t")
            if color in ("red", "green"):
                name, _, size = rest.partition("\t")
                worst[name] = max(worst.get(name, (False, 0.0)), (color == "red", float(size)))
    for is_red, title in ((True, "red, and by how much of its largest value"), (False, "green")):
        names = [name for name in worst if worst[name][0] == is_red]
        if names:
            print(f"\n{title}")
        for name in names[:SHOWN]:
            print(f"  {worst[name][1]:.1e}  {name}" if is_red else f"  {name}")
        if len(names) > SHOWN:
            print(f"  and {len(names) - SHOWN} more")


def rehearse() -> int:
    """The first exit status that is not 0, or 0."""
    for step in folders():
        scripts = [[name] for name in test_files(step)]
        scripts += [["train.py", "--steps", "20"]] if has_ranks(step) else []
        for ranks in (1, 2, 4) if has_ranks(step) else (1,):
            for script, *flags in scripts:
                print(f"\n{step.name}, {ranks} ranks: {' '.join([script, *flags])}", flush=True)
                words = [*command(script, step, ranks), *flags]
                done = subprocess.run(words, cwd=step, env=environment(), check=False)
                if done.returncode:
                    return done.returncode
    return 0


def new(name: str, out_of: str | None = None) -> None:
    last = folders()[-1]
    origin = find(out_of) if out_of else last
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name) or name <= last.name:
        raise StepError(f"{name} should be like 42_what_it_adds, and come after {last.name}")
    step = STEPS / name
    step.mkdir()
    copy(origin, step, python_files(origin))
    for page, switch in (
        ("README.md", "English | [中文](README.zh.md)"),
        ("README.zh.md", "[English](README.md) | 中文"),
    ):
        text = f"{switch}\n\n# {name[:2]}: {name[3:].replace('_', ' ')}\n"
        if origin != last:
            text += f"\nIt grows out of [{origin.name[:2]}](../{origin.name}/{page}).\n"
        for section in SECTIONS.items():
            text += f"\n## {section[page == 'README.zh.md']}\n{BLANKS.get(section[0], '')}"
        (step / page).write_text(text)
    print(f"steps/{name}: the files of {origin.name}; write mistake.patch, the pages and the")
    print("picture (steps/pictures/album.py), then: steps.py readme, steps.py check")


def main(argv: list[str]) -> int:
    match argv:
        case ["test", number]:
            return test(number)
        case ["test", "--mine", folder, number]:
            return test(number, mine=Path(folder))
        case ["test", number, ranks] if ranks.isdecimal() and int(ranks):
            return test(number, int(ranks))
        case ["start", number, folder]:
            start(number, Path(folder))
        case ["break", number]:
            return plant(number)
        case ["readme"]:
            readme(folders())
        case ["readme", number]:
            readme([find(number)])
        case ["propagate", *commit] if len(commit) < 2:
            if commit and git("cat-file", "-e", f"{commit[0]}^{{commit}}").returncode:
                raise StepError(f"git knows no commit {commit[0]}; git log --oneline lists them")
            changed = propagate(since=(commit or ["HEAD"])[0])
            print("\n".join(changed) or "nothing to carry: no step differs from the last commit")
        case ["check"]:
            check()
            for step in folders():
                print(f"{step.name}: {added_code(step)} added lines of code")
        case ["rehearse"]:
            return rehearse()
        case ["new", name, *out_of] if len(out_of) < 2:
            new(name, *out_of)
        case [] | ["-h"] | ["--help"]:
            print(__doc__)
        case _:
            raise StepError(f"no such command: {' '.join(argv)}; steps.py --help lists them")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""What a reader tries with a step: its tests, a folder of one's own, a planted mistake."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ladder import StepError, find, given, parent, python_files, read
from upkeep import with_mistake

REPORT = """    worst_of_all = worst / max(float(largest), 1e-300)
    color = "green" if worst <= TOLERANCE * largest else "red"
    import os
    os.write(1, f"{color}\\t{name}\\t{worst_of_all:.1e}\\n".encode())
"""
SHOWN = 12  # names of tensors in a list
WAIT = 60  # seconds of a rank for another, in a reader's folder: there a hang is a mistake
FOLLOWS = re.compile("Connection (closed|reset)")  # the error of a rank whose neighbour died
# With what assert_close says below its first line: the two numbers, or how far two tensors differ.
ERROR = re.compile(
    r"^\w[\w.]*(?:Error|Exception|Interrupt)\b.*?(?:!\n\n(?:Expected|Mismatched|Greatest).*)?$",
    re.M,
)


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


def test(number: str, ranks: int = 2) -> int:
    """The exit status of the step's tests."""
    step = find(number)
    for script in test_files(step):
        words = command(script, step, ranks)
        done = subprocess.run(words, cwd=step, env=environment(), check=False)
        if done.returncode:
            return done.returncode
    return 0


def test_mine(number: str, mine: Path) -> int:
    """Runs the step's tests on the reader's files; the last line is the verdict.

    Returns 0 if all are green, else 1.
    """
    step = find(number)
    if not mine.is_dir():
        raise StepError(f"there is no folder {mine}; begin with: steps.py start {number} {mine}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy(mine, folder, python_files(mine))
        copy(step, folder, given(step))
        ends = wait_less(folder)
        for script in test_files(step):
            print(f"{script}{' on 2 ranks' if has_ranks(step) else ''}{ends}", flush=True)
            done = capture(command(script, step, 2), folder)
            print(done.stdout, end="")
            if done.returncode:
                print(f"red: {failure(done.stderr, folder, mine)}")
                return 1
    print(f"green: step {step.name[:2]} is yours")
    return 0


def wait_less(folder: Path) -> str:
    """Ranks in this folder wait WAIT seconds for each other, not five minutes. Returns the news."""
    file = folder / "parallel_context.py"
    wait = r"(timeout_seconds: float = )[\d.]+"
    if not file.exists() or not re.search(wait, file.read_text()):
        return ""
    file.write_text(re.sub(wait, rf"\g<1>{WAIT}", file.read_text()))
    return f"; a collective that a rank leaves out ends after {WAIT} seconds"


def failure(stderr: str, folder: Path, mine: Path) -> str:
    """Where a run of the files in `folder` failed, told as a line of the reader's folder, and why.

    Of several ranks the first that failed by itself counts, not one that lost its neighbour. A
    helper of the oracle compares, so the line that called it is told.
    """
    ranks: dict[str, str] = {}
    for line in stderr.splitlines(keepends=True):
        rank, text = re.fullmatch(r"(?s)(\[rank\d+\]: )?(.*)", line).groups()
        ranks[rank or ""] = ranks.get(rank or "", "") + text
    frame = re.compile(rf'File "{re.escape(str(folder))}/(\w+\.py)", line (\d+)')
    for _, text in sorted(ranks.items(), key=lambda item: (bool(FOLLOWS.search(item[1])), item[0])):
        frames = [(m[1], int(m[2])) for m in frame.finditer(text) if m[1] != "oracle.py"]
        errors = ERROR.findall(text)
        if frames and errors:
            name, number = frames[-1]
            source = read(folder / name)[number - 1].strip()
            error = " ".join(errors[0].split()).replace(str(folder), str(mine))
            return f"{mine / name} line {number}: {source}\n{error}"
    told = re.findall(
        r"^error: .*$", stderr, re.MULTILINE
    )  # a ConfigError, told without a traceback
    return told[0] if told else stderr.strip().rpartition("\n")[2]


def copy(origin: Path, target: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(origin / name, target / name)


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

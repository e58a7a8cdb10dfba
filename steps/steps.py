"""Reads, tries and keeps the steps: python steps/steps.py COMMAND

for readers
  test NN [N]         runs the tests of step NN, on N ranks (2) where it has ranks
  start NN DIR        the step before, with this step's tests: write the step yourself in DIR
  test --mine DIR NN  runs the tests of step NN on what you wrote
  break NN            plants a known mistake, and shows what turns red and what stays green
  guide N DIR         the guide's own model after its first N edits, with its proof, in DIR
  guide break N       plants the guide's mistake N, and shows what its command prints

for keepers
  readme [NN]         writes each page's diff, excerpts and picture from the real files
  readme guide        runs the guide's commands, and writes its diffs and their output
  propagate [COMMIT]  carries a fix, what changed since COMMIT (HEAD), from its step to those that
                      grow out of it, and to the package
  check [NN | core]   all of it holds, or what one step has to itself, or what the package shares:
                      fresh pages, both languages, 200 lines; the core, propagate; or the `guide`
  rehearse            runs each step's tests and a short training, on 1, 2 and 4 ranks
  new NN_NAME [NN]    the next step, a copy of the last one (or of NN) with pages to fill in
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from checks import check
from guide import break_guide, start_guide, write_guide
from ladder import STEPS, StepError, added_code, find, folders, python_files
from pages import SECTIONS, readme
from tries import command, copy, environment, has_ranks, plant, start, test, test_files, test_mine
from upkeep import git, propagate

BLANKS = {  # of a new page, for `readme` and the author to fill in
    "The diff": "\n<!-- diff -->\n<!-- /diff -->\n",
    "Write it yourself": "\n<!-- mine -->\n<!-- /mine -->\n",
    "What you have built": "\n<!-- built -->\n<!-- /built -->\n",
}


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
            return test_mine(number, Path(folder))
        case ["test", number, ranks] if ranks.isdecimal() and int(ranks):
            return test(number, int(ranks))
        case ["start", number, folder]:
            start(number, Path(folder))
        case ["break", number]:
            return plant(number)
        case ["guide", "break", number] if number.isdecimal():
            return break_guide(int(number))
        case ["guide", count, folder] if count.isdecimal():
            start_guide(int(count), Path(folder))
        case ["readme", "guide"]:
            write_guide()
        case ["readme"]:
            readme(folders())
        case ["readme", number]:
            readme([find(number)])
        case ["propagate", *commit] if len(commit) < 2:
            if commit and git("cat-file", "-e", f"{commit[0]}^{{commit}}").returncode:
                raise StepError(f"git knows no commit {commit[0]}; git log --oneline lists them")
            changed = propagate(since=(commit or ["HEAD"])[0])
            print("\n".join(changed) or "nothing to carry: no step differs from the last commit")
        case ["check", *which] if len(which) < 2:
            for step in check(*which):
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

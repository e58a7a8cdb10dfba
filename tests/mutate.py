"""Changes the trainer's core by machine, one small mistake at a time, and counts what no test sees.

Run by `make mutate`. A mutant runs under the tests of its file, in a copy of the tree, and where
those stay green, under some that go through more of the core. It is killed where an assertion
fails; what only breaks, or never ends, is counted apart: that shows no test. Results are added to a
file as they come, and a later run with the same seed goes on after them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mutations import Mutant, drawn, mutants_of
from planted import ROOT, copy_tree, run_tests

EXPLAINED = ROOT / "tests" / "mutants" / "SURVIVORS.md"
RESULTS = ROOT / "out" / "mutate"
MOST_CRASHES = 4  # tests that break before the others are not asked any more
LONGEST = 600.0
"""Seconds of a mutant's tests: ranks that wait for each other are ended then."""

COMM = ["parallel/test_comm.py", "parallel/test_layers.py"]
MODEL = ["models/test_model.py", "training/test_training_parity.py"]
EVERY = ["parallel/test_techniques.py::test_every_technique_equals_dense"]
SUMS = ["parallel/test_gradient_sum.py", "training/test_training_parity.py"]
RANGE = ["parallel/test_techniques.py::test_an_id_or_a_label_out_of_range_is_refused"]
LAYOUT = "models/test_llama.py::test_a_layout_equals_the_oracle"
LLAMA = [f"{LAYOUT}[tp4-two-hold-a-head]", f"{LAYOUT}[tp2-dp2-sequence-parallel]"]
PIPELINE = ["parallel/test_schedule.py", "parallel/test_pipeline_beside_torch.py"]
SINGLE = ["parallel/test_pipeline.py::test_a_schedule_computes_what_one_process_does"]
IN_STAGES = "parallel/test_pipeline.py::test_level_1_of_zero_computes_what_one_process_does"
ZERO = [f"parallel/test_{name}.py" for name in ("zero_beside_torch", "zero", "frozen")]
LATTICE = ["proof/test_lattice.py"]
SIZES = ["test_model_size.py"]
WRITES = ["training/test_pipelined_runs.py::test_every_layout_writes_the_same_text"]
THEIRS = ["proof/test_transformers.py"]
MUON = ["proof/test_parity.py::test_a_right_layout_is_proved_right_in_each_dtype[muon]"]

TESTS: dict[str, tuple[list[str], list[str]]] = {
    "parallel/comm.py": ([*COMM, *SINGLE, *MODEL, *EVERY], LATTICE),
    "parallel/context.py": (["parallel/test_context.py", *COMM, *EVERY, *SINGLE], LATTICE),
    "parallel/data_parallel.py": ([*SUMS, *EVERY, *LLAMA], LATTICE),
    "parallel/dropout.py": ([*EVERY, "parallel/test_seeds.py"], LATTICE),
    "parallel/overlap.py": (["parallel/test_layers.py", *EVERY], LATTICE),
    "parallel/recompute.py": (EVERY, LATTICE),
    "parallel/replicated.py": (["proof/test_module.py"], []),
    "parallel/replicas.py": (["parallel/test_sharding.py", "parallel/test_techniques.py"], []),
    "parallel/sharding.py": (["parallel/test_sharding.py", *COMM, *MODEL], LATTICE),
    "parallel/shared_heads.py": (["models/test_llama.py"], LATTICE),
    "parallel/tensor_parallel.py": (["parallel/test_layers.py", *MODEL], LATTICE),
    "parallel/vocab_parallel.py": (
        ["parallel/test_head_loss.py", *RANGE, COMM[1], *MODEL, *EVERY],
        LATTICE,
    ),
    "parallel/pipeline/": (
        [*PIPELINE, *SINGLE],
        ["parallel/test_pipeline.py", "reporting/test_timeline.py", "commands/test_generate.py"],
    ),
    "parallel/zero/in_stages.py": ([IN_STAGES], []),
    "parallel/zero/": (ZERO, [*LATTICE, "optim/test_muon.py"]),
    "models/attention.py": ([*MODEL, *EVERY], LATTICE),
    "models/bert.py": (["models/test_bert.py", *SIZES], THEIRS),
    "models/build.py": (["models/test_rotary.py", *LLAMA, *SINGLE], THEIRS),
    "models/encoder_decoder.py": (["models/test_encoder_decoder.py"], LATTICE),
    "models/filling.py": (["models/test_filling.py"], []),
    "models/generation.py": (["commands/test_generate.py"], [*THEIRS, *WRITES]),
    "models/glm.py": (["models/test_glm.py"], LATTICE),
    "models/gpt.py": ([*MODEL, *EVERY], LATTICE),
    "models/layers.py": (["models/test_rotary.py", *SIZES, "models/test_t5.py"], LATTICE),
    "models/llama.py": (["models/test_llama.py"], THEIRS),
    "models/positions.py": (["models/test_rotary.py", "models/test_llama.py"], LATTICE),
    "models/relative_bias.py": (["models/test_t5.py", *SIZES], THEIRS),
    "models/rotary.py": (["models/test_rotary.py"], []),
    "models/t5.py": (["models/test_t5.py"], THEIRS),
    "models/transformer_xl.py": (["models/test_transformer_xl.py"], LATTICE),
    "optim/adamw.py": (["training/test_training_parity.py", "optim/test_clip.py"], LATTICE),
    "optim/casts.py": (["optim/test_casts.py"], ["hardware/test_block_compile.py"]),
    "optim/clip.py": (["optim/test_clip.py", "training/test_training_parity.py"], LATTICE),
    "optim/frozen.py": (["training/test_freeze.py", "parallel/test_frozen.py"], []),
    "optim/muon.py": (["optim/test_muon.py"], MUON),
    "optim/non_finite.py": (["parallel/test_techniques.py", "optim/test_clip.py"], []),
    "optim/optimizer.py": (["training/test_training_parity.py", "optim/test_muon.py"], LATTICE),
    "optim/precision.py": (["parallel/test_head_loss.py", "parallel/test_techniques.py"], []),
    "checkpoint/slices.py": (["checkpoint/test_checkpoint.py", "parallel/test_sharding.py"], []),
}
"""By a file, its tests, and those that are asked where these stay green."""


class RedError(RuntimeError):
    """Tests fail in a tree without a mistake."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__)
    parser.add_argument("--budget", default="30m", help="time after which no mutant is begun")
    parser.add_argument("--seed", type=int, default=1, help="which mutants, in which order")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="", help="files whose path holds this text")
    parser.add_argument("--again", action="store_true", help="what survived before, once more")
    given = parser.parse_args(argv)
    found = re.fullmatch(r"(\d+)([smh])", given.budget)
    if not found:
        print(f"error: BUDGET={given.budget} is no time; it can be 90s, 30m or 2h", file=sys.stderr)
        return 2
    end = time.monotonic() + int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
    chosen = drawn([m for m in all_mutants() if given.only in m.file], given.seed)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = RESULTS / f"seed_{given.seed}.jsonl"
    known = with_their_tests(read(results))
    old = [m for m in chosen if (known.get(key(m)) or {}).get("outcome") == "survived"]
    todo = old if given.again else [m for m in chosen if key(m) not in known]
    print(f"{len(chosen)} mutants, {len(known)} known in {results.relative_to(ROOT)}")
    try:
        run(todo, results, given.jobs, end)
    except KeyboardInterrupt:
        print("stopped; what was found is kept, and the same command goes on")
    known = with_their_tests(read(results))
    tried = [known[key(m)] for m in chosen if key(m) in known]
    show(tried)
    try:
        check_green(tried)
    except RedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def all_mutants() -> list[Mutant]:
    found = []
    for name in TESTS:
        path = ROOT / "rosetrainer" / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            relative = str(file.relative_to(ROOT / "rosetrainer"))
            found += mutants_of(relative, source_of(relative))
    return found


@cache
def source_of(file: str) -> bytes:
    """As it was at first: whoever edits it meanwhile changes no mutant."""
    return (ROOT / "rosetrainer" / file).read_bytes()


def key(mutant: Mutant) -> str:
    """Of the mutant and all of its file: a changed file is another one."""
    return hashlib.sha256(mutant.applied(source_of(mutant.file))).hexdigest()[:16]


def read(results: Path) -> dict[str, dict[str, Any]]:
    """By key, the last word of each; a line that a kill cut off is none."""
    lines = results.read_text().splitlines(keepends=True) if results.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {one["key"]: one for one in found}


def with_their_tests(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without the kills by a test that is no more: those mutants are tried again."""
    where = {one["where"] for one in known.values() if one["outcome"] == "killed"}
    there = {test for test in where if (ROOT / test.partition("::")[0]).exists()}
    if there:
        files = sorted({test.partition("::")[0] for test in there})
        there &= getattr(run_tests(ROOT, ["--collect-only", *files]), "collected", set())
    gone = where - there
    return {name: one for name, one in known.items() if one["where"] not in gone}


def tests_of(file: str) -> list[list[str]]:
    both = next(tests for name, tests in TESTS.items() if file.startswith(name))
    return [[f"tests/{name}" for name in tests] for tests in both if tests]


def run(todo: list[Mutant], results: Path, jobs: int, end: float) -> None:
    """Tries them until `end`, `jobs` at a time, each in a tree of its own."""
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            copy_tree(Path(folder) / str(job))
            trees.put(Path(folder) / str(job))

        def one(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            tree, since = trees.get(), time.monotonic()
            try:
                outcome, where = try_mutant(mutant, tree)
            finally:
                trees.put(tree)
            note = {"key": key(mutant), "outcome": outcome, "where": where, **mutant._asdict()}
            note |= {"shown": mutant.shown(source_of(mutant.file))}
            note["seconds"] = round(time.monotonic() - since, 1)
            with results.open("a") as file:
                file.write(json.dumps(note) + "\n")
            if outcome == "survived":
                print(f"survived: line {mutant.line} of {note['shown']}", flush=True)

        executor = ThreadPoolExecutor(jobs)
        futures = [executor.submit(one, mutant) for mutant in todo]
        try:
            for future in futures:
                future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def try_mutant(mutant: Mutant, tree: Path, seconds: float = LONGEST) -> tuple[str, str]:
    """(what became of it, where)"""
    path, source = tree / "rosetrainer" / mutant.file, source_of(mutant.file)
    path.write_bytes(mutant.applied(source))
    try:
        for tests in tests_of(mutant.file):
            outcome = run_tests(tree, tests, MOST_CRASHES, seconds)
            if outcome is None:
                return "hung", f"after {seconds:.0f} s"
            if outcome.asserted:
                return "killed", outcome.asserted.partition(" of ")[2]
            if outcome.failures:
                return "broken", next(iter(outcome.failures))
    finally:
        path.write_bytes(source)
    return "survived", ""


def check_green(results: list[dict[str, Any]]) -> None:
    """Raises RedError if a test that killed a mutant fails without one, too."""
    tests = sorted({one["where"] for one in results if one["outcome"] == "killed"})
    if not tests:
        return
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        copy_tree(Path(folder))
        outcome = run_tests(Path(folder), tests, len(tests), 10 * LONGEST)
    if outcome is None or outcome.failures or not outcome.passed:
        raise RedError(f"red without a mutant, so no kill of theirs counts: {outcome or tests}")


def show(results: list[dict[str, Any]]) -> None:
    explained = set(explanations())
    counts = Counter(one["outcome"] for one in results)
    survived = [one for one in results if one["outcome"] == "survived"]
    judged = counts["killed"] + len(survived)
    print(f"\n{len(results)} mutants tried")
    print(f"{'':24}{'killed':>8}{'survived':>10}{'only broke':>12}{'hung':>6}")
    for kind in sorted({one["kind"] for one in results}):
        of = Counter(one["outcome"] for one in results if one["kind"] == kind)
        row = [of[name] for name in ("killed", "survived", "broken", "hung")]
        print(f"{kind:24}{row[0]:8}{row[1]:10}{row[2]:12}{row[3]:6}")
    same = [one for one in survived if one["shown"] in explained]
    for many, what in (
        (judged, "run to their end"),
        (judged - len(same), "compute something else"),
    ):
        share = f", {100 * counts['killed'] / many:.1f} %" if many else ""
        print(f"killed by an assertion: {counts['killed']} of {many} that {what}{share}")
    print(f"survived: {len(survived)}, of which {len(same)} are explained in {EXPLAINED.name}")
    for one in survived:
        if one["shown"] not in explained:
            print(f"  not explained: line {one['line']} of {one['shown']}")


def explanations() -> Iterator[str]:
    """The survivors that SURVIVORS.md names."""
    text = EXPLAINED.read_text() if EXPLAINED.exists() else ""
    yield from re.findall(r"^- (\S+: `.*` is `.*`)$", text, re.MULTILINE)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # of the process that all are forked from
    sys.exit(main(sys.argv[1:]))

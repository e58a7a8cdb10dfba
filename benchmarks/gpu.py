"""One GPU: GPT-2 1.5B against its matmul rate, 124M and a Llama of 1B against what others train by.

python benchmarks/gpu.py

Needs no network, and for the Llama transformers. Each part runs in a process of its own
and is cut short if it takes too long, so that all of it ends within eight minutes. Where there is
no GPU the same code runs tiny shapes on the CPU, to show that it works.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import ROOT, Rounds, introduce, keep, median

OWN_END = 0.85
"""After this share of its seconds a part begins no further round."""


@dataclass(frozen=True)
class Part:
    """A model of ours, and what it is measured against."""

    name: str
    on_cpu: str
    """The name of its tiny shapes, where there is no GPU."""
    kept: str
    seconds: float
    """For all of it, compiling and loading included."""
    wanted: float
    beside: str = ""
    """Who trains the same model in turn with ours; "": the card's best product is the measure."""

    def ratio(self, found: Rounds, peak: float) -> float:
        """Of ours and that; 0 without figures."""
        if not found:
            return 0.0
        if not self.beside:
            return median(found, "ours", "flops") / peak
        ours, theirs = (median(found, who, "tokens_per_second") for who in ("ours", "theirs"))
        return ours / theirs


PARTS = {
    "large": Part("GPT-2 1.5B", "larger tiny GPT", "gpu-1.5b", 180, 0.60),
    "pair": Part("GPT-2 124M", "smaller tiny GPT", "gpu-124m", 120, 1.0, "plain recipe"),
    "llama": Part("Llama 1B", "tiny Llama", "gpu-llama-1b", 170, 1.0, "Hugging Face's"),
}


def run_part(part: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What the part told until its end, and why that came early, or ""."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), part]
    process = subprocess.Popen(
        [*command, str(seconds * OWN_END)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with whatever processes compile for it
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        problem = f"its {seconds:g} s were over"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode and not problem:
        problem = f"it ended with status {process.returncode}"
    lines = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")], problem


def rounds_in(told: list[dict[str, Any]]) -> Rounds:
    found: Rounds = {}
    for figures in told:
        if "seconds" in figures:
            found.setdefault(figures["side"], []).append(figures)
    return found


def facts_in(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What a part told once."""
    return {k: v for figures in told if "side" not in figures for k, v in figures.items()}


def row(name: str, found: Rounds, side: str, peak: float) -> str:
    seconds, speed, flops = (
        median(found, side, f) for f in ("seconds", "tokens_per_second", "flops")
    )
    return (
        f"  {name:34} {seconds * 1e3:8.1f} ms a step {speed:9,.0f} tokens/s "
        f"{flops / 1e9:9,.0f} GFLOP/s {flops / peak:6.1%}"
    )


def report(part: str, told: list[dict[str, Any]], problem: str, names: Mapping[str, str]) -> Rounds:
    """Prints the part's rows; gives its rounds, none if a side has no figures."""
    found, facts = rounds_in(told), facts_in(told)
    if found.keys() != names.keys():
        print(f"  {part}: no figures, {problem}")
        return {}
    for side, name in names.items():
        print(row(name, found, side, facts["flops_of_product"]))
    rounds = min(map(len, found.values()))
    if problem or rounds < 5:
        print(f"  {part}: cut short after {rounds} rounds, {problem or 'its time was over'}")
    return found


def main() -> int:
    """Exit status: 1 if a part failed. What the others found is printed and kept anyway."""
    introduce("bf16 autocast, torch.compile, in turn, medians")
    told = {name: run_part(name, part.seconds) for name, part in PARTS.items()}
    facts = {name: facts_in(lines) for name, (lines, _) in told.items()}
    card = next((f["card"] for f in facts.values() if f.get("card")), "")
    print(
        card or "No GPU here: tiny shapes on the CPU, to show that this works; not a GPU's figures."
    )
    peak = max(f.get("flops_of_product", 0.0) for f in facts.values())
    print(f"  {'the best bf16 product':34} {'':39} {peak / 1e9:9,.0f} GFLOP/s")
    found = {}
    for name, part in PARTS.items():
        model = part.name if card else part.on_cpu
        if rows := facts[name].get("micro_batch"):
            model += f", batch {rows}"
        names = {"ours": f"{model}, ours"}
        if part.beside:
            names["theirs"] = f"{model}, {part.beside}"
        found[name] = report(name, *told[name], names)
    more: dict[str, Any] = {
        "card": card,
        "facts": facts,
        "ended_early": {name: problem for name, (_, problem) in told.items()},
    }
    ratios = {
        name: part.ratio(found[name], facts[name].get("flops_of_product", 1.0))
        for name, part in PARTS.items()
    }
    if card:
        for name, part in PARTS.items():
            keep(part.kept, ratios[name], part.wanted, found[name], **more)
    else:  # of a CPU nothing is wanted here
        keep("gpu-tiny-on-cpu", ratios["pair"], 0.0, found, ratios=ratios, **more)
    return int(any("status" in problem for _, problem in told.values()))


if __name__ == "__main__":
    sys.exit(main())

"""One GPU: GPT-2 1.5B against the card's own matmul rate, 124M against the plain recipe.

python benchmarks/gpu.py

Needs no network and no other package than rosetrainer's. Each part runs in a process of its own
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import ROOT, Rounds, introduce, keep, median

LIMITS = {"large": 250, "pair": 180}
"""Seconds of each part, compiling and loading included."""

OWN_END = 0.85
"""After this share of its seconds a part begins no further round."""

SHARE_WANTED, RATIO_WANTED = 0.60, 1.0


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


def main(limits: Mapping[str, float] = LIMITS) -> int:
    """Exit status: 1 if a part failed. What the other one found is printed and kept anyway."""
    introduce("bf16 autocast, torch.compile, in turn, medians")
    parts = {part: run_part(part, seconds) for part, seconds in limits.items()}
    facts = {part: facts_in(told) for part, (told, _) in parts.items()}
    card = next((f["card"] for f in facts.values() if f.get("card")), "")
    print(
        card or "No GPU here: tiny shapes on the CPU, to show that this works; not a GPU's figures."
    )
    peak = max(f.get("flops_of_product", 0.0) for f in facts.values())
    print(f"  {'the best bf16 product':34} {'':39} {peak / 1e9:9,.0f} GFLOP/s")
    large, small = ("GPT-2 1.5B", "GPT-2 124M") if card else ("larger tiny GPT", "smaller tiny GPT")
    batch = f"batch {facts['large'].get('micro_batch', '?')}"
    big = report("large", *parts["large"], {"ours": f"{large}, {batch}, ours"})
    both = report(
        "pair", *parts["pair"], {"ours": f"{small}, ours", "plain": f"{small}, plain recipe"}
    )
    share = ratio = 0.0
    if big:
        share = median(big, "ours", "flops") / facts["large"]["flops_of_product"]
    if both:
        ours, plain = (median(both, side, "tokens_per_second") for side in ("ours", "plain"))
        ratio = ours / plain
    more: dict[str, Any] = {
        "card": card,
        "facts": facts,
        "ended_early": {k: p for k, (_, p) in parts.items()},
    }
    if card:
        keep("gpu-1.5b", share, SHARE_WANTED, big, **more)
        keep("gpu-124m", ratio, RATIO_WANTED, both, **more)
    else:  # of a CPU nothing is wanted here
        keep("gpu-tiny-on-cpu", ratio, 0.0, {"large": big, "pair": both}, **more)
    return int(any("status" in problem for _, problem in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

"""A pipeline's step as a picture: a bar for each rank, runs of one schedule over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rosetrainer.parallel.pipeline.schedule import Action, Schedule
from rosetrainer.parallel.pipeline.simulation import Run

WIDTH, LEFT, RIGHT, ROW, TITLE, GAP = 960, 64, 16, 26, 30, 18
"""Pixels: the picture, the margins beside the bars, a rank's bar, a run's title, between runs."""

NARROWEST = 14
"""Pixels of an action that shows its micro-batch."""

STYLE = """
  svg { background: #ffffff; color: #24292f; font: 13px sans-serif }
  text { fill: currentColor } .number { fill: #ffffff; font-size: 11px; text-anchor: middle }
  .idle { fill: currentColor; opacity: 0.08 }
  .F { fill: #2f7fd0 } .B { fill: #d0602f } .I { fill: #b8471f } .W { fill: #2f8f5b }
  .later { opacity: 0.65 }
  @media (prefers-color-scheme: dark) { svg { background: #0d1117; color: #e6edf3 } }
"""
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def picture(schedule: Schedule, runs: Mapping[str, Run]) -> str:
    """SVG, all runs to one scale; each with its bubble under both definitions."""
    longest = max(run.length for run in runs.values())
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TITLE + len(runs) * (TITLE + ROW * len(schedule.actions) + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}</style>",
        *legend(schedule),
    ]
    top = TITLE
    for name, run in runs.items():
        title = (
            f"{name}: {run.length * 1e3:.1f} ms, bubble {run.bubble_share:.1%} of the step, "
            f"{run.bubble_ratio:.1%} over the ideal"
        )
        parts.append(f'<text x="{LEFT}" y="{top + 20}">{title}</text>')
        parts += bars(schedule, run, top + TITLE, scale)
        top += TITLE + ROW * len(schedule.actions) + GAP
    return "\n".join([*parts, "</svg>\n"])


def legend(schedule: Schedule) -> Iterator[str]:
    kinds = sorted({action.kind for action in schedule.actions[0]})
    for place, kind in enumerate(kinds):
        left = LEFT + 150 * place
        yield f'<rect class="{kind}" x="{left}" y="10" width="14" height="14"/>'
        yield f'<text x="{left + 20}" y="22">{kind}: {NAMES[kind]}</text>'


def bars(schedule: Schedule, run: Run, top: float, scale: float) -> Iterator[str]:
    """Of each rank: all of the step as idle, and the actions over it."""
    start = min(begin for times in run.times for begin, _ in times)
    for rank, (actions, times) in enumerate(zip(schedule.actions, run.times, strict=True)):
        y = top + ROW * rank
        yield f'<text x="8" y="{y + 17}">rank {rank}</text>'
        place = f'x="{LEFT}" y="{y}" width="{run.length * scale:.2f}" height="{ROW - 3}"'
        yield f'<rect class="idle" {place}/>'
        for action, (begin, end) in zip(actions, times, strict=True):
            left, width = LEFT + (begin - start) * scale, (end - begin) * scale
            yield bar(action, schedule.stages_of(rank)[0], (left, y, width), end - begin)


def bar(action: Action, first: int, place: tuple[float, float, float], seconds: float) -> str:
    """One action; place: left, top, width. first: the rank's first stage; its others are pale."""
    left, y, width = place
    classes = action.kind + " later" * (action.stage != first)
    title = f"<title>{action}: {seconds * 1e3:.2f} ms</title>"
    box = f'x="{left:.2f}" y="{y}" width="{max(width, 0):.2f}" height="{ROW - 3}"'
    drawn = f'<rect class="{classes}" {box} stroke="#ffffff" stroke-width="0.5">{title}</rect>'
    if width < NARROWEST:
        return drawn
    middle = f'x="{left + width / 2:.2f}" y="{y + 16}"'
    return f'{drawn}<text class="number" {middle}>{action.micro_batch}</text>'

"""Which picture belongs to which step, and whether it is fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ladder import STEPS, StepError, folders

from pictures import (
    attention,
    first,
    kept,
    later,
    layers,
    mesh,
    pipeline,
    plots,
    road,
    sharded,
    timeline,
)

STEP_PICTURES: dict[str, Callable[[], str]] = {
    "00": first.two_ranks,
    "01": first.minimal_gpt,
    "02": first.labels,
    "03": first.data_parallel,
    "04": layers.column_parallel,
    "05": layers.gathered_layers,
    "06": layers.row_parallel,
    "07": layers.feed_forward,
    "08": attention.gathered_attention,
    "09": attention.parallel_attention,
    "10": attention.cross_attention,
    "11": mesh.mesh,
    "12": mesh.vocabulary,
    "13": mesh.loss_of_slices,
    "14": mesh.masks,
    "15": later.sequence_parallel,
    "16": later.recomputed,
    "17": later.mixed_precision,
    "18": later.resharded,
    "19": later.overlap,
    "20": later.chunks,
    "21": pipeline.all_forward_and_in_turn,
    "22": pipeline.weights_fill_the_gaps,
    "23": sharded.summed_meanwhile,
    "24": sharded.slices_of_moments,
    "25": sharded.whole_for_a_while,
}
STEP_PLOTS: dict[str, Callable[[Path], str]] = {  # of what steps/plots.py measured
    "02": plots.with_floor,
    "03": plots.run_against_run,
    "04": plots.with_and_without_f,
    "05": plots.run_against_run,
    "06": plots.with_the_bias_twice,
    "07": plots.run_against_run,
    "08": plots.run_against_run,
    "09": plots.run_against_run,
    "17": plots.rounded,
}
STEP_BYTES: dict[str, Callable[[], str]] = {"15": kept.of_a_block, "16": kept.for_time}
"""Of figures that the pages print."""


def drawn(steps: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, SVG) of each of these steps, and of the ladder where all are drawn."""
    for step in steps:
        if draw := STEP_PICTURES.get(step.name[:2]):
            yield step / "picture.svg", draw()
        if (step / "plot.json").exists():
            yield step / "plot.svg", STEP_PLOTS[step.name[:2]](step)
        if draw := STEP_BYTES.get(step.name[:2]):
            yield step / "plot.svg", draw()
        if (step / "timeline.json").exists():
            yield step / "timeline.svg", timeline.of_two_ranks(step)
        if (step / "pair.json").exists():
            yield step / "pair.svg", plots.two_codes(step)
    if steps == folders():
        yield STEPS / "ladder.svg", road.the_ladder()


def write_pictures(steps: list[Path]) -> None:
    for path, svg in drawn(steps):
        path.write_text(svg)


def check_pictures(steps: list[Path]) -> None:
    """Raises StepError for a picture that is missing, or stale, or that a page does not show."""
    for step in steps:
        if step.name[:2] not in STEP_PICTURES:
            raise StepError(f"{step.name} has no picture; give it one in steps/pictures/album.py")
    for path, svg in drawn(steps):
        if not path.exists() or path.read_text() != svg:
            raise StepError(f"{path.relative_to(STEPS)} is stale; run steps.py readme")
        for page in (path.parent / "README.md", path.parent / "README.zh.md"):
            if page.exists() and f"]({path.name})" not in page.read_text():
                raise StepError(f"{page.relative_to(STEPS)} does not show {path.name}")

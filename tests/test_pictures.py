"""Each page of the steps shows a picture that a program made: fresh, legible, in no language."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path for path in (ROOT / "steps").glob("[0-9][0-9]_*"))
PICTURES = sorted((ROOT / "steps").glob("**/*.svg"))
ENGLISH = {"rank", "all", "reduce", "gather", "scatter"}  # what a Chinese page writes so too
PLOTS = ("plot.svg", "pair.svg", "timeline.svg")  # of runs
SMALLEST = 12 * 358 / 480  # pixels of a letter on a telephone, 390 wide with 16 of margin


def texts(picture: Path) -> list[str]:
    tree = ElementTree.parse(picture)
    return ["".join(node.itertext()) for node in tree.iter() if node.tag.endswith("}text")]


def words_of_the_code() -> set[str]:
    """Names in the steps' Python files and folders: both languages show them as they are."""
    sources = [path.read_text() for path in (ROOT / "steps").glob("[0-9]*/*.py")]
    return {*re.findall(r"[A-Za-z_]\w*", "\n".join(sources)), "rosetrainer"} | {
        step.name[3:] for step in STEPS
    }


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
@pytest.mark.parametrize("step", [ROOT / "steps", *STEPS], ids=lambda step: step.name)
def test_a_page_shows_its_picture_in_both_languages(step: Path, page: str) -> None:
    name = "ladder.svg" if step.name == "steps" else "picture.svg"
    text = (step / page).read_text()
    assert len(re.findall(rf"^!\[[^]]+\]\({name}\)$", text, re.MULTILINE)) == 1
    assert (step / name).exists()
    assert "```mermaid" not in text


@pytest.mark.parametrize("plot", [p for p in PICTURES if p.name in PLOTS], ids=str)
def test_a_plot_stands_on_its_page_in_both_languages(plot: Path) -> None:
    for page in ("README.md", "README.zh.md"):
        assert (plot.parent / page).read_text().count(f"]({plot.name})\n") == 1


@pytest.mark.parametrize("name", ["plot", "pair"])
def test_of_two_curves_that_agree_both_are_seen(name: str) -> None:
    """The first is broad and the second thin on top of it; step 02's two part at once."""
    plots = [kept.with_suffix(".svg") for kept in sorted((ROOT / "steps").glob(f"*/{name}.json"))]
    assert len(plots) > 7
    for plot in plots:
        curves = re.findall(r'<polyline class="(c\d[^"]*)" points="(?:\S+ ){50,}', plot.read_text())
        assert curves in (["c0 under", "c1 over"], ["c0", "c1"] if "02" in str(plot) else []), plot


@pytest.mark.parametrize("kept", sorted((ROOT / "steps").glob("*/pair.json")), ids=str)
def test_a_pair_tells_the_losses_that_its_runs_kept(kept: Path) -> None:
    """First and last of each, in both languages; the two codes train two curves."""
    losses = json.loads(kept.read_text())["losses"]
    assert losses["A"] != losses["B"]
    for page in ("README.md", "README.zh.md"):
        told = (kept.parent / page).read_text().split("<!-- /pair -->")[1]
        for curve in losses.values():
            assert f"{curve[0]:.4f}" in told
            assert f"{curve[-1]:.4f}" in told


@pytest.mark.parametrize("kept", sorted((ROOT / "steps").glob("*/timeline.json")), ids=str)
def test_a_timeline_s_page_tells_how_long_its_rounds_took(kept: Path) -> None:
    for page in ("README.md", "README.zh.md"):
        told = (kept.parent / page).read_text().split("](timeline.svg)")[1]
        for ranks in json.loads(kept.read_text()).values():
            assert f"{max(rank['end'] for rank in ranks):.1f}" in told
            assert all(rank["waits"] for rank in ranks)


def test_the_plot_of_step_02_shows_the_runs_that_its_page_prints() -> None:
    step = next((ROOT / "steps").glob("02_*"))
    page = (step / "README.md").read_text()
    for losses in json.loads((step / "plot.json").read_text())["losses"].values():
        for number in (1, 51, 101, 200):
            assert f"loss {losses[number - 1]:.6f}" in page


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.parent.name)
def test_a_picture_holds_letters_and_numbers_only(picture: Path) -> None:
    known = words_of_the_code() | ENGLISH
    for text in texts(picture):
        for word in re.findall(r"[^\W\d]\w*", text):
            name = re.sub(r"(_\d+|²)$", "", word)  # rank_00000, norm²
            assert len(name) <= 3 or name in known, text
        assert text.isascii() or set(text) - set(map(chr, range(128))) <= set("×²ᵀ…Σ"), text


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.parent.name)
def test_a_picture_follows_the_reader_s_scheme_and_fits_a_telephone(picture: Path) -> None:
    source = picture.read_text()
    root = ElementTree.fromstring(source)
    width = float(root.attrib["viewBox"].split()[2])
    assert "prefers-color-scheme:dark" in source
    assert width <= 480 and float(root.attrib["width"]) <= 846
    assert min(map(float, re.findall(r"font-size:(\d+)px", source))) * 358 / width >= SMALLEST


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "steps", tmp_path / "steps", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "rosetrainer", tmp_path / "rosetrainer")
    return tmp_path


def steps(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "steps/steps.py", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_check_fails_where_a_step_has_other_numbers_than_its_picture(copy: Path) -> None:
    script = copy / "steps/00_two_ranks/two_ranks.py"
    script.write_text(script.read_text().replace("TIMEOUT = 5.0", "TIMEOUT = 6.0"))
    for _ in range(2):  # the diff first, then the picture
        refused = steps(copy, "check", "00").stderr
        if refused.startswith("error: 00_two_ranks/README.md"):
            pages = copy / "steps/00_two_ranks"
            kept = (pages / "picture.svg").read_text()
            assert steps(copy, "readme", "00").returncode == 0
            assert "6 s" in (pages / "picture.svg").read_text()
            (pages / "picture.svg").write_text(kept)
    assert refused == "error: 00_two_ranks/picture.svg is stale; run steps.py readme\n"


def test_the_runs_of_the_plots_still_fit_their_steps(copy: Path) -> None:
    """A line that a run replaces stands in its step's file, once."""
    code = (
        "import sys; sys.path.insert(0, 'steps')\n"
        "from curves import PAIRS, PLOTS; from ladder import find\n"
        "runs = [*(run for runs in PLOTS.values() for run in runs if run.file), *PAIRS.values()]\n"
        "for run in runs:\n"
        "    print((find(run.step) / run.file).read_text().count(run.old))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    counts = done.stdout.split()
    assert len(counts) > 2
    assert set(counts) == {"1"}


def test_measure_refuses_a_step_without_a_plot(copy: Path) -> None:
    command = [sys.executable, "steps/plots.py", "77"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: step 77 has no plot; it can be "
        "02, 03, 04, 05, 06, 07, 08, 09, 11, 12, 14, 15, 17, 19, 20\n",
    )


def test_check_fails_where_a_page_shows_no_picture(copy: Path) -> None:
    page = copy / "steps/04_column_parallel_linear/README.zh.md"
    page.write_text(page.read_text().replace("](picture.svg)", "](other.svg)"))
    refused = steps(copy, "check", "04").stderr
    assert refused == "error: 04_column_parallel_linear/README.zh.md does not show picture.svg\n"


def test_check_asks_for_the_picture_of_a_new_step(copy: Path) -> None:
    assert steps(copy, "new", "42_from_the_last").returncode == 0
    step = copy / "steps/42_from_the_last"
    shutil.copy(copy / "steps/20_head_and_loss_in_chunks/mistake.patch", step)
    assert steps(copy, "readme", "42").returncode == 0
    assert steps(copy, "check", "42").stderr == (
        "error: 42_from_the_last has no picture; give it one in steps/pictures/album.py\n"
    )


def test_the_mask_of_step_14_is_the_one_that_the_step_computes() -> None:
    picture = (ROOT / "steps/14_dropout_by_coordinates/picture.svg").read_text()
    drawn = re.findall(r">([01])</text>", picture)
    code = (
        "import torch; from dropout import Dropout, DropoutSeed\n"
        "layer = Dropout(0.1); layer.site = 'blocks.0.attention.dropout'\n"
        "kept = layer(torch.ones(16, 4, 1, 1), DropoutSeed(1, 1), (0, 0)).flatten(1) > 0\n"
        "quadrants = [kept[i:i + 8, j:j + 2].flatten() for i in (0, 8) for j in (0, 2)]\n"
        "print(*map(int, torch.cat(quadrants)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "steps/14_dropout_by_coordinates",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == drawn


def test_readme_draws_all_pictures_again(copy: Path) -> None:
    before = {path: path.read_text() for path in copy.glob("steps/**/*.svg")}
    for path in before:
        path.unlink()
    assert steps(copy, "readme").returncode == 0
    assert {path: path.read_text() for path in copy.glob("steps/**/*.svg")} == before

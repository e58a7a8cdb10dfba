"""The two languages say the same: as many headings, equal code, equal figures, links that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "rosetrainer/README.md",
        ROOT / "tests/faults/README.md",
        ROOT / "benchmarks/README.md",
        ROOT / "findings/README.md",
        *ROOT.glob("steps/**/README.md"),
    ]
)


def read(page: Path) -> tuple[str, str]:
    return (ROOT / page).read_text(), (ROOT / page).with_suffix(".zh.md").read_text()


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_both_languages_have_the_same_code_headings_and_tables(page: Path) -> None:
    english, chinese = read(page)
    assert english.startswith(f"English | [中文]({page.stem}.zh.md)\n")
    assert chinese.startswith(f"[English]({page.name}) | 中文\n")
    assert code_blocks(english) == code_blocks(chinese)
    levels = [re.findall(r"^#+(?= )", prose(text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    rows = [len(re.findall(r"^\|", prose(text), re.MULTILINE)) for text in (english, chinese)]
    assert rows[0] <= rows[1], "the Chinese page has the errors' table besides"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_both_languages_have_the_same_figures(page: Path) -> None:
    figures = [set(re.findall(r"\d+(?:\.\d+)?e-\d+|\d+\.\d+", prose(text))) for text in read(page)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_both_languages_link_the_same_papers(page: Path) -> None:
    web = [sorted(t for t in links(text) if t.startswith("https://")) for text in read(page)]
    assert web[0] == web[1]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for text in read(page):
        headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        for target in links(text):
            if target.startswith("https://"):
                continue  # a paper's, which no test fetches
            file, _, anchor = target.partition("#")
            if file:
                assert (ROOT / page.parent / file).exists(), target
            else:
                assert anchor in anchors, target


@pytest.mark.parametrize("page", [Path("CONTRIBUTING.md"), Path("rosetrainer/README.md")], ids=str)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    for text in read(page):
        named = re.findall(r"`([\w./]*/|[\w./]+\.(?:py|md|json|yml|patch))`", prose(text))
        assert named
        lasting = {name for name in named if not name.startswith("out/")}  # a run makes the others
        for name in lasting - {"mistake.patch", "steps.py"}:
            assert (ROOT / name).exists() or (ROOT / "rosetrainer" / name).exists(), name

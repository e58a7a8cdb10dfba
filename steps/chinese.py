"""What a machine can keep of the Chinese pages: links, punctuation, spaces, and words."""

from __future__ import annotations

import re
from pathlib import Path

from ladder import STEPS, StepError

HAN = "[\u4e00-\u9fff]"
WORDS = {  # what is not written, and what is: a rank is a process, and one thing has one word
    "拿着|手里": "持有",
    "碰头|碰面": "通信",
    "说出": "指出",
    "长出来": "在……的基础上修改",
    "账本": "通信统计",
    "天真": "不足",
    "展宽": "升维",
    "一个比特也不差|逐位|一位一位": "逐比特相同",
    "收集": "gather 或 all-gather",
    "rank [只都也不]?知道": "持有",
    "补的行": "补零行",
    "(?<!（)shard spec": "切分说明",
    r"(?<![\w/\[(-])checkpoint(?![\w./])": "检查点",
    "损失": "loss",
    "内核": "kernel",
}
FORMS = {  # a pattern that is not written, and why
    r"\]\((?!http)[^)#]*/(#[^)]*)?\)": "links to a folder, which shows the English page",
    r"\]\((?!http)[^)]*README\.md": "links to the English page",
    r"(?<!步骤 )\b0\d 步": "names a step without 步骤 in front of its number",
    r"在 \[?\d\d\b\S* 的基础": "names a step without 步骤 in front of its number",
    rf"{HAN}[,;:?!](?={HAN})": "has half-width punctuation between Chinese characters",
    rf"{HAN}[A-Za-z0-9`]|[A-Za-z0-9`]{HAN}": "lacks a space between Chinese and Latin",
}


def check_chinese(pages: list[Path]) -> None:
    """Raises StepError with the first line of a Chinese page that breaks a rule."""
    for page in sorted(pages):
        check_page(page)


def check_page(page: Path) -> None:
    """Code and what stands in backticks do not count."""
    text = re.sub(r"^```.*?^```$", blank, page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for number, line in enumerate(text.split("\n")[1:], 2):  # the first one leads to the English
        plain = re.sub(r"`[^`]*`", "`x`", line)
        where = f"{page.relative_to(STEPS.parent)} line {number}"
        for pattern, instead in WORDS.items():
            if found := re.search(pattern, plain):
                raise StepError(f"{where} says {found[0]}; the field says {instead}")
        for pattern, why in FORMS.items():
            if found := re.search(pattern, plain):
                raise StepError(f"{where} {why}: {found[0]}")
        for bold in re.findall(r"\*\*(.+?)\*\*", plain):
            if bold[-1] in "。，；：":
                raise StepError(
                    f"{where} does not show {bold} bold: let it end before its {bold[-1]}"
                )


def blank(match: re.Match[str]) -> str:
    """As many lines, and nothing on them."""
    return "\n" * match[0].count("\n")

"""The Chinese pages have the sections, the commands, the links and the figures of the English ones."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from manual_commands import ROOT, commands_of

PAIRS = [
    ("README.md", "README.zh-CN.md"),
    ("docs/tutorial.md", "docs/tutorial.zh-CN.md"),
]
HAN = re.compile(r"[\u4e00-\u9fff]")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def levels(text: str) -> list[int]:
    """The level of each heading, in their order."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", outside, re.MULTILINE)]


def code(text: str) -> list[str]:
    """The fenced blocks and what each inline span quotes."""
    return [*re.findall(r"```\w+\n(.*?)```", text, re.DOTALL), *sorted(set(re.findall(r"`([^`\n]+)`", text)))]


def targets(text: str) -> set[str]:
    """The pages and pictures that a text links to, translations by the name of their original."""
    links = re.findall(r"\]\(([^)]+)\)", text)
    return {link.replace(".zh-CN.md", ".md").removeprefix("README.md") for link in links} - {""}


def tables(text: str) -> list[list[str]]:
    """The numbers of each row of each table."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [re.findall(r"\d[\d.e-]*", re.sub("[\uff0c,]", " ", row)) for row in rows]


@pytest.mark.parametrize(("original", "translation"), PAIRS, ids=[pair[1] for pair in PAIRS])
@pytest.mark.parametrize("part", [levels, code, targets, tables], ids=lambda part: part.__name__)
def test_a_translation_has_each_part_of_its_original(part, original, translation):
    assert part(text_of(translation)) == part(text_of(original))


@pytest.mark.parametrize(("original", "translation"), PAIRS, ids=[pair[1] for pair in PAIRS])
def test_a_translation_has_the_commands_of_its_original(original, translation):
    assert commands_of(ROOT / translation) == commands_of(ROOT / original)


@pytest.mark.parametrize("name", [pair[1] for pair in PAIRS])
def test_each_section_of_a_translation_is_in_chinese(name):
    sections = re.split(r"^#+ ", re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections[1:] if not HAN.search(section)] == []


@pytest.mark.parametrize("name", [pair[1] for pair in PAIRS])
def test_lines_of_a_translation_break_where_no_space_shows(name):
    """A browser shows a line break as a space, which stands out between two Chinese characters."""
    lines = text_of(name).splitlines()
    broken = [line for line, following in pairwise(lines) if HAN.match(line[-1:]) and HAN.match(following[:1])]
    assert broken == []


def test_a_missing_command_and_a_changed_figure_would_be_seen():
    text = text_of("README.zh-CN.md")
    assert code(text.replace("`qpref plan my.toml", "`qpref plan your.toml")) != code(text)
    assert tables(text.replace("| 4.50 |", "| 4.60 |")) != tables(text)
    assert levels(text.replace("\n## ", "\n### ", 1)) != levels(text)

"""docs/data.md's table of other tools' formats: each row is run as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import write_jsonl

from qpref.data.check import check_data
from qpref.recipe.resolve import make_plan
from qpref.records import PreferencePair

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
SECTION = PAGE.partition("## Formats of other tools")[2].partition("\n## ")[0]
ROWS = [
    (re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", tool), name, json.loads(example), use)
    for tool, name, example, use in re.findall(r"^\| (.+?) \| (.+?) \| `(\{.*\})` \| (.*?) ?\|$", SECTION, re.MULTILINE)
]
TOOLS = (
    "TRL", "Axolotl", "LLaMA-Factory", "ms-swift", "OpenAI", "Together", "Fireworks", "Vertex AI", "Mistral", "Argilla",
    "distilabel", "Label Studio",
)  # fmt: skip
GREETINGS = ("Be brief.", "Hello.")


def checked(example, settings, folder):
    """Check a file of the one row under a recipe whose [data] has these lines."""
    path = write_jsonl(folder / "row.jsonl", [example])
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[model]\nbase = "none"\n[loss]\nname = "dpo"\n[data]\ntrain = {json.dumps(str(path))}\n{settings}\n'
    )
    return check_data(make_plan(recipe).sources, [], pairs_only=False)


def test_every_line_of_the_table_is_read_here():
    assert len(ROWS) == len([line for line in SECTION.splitlines() if line.startswith("|")]) - 2 > 30


def test_every_tool_has_a_line():
    assert [tool for tool in TOOLS if not any(name.startswith(tool) for name, _, _, _ in ROWS)] == []


@pytest.mark.parametrize(
    ("example", "use"), [row[2:] for row in ROWS], ids=[f"{tool}, {name}" for tool, name, _, _ in ROWS]
)
def test_each_row_is_read_as_the_page_says(example, use, tmp_path):
    if refused := re.match(r"refused \(`(\w+)`\)", use):
        (finding,) = checked(example, "", tmp_path).report.findings
        assert finding.code == refused[1]
        return
    settings = "\n".join(line for line in re.findall(r"`(.*?)`", use) if "=" in line)
    (record,) = checked(example, settings, tmp_path).train.rows()
    assert record.prompt[-1].content == "1 + 1?"
    assert [turn.content for turn in record.prompt[:-1]] == [text for text in GREETINGS if text in json.dumps(example)]
    if isinstance(record, PreferencePair):
        assert [record.chosen[0].content, record.rejected[0].content] == ["2", "21"]
    else:
        assert (record.completion[0].content, record.label) == ("2", True)


@pytest.mark.parametrize(
    ("example", "use"), [row[2:] for row in ROWS if "=" in row[3]], ids=[row[1] for row in ROWS if "=" in row[3]]
)
def test_no_row_has_settings_that_it_does_not_need(example, use, tmp_path):
    assert list(checked(example, "", tmp_path).train.rows()) == []

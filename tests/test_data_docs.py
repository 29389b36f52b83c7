"""docs/data.md: its examples are the row formats, its tables the readers and the codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qpref.hooks.manager import READER, PluginHost, installed_offers
from qpref.records import Message, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.contest_formats import BY_NAME, CONTESTS
from qpref.rows.formats import COLUMNS, ROW_FORMATS, format_of, records_of_row

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text()
SOURCE = Source(path="pairs.jsonl", line=1)


EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


def user(*texts):
    return tuple(
        Message(role="user" if place % 2 == 0 else "assistant", content=text) for place, text in enumerate(texts)
    )


def pair(prompt, chosen, rejected, **more):
    sides = {
        side: (Message(role="assistant", content=text),) for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return PreferencePair(prompt=prompt, source=SOURCE, **sides, **more)


def single(prompt, completion, label):
    turn = (Message(role="assistant", content=completion),)
    return UnpairedExample(prompt=prompt, completion=turn, label=label, source=SOURCE)


SYSTEM = Message(role="system", content="Be brief.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = (
    Message(role="user", content="Weather in Oslo?"),
    Message(role="assistant", content="", extra={"tool_calls": [CALL]}),
)
SUM = pair(user("1 + 1?"), "2", "21")

RECORDS = [
    [pair(user("Why is the sky blue?"), "Air scatters blue light most.", "It just is.", margin=0.5)],
    [pair((SYSTEM, *user("Hi", "Hello.", "Why?")), "Habit.", "I am glad that you ask.")],
    [
        pair(
            (*CALLED, Message(role="tool", content="3 degrees, rain", extra={"name": "weather"})),
            "3 degrees and rain.",
            "Sunny.",
            tools=(
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                    },
                },
            ),
        )
    ],
    [SUM],
    [SUM],
    [SUM],
    [SUM],
    [SUM],
    [pair(user("Name a fruit", "Pear", "Another"), "Fig", "Pear")],
    [SUM, pair(user("1 + 1?"), "2", "3", number=1)],
    [pair(user("Name a fruit", "Pear", "Another"), "Fig", "Pear")],
    [pair((SYSTEM, *CALLED, Message(role="tool", content="rain")), "Rain.", "Sun.")],
    [pair(user("Translate to French: dog", "chien", "Translate to French.\ncat"), "chat", "chien")],
    [pair((Message(role="system", content="You translate."), *user("Translate to French: cat")), "chat", "chien")],
    [SUM],
    [pair((SYSTEM, *user("1 + 1?")), "2", "21")],
    [pair(user("1 + 1?"), "2", "21"), pair(user("1 + 1?"), "two", "21", number=1)],
    [SUM],
    [
        pair(user("1 + 1?"), "2", "3"),
        pair(user("1 + 1?"), "2", "21", number=1),
        pair(user("1 + 1?"), "3", "21", number=2),
    ],
    [pair((SYSTEM, *user("1 + 1?")), "2", "21")],
    [SUM],
    [SUM],
    *[[SUM]] * 11,
    [single(user("1 + 1?"), "2", True)],
    [single(user("1 + 1?"), "21", False)],
    *[[pair(user("1 + 1?"), "One and one. 2", "21")]] * 3,
    [
        pair(
            user("1 + 1 + 1?"),
            "Step 1: 1 + 1 = 2.\nStep 2: 2 + 1 = 3.",
            "Step 1: 1 + 1 = 2.\nStep 2: 2 + 1 = 21.",
        )
    ],
]
MASKED = ("One and one. ",) * 3 + ("Step 1: 1 + 1 = 2.\nStep 2:",)


def test_every_example_has_its_records_here():
    assert len(RECORDS) == len(EXAMPLES)


@pytest.mark.parametrize("number", range(len(RECORDS)), ids=[str(format_of(values)) for values in EXAMPLES])
def test_each_example_becomes_the_records_that_the_page_says(number):
    assert records_of_row(Row(values=EXAMPLES[number], source=SOURCE)) == RECORDS[number]


@pytest.mark.parametrize(("values", "text"), list(zip(EXAMPLES[-len(MASKED) :], MASKED, strict=True)))
def test_each_example_of_a_mask_masks_what_the_page_says(values, text):
    ((found,),) = [record.chosen for record in records_of_row(Row(values=values, source=SOURCE))]
    assert found.masked == ((0, len(text)),)
    assert found.content.startswith(text)


def test_every_format_has_an_example():
    assert {format_of(values) for values in EXAMPLES} == set(ROW_FORMATS) - BY_NAME


def test_the_order_of_precedence_names_every_format():
    assert set(re.findall(r"^\d+\. `(\w+)`:", PAGE, re.MULTILINE)) == set(ROW_FORMATS) - BY_NAME


@pytest.mark.parametrize("name", CONTESTS)
def test_the_table_of_comparisons_has_each_format_with_its_columns(name):
    (row,) = re.findall(rf"^\| `{name}`.*\|$", PAGE, re.MULTILINE)
    section = CONTESTS[name].section
    columns = {path.split(".")[0] for path in (section.first, section.second, *section.verdict_columns)}
    assert columns <= set(re.findall(r"`([\w ]+)`", row))
    assert ("by name" in row) is (name in BY_NAME)


@pytest.mark.parametrize(
    "name", [offer.name for offer in installed_offers() if (offer.kind, offer.distribution) == ("read", "qpref")]
)
def test_every_reader_has_a_line(name):
    assert re.search(rf"^\|[^|]*`{re.escape(name)}`", PAGE, re.MULTILINE)
    assert PluginHost().load(READER, name).record.summary


def test_every_column_that_a_format_reads_is_documented():
    assert [name for name in sorted(COLUMNS) if f'"{name}"' not in PAGE and f"`{name}`" not in PAGE] == []


def test_every_code_is_in_the_table():
    source = "".join(
        path.read_text()
        for path in [*(ROOT / "qpref/data").glob("*.py"), *(ROOT / "plugins/qpref_plugins").glob("read_*/*.py")]
        if path.name not in ("check.py", "load.py", "tokenize.py", "truncate.py")
    )
    codes = set(re.findall(r'(?:BadRowError\(\s*|code=)"(\w+)"', source))
    table = PAGE.partition("## Refused rows")[2]
    assert [code for code in sorted(codes) if f"`{code}`" not in table] == []

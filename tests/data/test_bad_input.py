"""Whatever a data file holds, each row is a record, or a finding with its place, a code and a reason; quickly."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpref.data.check import check_data
from qpref.data.data_report import DataReport
from qpref.errors import DataError
from qpref.hooks.manager import READER, PluginHost
from qpref.recipe.choices import SourceChoice
from qpref.records import Finding, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import COLUMNS, ROW_FORMATS, records_of_row

HOST = PluginHost()
MAX_SECONDS = 2
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
LONG = 4 * 2**20 + 1
DEEP = 100_000


def read_rows(path: Path) -> DataReport:
    """What the core says of one JSON Lines file."""
    source = SourceChoice(location=str(path), split="train", reader=HOST.load(READER, "jsonl"))
    return check_data([source], []).report


def verdicts(path: Path, reader: str | None = None) -> list[tuple[int, str, str]]:
    """(line, code, reason) of each row of a file; the code of a row that became records is "kept".

    What stops the reading is the last: its line is 0 where its message names none, its code "stopped".
    """
    reported, stop = [], ""
    started = time.process_time()
    try:
        for item in HOST.load(READER, reader or path.name.partition(".")[2]).record.read(path):
            result = item if isinstance(item, Finding) else records_of_row(item)
            if isinstance(result, Finding):
                assert (result.severity, result.source.path) == ("error", str(path))
                reported.append((result.source.line, result.code, result.message))
            else:
                reported.append((item.source.line, "kept", type(result[0]).__name__))
    except DataError as error:
        stop = error.what
    assert time.process_time() - started < MAX_SECONDS
    if stop:
        assert stop.startswith(f"{path}:")
        line, _, message = stop.removeprefix(f"{path}:").partition(": ")
        reported.append((int(line), "stopped", message) if line.isdigit() else (0, "stopped", stop))
    return reported


@dataclass(frozen=True)
class Bad:
    """A bad row, or file, and what is reported of it."""

    raw: bytes
    code: str
    reason: str


def row(code: str, reason: str, **changes: object) -> Bad:
    """A JSON row that is good but for some columns; one that is None is left out."""
    values = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return Bad(json.dumps(values).encode(), code, reason)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


def single(code: str, reason: str, **changes: object) -> Bad:
    values = {"prompt": "Why?", "completion": "Because.", "label": True} | changes
    return row(code, reason, chosen=None, rejected=None, **values)


def ranked(code: str, reason: str, **changes: object) -> Bad:
    return row(code, reason, chosen=None, rejected=None, **changes)


WHOLE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]

NOT_JSON = {
    "NaN": Bad(b'{"prompt": NaN}', "unreadable", "NaN is not JSON"),
    "Infinity": Bad(b'{"weight": Infinity}', "unreadable", "Infinity is not JSON"),
    "-Infinity": Bad(b'{"weight": [-Infinity]}', "unreadable", "-Infinity is not JSON"),
    "a key twice": Bad(b'{"prompt": "a", "prompt": "b"}', "unreadable", "duplicate key 'prompt'"),
    "a key twice, once escaped": Bad(b'{"prompt": "a", "\\u0070rompt": "b"}', "unreadable", "duplicate key 'prompt'"),
    "a key twice in a message": Bad(b'{"prompt": [{"role": "a", "role": "b"}]}', "unreadable", "duplicate key 'role'"),
    "half a surrogate pair": Bad(b'{"prompt": "\\ud800"}', "unreadable", "half of a surrogate pair"),
    "the other half": Bad(b'{"prompt": "\\uDC00"}', "unreadable", "half of a surrogate pair"),
    "surrogates the wrong way round": Bad(b'{"prompt": "\\ude00\\ud83d"}', "unreadable", "half of a surrogate pair"),
    "half a surrogate pair in a key": Bad(b'{"\\udc00": 1}', "unreadable", "half of a surrogate pair"),
    "half a surrogate pair in a message": Bad(b'{"chosen": [{"role": "\\ud800"}]}', "unreadable", "surrogate pair"),
    "100,000 lists": Bad(b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "unreadable", "nested too deeply"),
    "100,000 objects": Bad(b'{"a":' * DEEP + b"1" + b"}" * DEEP, "unreadable", "nested too deeply"),
    "a number of 5,000 digits": Bad(b'{"weight": ' + b"1" * 5000 + b"}", "unreadable", "a number of 5000 digits"),
    "a number of 1,000,000 digits": Bad(b'{"weight": ' + b"1" * 10**6 + b"}", "unreadable", "of 1000000 digits"),
    "cut off in a text": Bad(b'{"prompt": "Wh', "unreadable", "not JSON: the row doesn't end on its line"),
    "cut off after a key": Bad(b'{"prompt"', "unreadable", "not JSON: the row doesn't end on its line"),
    "cut off after a value": Bad(b'{"prompt": 1', "unreadable", "not JSON: the row doesn't end on its line"),
    "cut off in an escape": Bad(b'{"prompt": "\\u12', "unreadable", "not JSON: the row doesn't end on its line"),
    "an unknown escape": Bad(b'{"prompt": "\\x"}', "unreadable", "a lone backslash in '\\x'"),
    "a raw tab in a text": Bad(b'{"prompt": "\t"}', "unreadable", "not JSON: a raw tab inside a text"),
    "a raw NUL in a text": Bad(b'{"prompt": "\0"}', "unreadable", "not JSON: the control character U+0000"),
    "NUL bytes": Bad(bytes(100), "unreadable", "not JSON: zero bytes"),
    "single quotes": Bad(b"{'prompt': 'x'}", "unreadable", "not JSON: single quotes, as Python prints a dict"),
    "a comma too many": Bad(b'{"prompt": "x",}', "unreadable", "not JSON: "),
    "a comment": Bad(b"// a comment", "unreadable", "not JSON: a comment"),
    "two values": Bad(b"{} {}", "unreadable", "not JSON: several objects on one line"),
    "a number with a leading zero": Bad(b'{"weight": 01}', "unreadable", "not JSON: "),
    "a hexadecimal number": Bad(b'{"weight": 0x1}', "unreadable", "not JSON: "),
    "Python's True": Bad(b'{"label": True}', "unreadable", "not JSON: True, as Python prints"),
    "CSV": Bad(b"Why?,Because.,No idea.", "unreadable", "not JSON: Expecting value"),
    "null": Bad(b"null", "unreadable", "expected a JSON object, found null"),
    "true": Bad(b"true", "unreadable", "expected a JSON object, found true or false"),
    "a number": Bad(b"3.5", "unreadable", "expected a JSON object, found a number"),
    "a text": Bad(b'"Why?"', "unreadable", "expected a JSON object, found a text"),
    "an array": Bad(b"[]", "unreadable", "expected a JSON object, found an array"),
}
NOT_UTF8 = {
    "a stray byte": Bad(b'{"prompt": "\xff"}', "unreadable", "not UTF-8 (byte 13 of the line)"),
    "Latin-1": Bad('{"prompt": "Größe"}'.encode("latin-1"), "unreadable", "not UTF-8"),
    "UTF-16": Bad('{"prompt": "x"}'.encode("utf-16-le").replace(b"\n", b""), "unreadable", "not JSON"),
    "UTF-16 with its mark": Bad(b"\xff\xfe{\0}\0", "unreadable", "not UTF-8 (byte 1 of the line)"),
    "a cut character": Bad(b'{"prompt": "\xf0\x9f\x98"}', "unreadable", "not UTF-8"),
    "an encoded surrogate": Bad(b'{"prompt": "\xed\xa0\x80"}', "unreadable", "not UTF-8"),
    "an overlong slash": Bad(b'{"prompt": "\xc0\xaf"}', "unreadable", "not UTF-8"),
    "a byte order mark within": Bad(b"\xef\xbb\xbf{}", "unreadable", "not JSON"),
}
TOO_LONG = {
    "4 MiB and a byte": Bad(b'{"a": "' + b"x" * LONG + b'"}', "unreadable", "the line is longer than 4 MiB"),
    "64 MiB": Bad(b"x" * 64 * 2**20, "unreadable", "the line is longer than 4 MiB"),
    "64 MiB of brackets": Bad(b"[" * 64 * 2**20, "unreadable", "the line is longer than 4 MiB"),
}
PARTS = {
    "an empty object": Bad(b"{}", "unknown_format", "it has no column"),
    "unknown columns": row("unknown_format", "it has question", prompt=None, chosen=None, rejected=None, question="x"),
    "all columns null": Bad(b'{"prompt": null, "chosen": null}', "unknown_format", "no known row format"),
    "prompt alone": row("not_a_pair", "no chosen and no rejected", chosen=None, rejected=None),
    "no prompt": row("not_a_pair", "no prompt", prompt=None),
    "no chosen": row("not_a_pair", "no chosen", chosen=None),
    "no rejected": row("not_a_pair", "no rejected", rejected=None),
    "columns in capitals": Bad(b'{"Prompt": "a", "Chosen": "b", "Rejected": "c"}', "unknown_format", "Prompt, Chosen"),
    "a prompt of white space": row("empty", "prompt is empty", prompt=" \n\t"),
    "an empty prompt": row("empty", "prompt is empty", prompt=""),
    "an empty chosen": row("empty", "chosen is empty", chosen=""),
    "an empty rejected": row("empty", "rejected is empty", rejected="\u2003"),
    "no messages": row("not_a_message", "prompt: expected a text or a list of messages", prompt=[]),
    "a message without content": row("not_a_message", "a message's content is a text", prompt=[{"role": "user"}]),
    "a message without a role": row(
        "not_a_message", "a message without a role; it has content", prompt=[{"content": "x"}]
    ),
    "an empty message": row("not_a_message", "a message without a role; it has no key", prompt=[{}]),
    "a message that is a text": row("not_a_message", "turn 1: a message has a role", prompt=["Why?"]),
    "a message that is null": row("not_a_message", "found null", prompt=[None]),
    "a list of lists": row("not_a_message", "found a list", prompt=[turns("user")]),
    "an unknown role": row("not_a_message", "role 'narrator'; known", prompt=turns("narrator")),
    "a role that is call or result": row("not_a_message", "a call or its result", prompt=turns("user", "function")),
    "a role that is a number": row("not_a_message", "role 3; known", prompt=[{"role": 3, "content": "x"}]),
    "a role that is a list": row("not_a_message", "role a list", prompt=[{"role": ["user"], "content": "x"}]),
    "an unknown speaker": row("not_a_message", "from 'Alice'; known", prompt=[{"from": "Alice", "value": "x"}]),
    "a speaker without a value": row("not_a_message", "found null", prompt=[{"from": "human"}]),
    "a content of parts": row("not_a_message", "a part without a text", prompt=[{"role": "user", "content": [{}]}]),
    "a content that is a number": row("not_a_message", "found a number", prompt=[{"role": "user", "content": 3}]),
    "a column of images": row("not_text", "the row has images; qpref trains on text alone", images=["a.png"]),
    "an image": row("not_a_message", "images cannot be", prompt=[{"role": "user", "content": "x", "images": ["a"]}]),
    "messages in Python notation": row("not_a_message", "in Python notation", prompt=str(turns("user"))),
    "chosen is a number": row("not_a_message", "chosen: expected a text", chosen=3),
    "chosen is true": row("not_a_message", "chosen: expected a text", chosen=True),
    "chosen is an object": row("not_a_message", "chosen: expected a text", chosen={"name": "x"}),
    "the assistant first, and twice": row("role_order", "turn 2", prompt=turns("assistant", "assistant", "user")),
    "a tool first": row("role_order", "the tool's turn first", prompt=turns("tool", "user")),
    "two questions": row("role_order", "the user's turn after the user's", prompt=turns("user", "user")),
    "two answers": row("role_order", "turn 3", prompt=turns("user", "assistant", "assistant", "user")),
    "two system turns": row("role_order", "turn 2: the system's", prompt=turns("system", "system", "user")),
    "a late system turn": row("role_order", "turn 3", prompt=turns("user", "assistant", "system", "user")),
    "a tool after the user": row("role_order", "the tool's turn after", prompt=turns("user", "tool")),
    "a prompt that ends with the assistant": row("role_order", "the last turn", prompt=turns("user", "assistant")),
    "a prompt of the system alone": row("role_order", "the last turn is the system's", prompt=turns("system")),
    "a response of the user": row("role_order", "chosen: expected one turn", chosen=turns("user")),
    "a response of two turns": row("role_order", "found: assistant, assistant", chosen=turns("assistant", "assistant")),
    "a response of many turns": row("role_order", "assistant, user, ...", chosen=turns("assistant", "user") * 99),
    "an empty turn within": row(
        "empty", "turn 2 is empty", prompt=[WHOLE[0], {"role": "assistant", "content": ""}, WHOLE[0]]
    ),
    "tool calls that are a text": row("not_a_message", "tool_calls is a list", chosen=[WHOLE[1] | {"tool_calls": "x"}]),
    "tools that are no JSON": row("not_a_message", "tools: expected a list of JSON schemas", tools="weather()"),
    "tools that are an object": row("not_a_message", "tools: expected a list", tools={"name": "f"}),
    "two system texts": row("role_order", "turn 2: the system's", prompt=turns("system", "user"), system="y"),
    "a system column that is a number": row("not_a_message", "system: expected a text", system=3),
    "a system column of two texts": row("not_a_message", "system: expected one text", system=turns("system", "system")),
    "a function call that is no JSON": row(
        "not_a_message", "JSON with name", chosen={"from": "function_call", "value": "f()"}
    ),
}
CONVERSATIONS = {
    "other questions": row(
        "different_prompts", "share no first turn", prompt=None, chosen=WHOLE, rejected=[turns("user")[0], WHOLE[1]]
    ),
    "answers without a question": row(
        "different_prompts", "there is no prompt", prompt=None, chosen=WHOLE[1:], rejected=WHOLE[1:]
    ),
    "another later question": row(
        "different_prompts",
        "part at turn 3",
        prompt=None,
        chosen=[*WHOLE, *turns("user", "assistant")],
        rejected=[*WHOLE, *WHOLE],
    ),
    "a prompt that is not the conversations'": row(
        "different_prompts", "start with the prompt", prompt="How?", chosen=WHOLE, rejected=WHOLE
    ),
    "a longer chosen": row(
        "role_order", "chosen: expected one turn", prompt=None, chosen=[*WHOLE, *WHOLE], rejected=WHOLE
    ),
    "whole beside a text": row("role_order", "chosen: expected one turn", chosen=WHOLE),
    "an empty list of whole": row("not_a_message", "an empty list", prompt=None, chosen=[], rejected=[]),
    "HH without a question": row(
        "different_prompts", "no prompt", prompt=None, chosen="\n\nHuman:", rejected="\n\nHuman:"
    ),
    "HH with an empty answer": row(
        "empty",
        "chosen is empty",
        prompt=None,
        chosen="\n\nHuman: a\n\nAssistant:",
        rejected="\n\nHuman: a\n\nAssistant: b",
    ),
    "HH of one side": row("not_a_pair", "no prompt", prompt=None, chosen="\n\nHuman: a\n\nAssistant: b", rejected="b"),
    "HH with two questions": row(
        "role_order",
        "turn 2",
        prompt=None,
        **dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"),
    ),
    "ShareGPT without chosen": row(
        "not_a_pair",
        "last turn is the user's",
        prompt=None,
        chosen=None,
        conversations=[{"from": "human", "value": "x"}],
    ),
    "ShareGPT of nothing": row("not_a_message", "an empty list", prompt=None, conversations=[]),
    "ShareGPT of a number": row("not_a_message", "found a number", prompt=None, conversations=3),
    "ShareGPT that ends with the answer": row(
        "role_order",
        "the last turn",
        prompt=None,
        conversations=[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
    ),
    "Alpaca with three outputs": row(
        "not_a_pair", "3 of them", prompt=None, chosen=None, rejected=None, instruction="x", output=["a", "b", "c"]
    ),
    "Alpaca with one output": row(
        "not_a_pair", "1 of them", prompt=None, chosen=None, rejected=None, instruction="x", output=["a"]
    ),
    "Alpaca with an input that is a number": row(
        "not_a_pair", "input: expected a text", prompt=None, instruction="x", input=3
    ),
    "Alpaca with an empty instruction": row("empty", "prompt is empty", prompt=None, instruction=""),
    "Alpaca with a history of texts": row(
        "not_a_message", "history: expected", prompt=None, instruction="x", history=["a", "b"]
    ),
    "OpenAI without messages": ranked(
        "not_a_pair", "input: expected an object", input={}, preferred_output="a", non_preferred_output="b"
    ),
    "OpenAI with a text as input": ranked(
        "not_a_pair", "input: expected an object", input="x", preferred_output="a", non_preferred_output="b"
    ),
    "OpenAI without the worse output": ranked("not_a_pair", "no non_preferred_output", input={}, preferred_output="a"),
}
CONTROL = {
    f"U+{code:04X} in {side}": row(
        "control_character", f"{side}: the control character U+{code:04X} at character 4", **{side: f"a😀b{chr(code)}"}
    )
    for code, side in zip((0, 1, 7, 8, 11, 12, 14, 26, 27, 31, 127), ["prompt", "chosen", "rejected"] * 4, strict=False)
} | {
    "NUL in a message": row("control_character", "turn 1: the control", prompt=[{"role": "user", "content": "\0"}]),
    "NUL in a name": row("control_character", "turn 1: the control", prompt=[WHOLE[0] | {"name": "\0"}]),
    "NUL in a tool": row("control_character", "tools: the control", tools=[{"name": "\0"}]),
    "NUL in a key of a tool call": row("control_character", "U+0000", chosen=[WHOLE[1] | {"tool_calls": [{"\0": 1}]}]),
    "NUL in the system column": row("control_character", "system: the control", system="\0"),
    "a terminal's colours": row("control_character", "U+001B", chosen="\x1b[31mred"),
}
NUMBERS = {
    "a weight that is a text": row("bad_number", "weight: expected a number, found 'heavy'", weight="heavy"),
    "a weight that is true": row("bad_number", "weight: expected a number, found True", weight=True),
    "a weight that is a list": row("bad_number", "weight: expected a number, found a list", weight=[1]),
    "a negative weight": row("bad_number", "weight: -1 is below 0", weight=-1),
    "a weight of 400 digits": row("bad_number", "weight: infinite, or a number too large", weight=10**400),
    "an infinite weight": Bad(b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1e999}', "bad_number", "inf"),
    "a margin that is NaN as a text": row("bad_number", "margin: expected a number", margin="nan"),
    "a margin that is an object": row("bad_number", "margin: expected a number", margin={}),
}
LABELS = {
    "a label that is yes": single("bad_label", "label: expected true or false, found 'yes'", label="yes"),
    "a label that is 2": single("bad_label", "found 2", label=2),
    "a label that is -1": single("bad_label", "found -1", label=-1),
    "a label that is 0.5": single("bad_label", "found 0.5", label=0.5),
    "a label that is empty": single("bad_label", "found ''", label=""),
    "a label that is a list": single("bad_label", "found a list", label=[True]),
    "a label of 400 digits": single("bad_label", "found a number of about 401 digits", label=10**400),
    "no label": single("not_an_example", "no label", label=None),
    "no completion": single("not_an_example", "no completion", completion=None),
    "a label alone": row("not_an_example", "no completion", prompt="x", chosen=None, rejected=None, label=True),
    "a completion without a prompt": single("not_a_pair", "no prompt", prompt=None),
    "an empty completion": single("empty", "completion is empty", completion=" "),
    "a completion of the user": single("role_order", "completion: expected one turn", completion=turns("user")),
}
RANKS = {
    "one response": ranked("not_a_pair", "responses: expected a list of 2 to 64", responses=["a"], ranks=[1]),
    "65 responses": ranked("not_a_pair", "65 of them", responses=["a"] * 65, ranks=list(range(65))),
    "responses without scores": ranked("bad_number", "neither a rank nor a score", responses=["a", "b"]),
    "a score too few": ranked("bad_number", "found 1 of them", responses=["a", "b"], scores=[1]),
    "a score that is null": ranked(
        "bad_number", "scores: expected a number, found None", responses=["a", "b"], scores=[1, None]
    ),
    "a score that is a text": ranked("bad_number", "found 'N/A'", responses=["a", "b"], scores=[1, "N/A"]),
    "all tied": ranked("tied", "all 2 responses", responses=["a", "b"], scores=[1, 1]),
    "an empty response": ranked("empty", "is empty", responses=["a", ""], scores=[1, 2]),
    "a response that is null": ranked("not_a_message", "responses, number 2", responses=["a", None], scores=[1, 2]),
    "a response without a text": ranked("not_a_message", "number 1", responses=[{"score": 1}, {"score": 2}]),
    "responses that are a text": ranked("not_a_pair", "found a text", responses="a", ranks=[1]),
    "ranked without a prompt": ranked("not_a_pair", "no prompt", prompt=None, ranked=["a", "b"]),
    "SHP with another label": ranked(
        "unlisted_verdict",
        "labels = 2; expected 1 (human_ref_A is better)",
        history="x",
        human_ref_A="a",
        human_ref_B="b",
        labels=2,
    ),
    "an arena tie": ranked("tied", "winner: a tie", conversation_a=WHOLE, conversation_b=WHOLE, winner="tie"),
    "an arena of an unknown winner": ranked(
        "unlisted_verdict",
        "winner = 'gpt-4'; expected 'model_a'",
        conversation_a=WHOLE,
        conversation_b=WHOLE,
        winner="gpt-4",
    ),
}
ROWS = NOT_JSON | NOT_UTF8 | TOO_LONG | PARTS | CONVERSATIONS | CONTROL | NUMBERS | LABELS | RANKS


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_line_is_refused_at_its_place_and_its_neighbours_are_kept(tmp_path, name):
    bad, good = ROWS[name], json.dumps(GOOD).encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(good + b"\n" + bad.raw + b"\n" + good + b"\n")
    before, (line, code, reason), after = verdicts(path)
    assert (before[:2], after[:2]) == ((1, "kept"), (3, "kept"))
    assert (line, code) == (2, bad.code)
    assert bad.reason in reason


TEXTS = b"prompt,chosen,rejected"
CSV = {
    "a field too few": Bad(b"a,b", "unreadable", "2 fields, where the header has 3"),
    "a field too many": Bad(b"a,b,c,d", "unreadable", "4 fields, where the header has 3"),
    "a quote that is never closed": Bad(b'"a,b,c', "unreadable", "text after a closing quote"),
    "text after a closing quote": Bad(b'"a"b,c,d', "unreadable", "text after a closing quote"),
    "bytes that are no UTF-8": Bad(b"\xff,b,c", "unreadable", "not UTF-8"),
    "another separator": Bad(b"a;b;c", "unreadable", "1 fields, where the header has 3"),
    "a row of 4 MiB": Bad(b"a,b," + b"x" * LONG, "unreadable", "the row is longer than 4 MiB"),
    "a row of commas": Bad(b"," * LONG, "unreadable", "the row is longer than 4 MiB"),
    "empty fields": Bad(b",,", "unknown_format", ""),
    "an empty last field": Bad(b"a,b,", "not_a_pair", "no rejected"),
    "NUL": Bad(b"a,b,\0", "control_character", "U+0000"),
    "messages out of order": Bad(b'"[{""role"": ""system"", ""content"": ""x""}]",b,c', "role_order", "the system's"),
    "messages as pandas writes them": Bad(
        b"\"[{'role': 'user', 'content': 'x'}]\",b,c", "not_a_message", "in Python notation"
    ),
}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("name", CSV)
def test_a_bad_csv_record_is_refused_at_its_line(tmp_path, name, suffix):
    bad = CSV[name]
    raw = b'%b\n"a\n\n",b,c\n%b\n"a",b,c\n' % (TEXTS, bad.raw)
    if suffix == "tsv":
        raw = raw.replace(b",", b"\t").replace(b'""\t ', b'"", ')
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(raw)
    before, (line, code, reason), *after = verdicts(path)
    assert (before[:2], line, code) == ((2, "kept"), 5, bad.code)
    assert bad.reason in reason
    assert [verdict[:2] for verdict in after] == [(6, "kept")]


FILES = {
    "an array as JSON Lines": ("jsonl", b'[{"a": NaN}]', 1, "unreadable", "NaN is not JSON"),
    "JSON Lines as an array": ("json", b"{}\nx\n", 1, "unknown_format", "no column"),
    "an empty array file": ("json", b"", 1, "stopped", "the file is empty"),
    "an array without an end": ("json", b"[\n", 2, "stopped", "the array has no end"),
    "an array cut in a row": ("json", b'[\n{"a": 1,', 2, "stopped", "not JSON"),
    "an array of a row of 9 MiB": (
        "json",
        b'["' + b"x" * 9 * 2**20 + b'"]',
        1,
        "stopped",
        "the row is longer than 4 MiB",
    ),
    "a number in place of an array": ("json", b"3", 1, "stopped", "expected an array of objects, found '3'"),
    "an array of lists without end": ("json", b"[" * DEEP, 1, "stopped", "the row is nested too deeply"),
    "an array that is no UTF-8": ("json", b'["\xff"]', 0, "stopped", "not UTF-8 (byte 3)"),
    "an array in UTF-16": ("json", '[{"a": 1}]'.encode("utf-16"), 1, "unknown_format", "it has a"),
    "an element that is no object": ("json", b"[1]", 1, "unreadable", "expected a JSON object, found a number"),
    "an element with NaN": ("json", b'[{"a": NaN}]', 1, "unreadable", "NaN is not JSON"),
    "an element of unknown format": ("json", b"[{}]", 1, "unknown_format", "no column"),
    "text as gzip": ("jsonl.gz", b"{}\n", 1, "unknown_format", "no column"),
    "an empty file as gzip, cut": ("jsonl.gz", gzip.compress(b"")[:12], 1, "stopped", "truncated"),
    "a cut gzip file": (
        "jsonl.gz",
        gzip.compress(random.Random(0).randbytes(9999).hex().encode())[:5000],
        1,
        "stopped",
        "truncated",
    ),
    "a gzip file with another checksum": ("jsonl.gz", gzip.compress(b"\n")[:-8] + bytes(8), 2, "stopped", "CRC"),
    "a gzip bomb of one line": ("jsonl.gz", gzip.compress(bytes(2**27)), 1, "stopped", "more than 200 times"),
    "a gzip bomb in an array": ("json.gz", gzip.compress(b"[" + b" " * 2**27), 0, "stopped", "more than 200 times"),
    "a gzip file of a bad line": ("jsonl.gz", gzip.compress(b"\nx\n"), 2, "unreadable", "not JSON"),
    "JSON Lines in gzip as a plain file": ("jsonl", gzip.compress(b"{}"), 1, "unknown_format", "no column"),
    "Parquet as JSON Lines": ("jsonl", b"PAR1\x15\x04\xff", 0, "stopped", "Parquet data; name it .parquet"),
    "text as Parquet": ("parquet", b"prompt,chosen,rejected\n", 1, "stopped", "not a Parquet file"),
    "an empty file as Parquet": ("parquet", b"", 1, "stopped", "not a Parquet file"),
    "a Parquet file cut off": ("parquet", b"PAR1" + bytes(999), 1, "stopped", "not a Parquet file"),
    "a CSV header with a name twice": ("csv", b"prompt,prompt\na,b\n", 1, "stopped", "duplicate column 'prompt'"),
    "a CSV header with an empty name": ("csv", b"prompt,\na,b\n", 1, "stopped", "a column has no name"),
    "a CSV file without a header": (
        "csv",
        b"Why?,Because.,No.\na,b,c\n",
        2,
        "unknown_format",
        "it has Why?, Because., No.",
    ),
    "a CSV file with old line ends": ("csv", b"prompt,chosen\ra,b\r", 1, "stopped", "carriage returns only"),
    "a CSV file in UTF-16": ("csv", "prompt,chosen\na,b\n".encode("utf-16"), 2, "not_a_pair", "no rejected"),
    "a CSV file with a quote open to its end": ("csv", b'prompt\n"a\nb\n', 2, "unreadable", "an unclosed quote"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_reported_with_its_place(tmp_path, name):
    suffix, raw, line, code, reason = FILES[name]
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(raw)
    reported = next(verdict for verdict in verdicts(path) if verdict[1] != "kept")
    assert reported[:2] == (line, code)
    assert reason in reported[2]


PARQUET = {
    "bytes as a text": ([{"prompt": b"\xff", "chosen": "a", "rejected": "b"}], "not_a_message", "found bytes"),
    "a null prompt": ([GOOD | {"prompt": None}], "not_a_pair", "no prompt"),
    "a number as a text": ([GOOD | {"prompt": 3}], "not_a_message", "found a number"),
    "NaN as a weight": ([GOOD | {"weight": float("nan")}], "bad_number", "weight: expected a number, found nan"),
    "NUL in a text": ([GOOD | {"prompt": "\0"}], "control_character", "U+0000"),
    "an empty list": ([GOOD | {"prompt": []}], "not_a_message", "an empty list"),
    "a struct without its fields": ([GOOD | {"prompt": [{"role": None}]}], "not_a_message", "a message without a role"),
    "a long row": ([GOOD | {"prompt": "x" * 20 * 2**20}], "unreadable", "the row is longer than 4 MiB"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_a_bad_parquet_row_is_refused_at_its_number(tmp_path, name):
    rows, code, reason = PARQUET[name]
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    ((line, found, reported),) = verdicts(path)
    assert (line, found) == (1, code)
    assert reason in reported


KEPT = {
    "CRLF": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\r\n',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "no newline at the end": json.dumps(GOOD).encode(),
    "extra columns": json.dumps(GOOD | {"id": 3, "meta": {"\0": "\0"}, "score_chosen": None}).encode(),
    "pair and single columns": json.dumps(GOOD | {"completion": "x", "label": 2}).encode(),
    "a text of 1,000,000 characters": json.dumps(GOOD | {"chosen": "x" * 10**6}).encode(),
    "right-to-left text": json.dumps(GOOD | {"chosen": "שלום\u202e\u200f"}).encode(),
    "10,000 combining marks": json.dumps(GOOD | {"chosen": "e" + "\u0301" * 10**4}).encode(),
    "10,000 zero-width spaces": json.dumps(GOOD | {"chosen": "e" + "\u200b" * 10**4}).encode(),
    "joined emoji": json.dumps(GOOD | {"chosen": "👨‍👩‍👧‍👦" * 100}, ensure_ascii=False).encode(),
    "a label as a text": json.dumps({"prompt": "a", "completion": "b", "label": "false"}).encode(),
    "a label as 0": json.dumps({"prompt": "a", "completion": "b", "label": 0}).encode(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_odd_and_not_bad_is_kept(tmp_path, name):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(KEPT[name])
    assert [verdict[:2] for verdict in verdicts(path)] == [(1, "kept")]


def test_there_are_150_cases_and_more():
    assert len(ROWS) + 2 * len(CSV) + len(FILES) + len(PARQUET) >= 150


# What is no file.


def refused(path: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert time.perf_counter() - started < 1
    return error.value.what


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")


def test_a_folder_is_refused(tmp_path):
    assert str(tmp_path) in refused(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in refused(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/stdin"])
def test_a_device_is_refused_at_once(device):
    assert device in refused(Path(device))


def test_a_link_to_a_device_is_refused_at_once(tmp_path):
    (tmp_path / "pairs.jsonl").symlink_to("/dev/zero")
    assert "not a regular file" in refused(tmp_path / "pairs.jsonl")


def test_a_link_that_leads_nowhere_or_to_itself_is_refused(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "none")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    assert "no such file" in refused(tmp_path / "a.jsonl")
    assert "b.jsonl" in refused(tmp_path / "b.jsonl")


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "real").write_text(json.dumps(GOOD))
    (tmp_path / "pairs.jsonl").symlink_to(tmp_path / "real")
    assert read_rows(tmp_path / "pairs.jsonl").kept == 1


def test_a_file_that_cannot_be_read_is_refused():
    path = Path("/proc/self/mem")  # a regular file, and even root cannot read its first byte
    assert refused(path) == f"{path}: cannot be read: Input/output error"


# Fuzz.


def check_record(record: PreferencePair | UnpairedExample) -> None:
    """What all records promise to those that read them."""
    responses = (record.completion,) if isinstance(record, UnpairedExample) else (record.chosen, record.rejected)
    assert record.prompt[-1].role in ("user", "tool")
    for response in responses:
        assert [message.role for message in response] == ["assistant"]
        assert response[0].content.strip() or "tool_calls" in response[0].extra
    for message in (*record.prompt, *(message for response in responses for message in response)):
        assert message.content.encode().translate(None, bytes([*range(9), 11, 12, *range(14, 32), 127])) == (
            message.content.encode()
        )
    assert record.weight >= 0


def check_judged(item: Row | Finding, path: str) -> None:
    """The row is records, or a finding with place and reason; whichever format it is read as."""
    for row_format in ("auto",) if isinstance(item, Finding) else ("auto", *ROW_FORMATS):
        result = item if isinstance(item, Finding) else records_of_row(item, row_format)
        if isinstance(result, Finding):
            assert (result.severity, result.source) == ("error", item.source)
            assert result.source.path == path
            assert result.code
            assert 10 < len(result.message) < 400
            assert "\n" not in result.message
        else:
            assert result
            for record in result:
                assert record.source == item.source
                check_record(record)


def valid_lines() -> list[bytes]:
    """A good row of each format, as JSON."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```json\n")[1:]]
    return [json.dumps(json.loads(block)).encode() for block in blocks]


def spoiled(choose: random.Random, line: bytes) -> bytes:
    """The line with some bytes changed, cut, doubled or put in."""
    raw = bytearray(line)
    for _ in range(choose.choice((1, 1, 2, 5, 20))):
        place, kind = choose.randrange(len(raw) + 1), choose.randrange(5)
        if kind == 0 and place < len(raw):
            raw[place] = choose.randrange(256)
        elif kind == 1:
            del raw[place : place + choose.randrange(20)]
        elif kind == 2:
            raw[place:place] = choose.choice(
                (
                    b'"',
                    b"\\",
                    b"{",
                    b"[",
                    b"]",
                    b"}",
                    b",",
                    b":",
                    b"\\u0000",
                    b"\\ud800",
                    b"null",
                    b"NaN",
                    b"1e999",
                    b"\0",
                )
            )
        elif kind == 3:
            raw[place:place] = raw[place : place + choose.randrange(40)]
        else:
            raw[place : place + 4] = choose.choice((b"true", b"null", b"-1.5", b'""  ', b"[]  ", b"{}  "))
    return bytes(raw).replace(b"\n", b"")


@pytest.mark.parametrize("seed", range(4))
def test_3000_spoiled_lines_are_each_judged(tmp_path, seed):
    choose = random.Random(seed)
    lines = [spoiled(choose, choose.choice(valid_lines())) for _ in range(3000)]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"{}\n" + b"\n".join(lines))
    items = [item for item in HOST.load(READER, "jsonl").record.read(path) if item.source.line]
    expected = [1, *(number for number, line in enumerate(lines, start=2) if not line.isspace() and line)]
    assert [item.source.line for item in items] == expected
    for item in items:
        check_judged(item, str(path))


def test_lines_cut_at_every_byte_are_each_judged(tmp_path):
    lines = [line[:length] for line in valid_lines() for length in range(1, len(line))]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"{}\n" + b"\n".join(lines))
    _, *items = (item for item in HOST.load(READER, "jsonl").record.read(path) if item.source.line)
    assert [item.source.line for item in items] == list(range(2, len(lines) + 2))
    assert all(isinstance(item, Finding) and item.code == "unreadable" for item in items)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_2000_lines_of_spoiled_csv_are_each_judged(tmp_path, suffix):
    choose = random.Random(suffix)
    separator = b"," if suffix == "csv" else b"\t"
    good = separator.join([b'"a ""b"" c"', b'"[{""role"": ""assistant"", ""content"": ""x""}]"', b"d"])
    lines = [spoiled(choose, good) for _ in range(2000)]
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(separator.join([b"prompt", b"chosen", b"rejected"]) + b"\n" + b"\n".join(lines))
    items = list(HOST.load(READER, suffix).record.read(path))
    places = [item.source.line for item in items]
    assert places == sorted(set(places))
    for item in items:
        check_judged(item, str(path))


KEYS = ["role", "content", "from", "parts", "type", "text", "messages", "tools", "candidates", "completion", "a"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["x", "a\n", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "human", "model", "tool_call"]),
        "content": st.sampled_from(["x", "y", ""]) | JSON,
    },
    optional={"name": JSON, "tool_calls": JSON},
)
VALUE = JSON | st.lists(MESSAGE, max_size=4) | st.text(max_size=8)
VALUES = st.dictionaries(st.sampled_from(sorted(COLUMNS)), VALUE, max_size=6) | st.fixed_dictionaries(
    {"prompt": VALUE, "chosen": VALUE, "rejected": VALUE}
)


@settings(max_examples=800, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(VALUES)
def test_800_rows_of_arbitrary_json_are_each_judged(values):
    check_judged(Row(values=values, source=Source(path="pairs.x", line=5)), "pairs.x")

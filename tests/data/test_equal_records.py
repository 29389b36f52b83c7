"""The same rows are the same records from every reader: 2,000 generated rows, in files of 50."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qpref.hooks.manager import READER, PluginHost
from qpref.records import Finding, Row, Source
from qpref.rows.formats import records_of_row

ROWS, FILES = 50, 40
HOST = PluginHost()
NOWHERE = Source(path="", line=0)

# Types of the columns, as a table library would infer them from all rows.

TEXT, NUMBER, YES = pyarrow.string(), pyarrow.float64(), pyarrow.bool_()
POINT = pyarrow.struct({"lat": NUMBER, "name": TEXT})
ARGUMENTS = pyarrow.struct({"city": TEXT, "days": NUMBER, "exact": YES, "tags": pyarrow.list_(TEXT), "at": POINT,
                            "points": pyarrow.list_(POINT)})  # fmt: skip


def message_type(arguments: Any) -> Any:
    function = pyarrow.struct({"name": TEXT, "arguments": arguments})
    call = pyarrow.struct({"id": TEXT, "type": TEXT, "function": function})
    keys = ("role", "content", "name", "tool_call_id", "reasoning_content", "reasoning", "refusal")
    return pyarrow.list_(pyarrow.struct(dict.fromkeys(keys, TEXT) | {"tool_calls": pyarrow.list_(call)}))


PROPERTY = pyarrow.struct({"type": TEXT, "default": TEXT, "minimum": NUMBER, "enum": pyarrow.list_(TEXT)})
PARAMETERS = pyarrow.struct({"type": TEXT, "properties": pyarrow.struct({"city": PROPERTY, "days": PROPERTY})})
TOOLS = pyarrow.list_(
    pyarrow.struct({"type": TEXT, "function": pyarrow.struct({"name": TEXT, "parameters": PARAMETERS})})
)

# Rows, as JSON has them: a key may be missing or null.

LETTERS = "ab,;\"'\\{}[]|:\n\r\t \u00e9\u4f60\U0001f642"
NUMBERS = (0, 1, -3, 2.0, -3.0, 0.5, 1e300, 2.0**60)
Values = dict[str, Any]


class Made:
    """Generated values: equal for equal seeds."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def text(self) -> str:
        return "".join(self.random.choices(LETTERS, k=self.random.choice((0, 1, 5, 9, 9, 9))))

    def number(self) -> float:
        return self.random.choice(NUMBERS)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def some(self, make: Callable[[], Any], least: int = 0) -> list[Any]:
        return [make() for _ in range(self.random.randint(least, 2))]

    def with_optional(self, required: Values, **makers: Callable[[], Any]) -> Values:
        """An object in which each optional key has a value, is null or is missing."""
        for key, make in makers.items():
            choice = self.random.randrange(4)
            required |= {} if choice == 0 else {key: None if choice == 1 else make()}
        return required

    def text_or_null(self) -> str | None:
        return self.text() if self.flag() else None

    def point(self) -> Values:
        return self.with_optional({}, lat=self.number, name=self.text)

    def arguments(self) -> Values:
        return self.with_optional(
            {}, city=self.text, days=self.number, exact=self.flag, tags=lambda: self.some(self.text_or_null),
            at=self.point, points=lambda: self.some(self.point),
        )  # fmt: skip

    def schema(self) -> Values:
        return self.with_optional(
            {}, type=self.text, default=self.text, minimum=self.number, enum=lambda: self.some(self.text_or_null)
        )

    def tool(self) -> Values:
        of_type = partial(self.with_optional, {"type": "object"})
        properties = partial(self.with_optional, {}, city=self.schema, days=self.schema)
        function = self.with_optional({"name": "weather"}, parameters=lambda: dict(of_type(properties=properties)))
        return {"type": "function", "function": function}

    def calling(self, as_text: bool) -> Values:
        def call() -> Values:
            make = (lambda: json.dumps(self.arguments())) if as_text else self.arguments
            function = self.with_optional({"name": "weather"}, arguments=make)
            return self.with_optional({"function": function}, id=lambda: "call_1", type=lambda: "function")

        turn = {"role": "assistant", "tool_calls": self.some(call, least=1)}
        return self.with_optional(turn, content=self.text, reasoning_content=self.text, refusal=self.text)

    def answering(self) -> Values:
        turn = {"role": "assistant", "content": self.text()}
        return self.with_optional(turn, name=self.text, reasoning=self.text, tool_calls=list)

    def flat(self) -> tuple[Iterator[Values], Values]:
        """Rows of texts and numbers: pairs, Alpaca's, or single completions; and the types of their columns."""
        layouts = [
            ("prompt", "chosen", "rejected"),
            ("instruction", "input", "chosen", "rejected"),
            ("prompt", "completion"),
        ]
        required: Values = dict.fromkeys(self.random.choice(layouts), self.text)
        optional: Values = dict.fromkeys(("system", "source"), self.text) | dict.fromkeys(
            ("weight", "margin"), self.number
        )
        types = dict.fromkeys([*required, "system", "source"], TEXT) | {"weight": NUMBER, "margin": NUMBER}
        if "completion" in required:
            required, types = required | {"label": self.flag}, types | {"label": YES}
        rows = (self.with_optional({name: make() for name, make in required.items()}, **optional) for _ in range(ROWS))
        return rows, types

    def nested(self) -> tuple[Iterator[Values], Values]:
        """Rows of conversations with tools and calls in several layouts, and the types of their columns."""
        as_text, tools_as_text = self.flag(), self.flag()
        turns, tool_type = message_type(TEXT if as_text else ARGUMENTS), TEXT if tools_as_text else TOOLS
        layout = self.random.choice(("pair", "whole", "openai", "objects"))

        def row() -> Values:
            prompt: list[Values] = [{"role": "user", "content": self.text()}]
            if self.flag():
                result = {"role": "tool", "content": self.text()}
                prompt += [self.calling(as_text), self.with_optional(result, tool_call_id=lambda: "call_1")]
            chosen, rejected = ([self.calling(as_text) if self.flag() else self.answering()] for _ in range(2))
            schemas = self.some(self.tool)
            tools = {"tools": json.dumps(schemas) if tools_as_text else schemas} if self.flag() else {}
            if layout == "openai":
                request = {"messages": prompt, **tools}
                return {"input": request, "preferred_output": chosen, "non_preferred_output": rejected}
            if layout == "objects":
                sides = {"chosen": prompt + chosen, "rejected": prompt + rejected}
                return {side: {"messages": messages, **tools} for side, messages in sides.items()}
            if layout == "whole":
                return {"chosen": prompt + chosen, "rejected": prompt + rejected, **tools}
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}

        whole = pyarrow.struct({"messages": turns, "tools": tool_type})
        types = {
            "pair": {"prompt": turns, "chosen": turns, "rejected": turns, "tools": tool_type},
            "whole": {"chosen": turns, "rejected": turns, "tools": tool_type},
            "openai": {"input": whole, "preferred_output": turns, "non_preferred_output": turns},
            "objects": {"chosen": whole, "rejected": whole},
        }
        return (row() for _ in range(ROWS)), types[layout]


# Writers, by reader.


def write_lines(path: Path, rows: list[Values], _: Values) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array(path: Path, rows: list[Values], _: Values) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


def gzipped(write: Callable[..., None]) -> Callable[..., None]:
    def write_gzipped(path: Path, rows: list[Values], schema: Values) -> None:
        write(path, rows, schema)
        path.write_bytes(gzip.compress(path.read_bytes(), 1))

    return write_gzipped


def table_of(rows: list[Values], schema: Values) -> Any:
    return pyarrow.Table.from_pylist(rows, pyarrow.schema(schema))


def write_parquet(path: Path, rows: list[Values], schema: Values) -> None:
    pyarrow.parquet.write_table(table_of(rows, schema), path)


def write_saved(path: Path, rows: list[Values], schema: Values) -> None:
    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset(table_of(rows, schema)).save_to_disk(str(path))


def separated(delimiter: str) -> Callable[..., None]:
    def write(path: Path, rows: list[Values], schema: Values) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(schema), delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            for row in rows:
                texts = {name: json.dumps(value) for name, value in row.items() if isinstance(value, list | dict)}
                writer.writerow(row | texts)

    return write


WRITERS = {
    "jsonl": write_lines, "json": write_array, "jsonl.gz": gzipped(write_lines), "json.gz": gzipped(write_array),
    "csv": separated(","), "tsv": separated("\t"), "parquet": write_parquet, "datasets": write_saved,
}  # fmt: skip


def as_values(record: Any) -> Values:
    """A record's fields, for JSON."""
    return {name: getattr(record, name) for name in record.__slots__}


def judged(rows: Iterable[Row | Finding]) -> list[str]:
    """Records of each row as JSON, so that 1, 1.0 and true differ; or that it is refused."""
    results = []
    for row in rows:
        found = row if isinstance(row, Finding) else records_of_row(row)
        if isinstance(found, Finding):
            results.append("refused")  # an empty text and a null have codes of their own
        else:
            records = [replace(record, source=NOWHERE) for record in found]
            results.append(json.dumps(records, default=as_values, sort_keys=True))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets.disable_progress_bars()
    yield tmp_path_factory.mktemp("equal")
    datasets.enable_progress_bars()


@given(seed=st.integers(0, 2**32 - 1), is_flat=st.booleans())
@settings(max_examples=FILES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_the_same_rows_are_the_same_records_from_every_reader(folder, seed, is_flat):
    made = Made(seed)
    found, types = made.flat() if is_flat else made.nested()
    rows = list(found)
    expected = judged(Row(values=row, source=NOWHERE) for row in rows)
    assert sum(result.startswith("[") for result in expected) > ROWS / 5
    for name, write in WRITERS.items():
        path = folder / f"rows.{name}"
        write(path, rows, types)
        results = judged(HOST.load(READER, name).record.read(path))
        different = [each for each in zip(rows, expected, results, strict=True) if each[1] != each[2]]
        assert (name, different[:1]) == (name, [])

"""What `--fix` writes stands in for the sources: the same recipe reads the same records from it, and refuses none."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import preference_rows, write_jsonl

from qpref.data.check import check_data
from qpref.data.clean import refuse_early, write_clean
from qpref.data.split import HeldOutShare
from qpref.errors import RecipeError
from qpref.hooks.manager import READER, PluginHost
from qpref.recipe.choices import SourceChoice

TURNS = [{"role": "user", "content": "1 + 1?"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"of": [1, 2.5], "round": None}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}]
BAD = {"prompt": "Why?", "chosen": "", "rejected": "No."}
ROWS = {
    "texts": [{"id": 7, "z": None, "prompt": "Why?", "chosen": "So.", "rejected": "No.", "a": {"b": [1, None]}}, BAD],
    "conversations": [
        {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3", "margin": 0.1},
        BAD,
    ],
    "tool calls": [
        {"prompt": TURNS, "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "rejected": "3",
         "tools": TOOLS},
        BAD,
    ],
    "ranked": [{"meta": "é\u2028\U0001f34e", "prompt": "1 + 1?", "responses": ["2", "3", "4"], "ranks": [1, 3, 2]},
               BAD],
    "completions": [{"prompt": "1 + 1?", "completion": "2", "label": 1}, {"prompt": "x", "label": 3}],
    "a verdict": [{"history": "1 + 1?", "human_ref_A": "3", "human_ref_B": "2", "labels": 0}, BAD],
}  # fmt: skip


def choice(path, split="train", **more):
    reader = PluginHost().load(READER, path.suffix.removeprefix("."))
    return SourceChoice(location=str(path), split=split, reader=reader, **more)


def records(checked):
    """The kept records of each split, without their locations."""
    splits = (checked.train, checked.heldout)
    return [[replace(one, source=None) for one in rows.rows()] for rows in splits if rows is not None]


def check(*choices, share=None):
    return check_data(choices, [], pairs_only=False, share=share)


def fixed_and_read_again(choices, folder):
    """The data set before and after, the second from the fixed files in place of the first one's sources."""
    before = check(*choices)
    fixed, _ = write_clean(before, folder / "clean.jsonl")
    assert [file.location for file in fixed] == [one.location for one in choices]
    reader = PluginHost().load(READER, "jsonl")
    after = check(
        *(replace(one, location=str(file.path), reader=reader) for one, file in zip(choices, fixed, strict=True))
    )
    return before, after


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_fixed_file_has_the_rows_as_they_were_read(rows, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    before, after = fixed_and_read_again([choice(path)], tmp_path)
    assert (after.report.read, after.report.refused) == (1, 0)
    assert records(after) == records(before) != [[]]
    assert (tmp_path / "clean.jsonl").read_text() == json.dumps(rows[0], ensure_ascii=False) + "\n"


def test_every_documented_row_is_kept_with_its_records(tmp_path):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    texts = re.findall(r"```json\n(.*?)```", page, re.DOTALL) + re.findall(r"\| `(\{.*\})` \| +\|$", page, re.MULTILINE)
    rows = [json.loads(text) for text in texts]
    before, after = fixed_and_read_again([choice(write_jsonl(tmp_path / "rows.jsonl", [*rows, {}]))], tmp_path)
    assert (before.report.refused, after.report.refused) == (1, 0)
    assert after.report.kept == len(rows) > 50
    assert records(after) == records(before)


@pytest.mark.parametrize("name", ["texts", "conversations", "tool calls", "ranked"])
def test_rows_of_parquet_keep_columns_and_records(name, tmp_path):
    rows = [ROWS[name][0], ROWS[name][0] | {"prompt": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    before, after = fixed_and_read_again([choice(tmp_path / "rows.parquet")], tmp_path)
    assert (before.report.refused, after.report.read, after.report.refused) == (1, 1, 0)
    assert records(after) == records(before)
    assert list(json.loads((tmp_path / "clean.jsonl").read_text())) == list(rows[0])


def test_values_that_json_lacks_are_written_too(tmp_path):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "day": date(2024, 2, 29), "raw": b"\xff\x00",
           "share": float("nan")}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row | {"chosen": ""}]), tmp_path / "rows.parquet")
    _, after = fixed_and_read_again([choice(tmp_path / "rows.parquet")], tmp_path)
    assert after.report.kept == 1
    (refused,) = map(json.loads, (tmp_path / "clean.refused.jsonl").read_text().splitlines())
    for written in (json.loads((tmp_path / "clean.jsonl").read_text()), refused["row"]):
        assert [written[name] for name in ("day", "raw", "share")] == ["2024-02-29", "/wA=", None]


def test_rows_of_csv_with_conversations_as_text_keep_both(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "completion", "label"])
        writer.writerow(["7", json.dumps(TURNS), 'say "2",\nthen stop', "true"])
        writer.writerow(["8", "Why?", "", "true"])
    before, after = fixed_and_read_again([choice(tmp_path / "rows.csv")], tmp_path)
    assert (after.report.kept, after.report.refused) == (1, 0)
    assert records(after) == records(before)
    assert json.loads((tmp_path / "clean.jsonl").read_text())["id"] == "7"


RENAMED = {
    "a question": ({"q": "Why?", "chosen": "So.", "rejected": "No."}, {"prompt": "q"}),
    "the two sides exchanged": (
        {"prompt": "Why?", "chosen": "No.", "rejected": "So."},
        {"chosen": "rejected", "rejected": "chosen"},
    ),
    "a column of our name with another meaning": (
        {"prompt": "an id", "question": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": "question"},
    ),
}


@pytest.mark.parametrize(("row", "columns"), RENAMED.values(), ids=RENAMED)
def test_renamed_columns_keep_their_own_names_and_read_alike(row, columns, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {}])
    before, after = fixed_and_read_again([choice(path, columns=columns)], tmp_path)
    assert json.loads((tmp_path / "clean.jsonl").read_text()) == row
    assert (after.report.kept, after.report.refused) == (1, 0)
    assert records(after) == records(before)
    ((pair,),) = records(after)
    assert [pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content] == ["Why?", "So.", "No."]


def test_each_of_several_sources_has_a_file_of_its_own(tmp_path):
    sources = [
        choice(write_jsonl(tmp_path / "a.jsonl", [*preference_rows(2), {}])),
        choice(
            write_jsonl(tmp_path / "b.jsonl", [{}, {"q": "Why?", "chosen": "So.", "rejected": "No."}]),
            columns={"prompt": "q"},
            weight=2.0,
        ),
        choice(write_jsonl(tmp_path / "held.jsonl", [*preference_rows(1, start=9), {}]), "heldout"),
    ]
    before, after = fixed_and_read_again(sources, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("clean*")) == [
        "clean.1.jsonl", "clean.2.jsonl", "clean.heldout.jsonl", "clean.refused.jsonl",
    ]  # fmt: skip
    assert (after.report.kept, after.report.refused) == (4, 0)
    assert records(after) == records(before)
    refused = list(map(json.loads, (tmp_path / "clean.refused.jsonl").read_text().splitlines()))
    assert [(one["path"], one["line"]) for one in refused] == [
        (str(tmp_path / name), line) for name, line in (("a.jsonl", 3), ("b.jsonl", 1), ("held.jsonl", 2))
    ]


def test_a_held_out_share_becomes_held_out_data(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*preference_rows(40), {}])
    before = check(choice(path), share=HeldOutShare(0.25, seed=1))
    fixed, _ = write_clean(before, tmp_path / "clean.jsonl")
    assert [file.split for file in fixed] == ["train", "heldout"]
    after = check(*(choice(file.path, file.split) for file in fixed))
    assert (after.report.kept, after.report.refused) == (40, 0)
    assert records(after) == records(before)
    assert all(records(after))


def test_no_file_is_written_where_one_of_them_exists(tmp_path):
    sources = [choice(write_jsonl(tmp_path / name, preference_rows(1))) for name in ("a.jsonl", "b.jsonl")]
    (tmp_path / "clean.2.jsonl").write_text("mine")
    with pytest.raises(RecipeError, match=r"clean\.2\.jsonl: exists already"):
        write_clean(check(*sources), tmp_path / "clean.jsonl")
    assert [path.name for path in tmp_path.glob("clean*")] == ["clean.2.jsonl"]


def test_a_missing_folder_is_said_before_the_rows_are_read(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        refuse_early(tmp_path / "none/clean.jsonl")

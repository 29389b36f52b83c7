"""Readers with options: refused like other plugins', known to a run that is reopened, and several files a location."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w
from installed import put_distribution

from qpref.data.check import check_data
from qpref.errors import RecipeError
from qpref.hooks.manager import PluginHost
from qpref.recipe.reopen import RecordedRun, reopen_plan
from qpref.recipe.resolve import make_plan
from qpref.recipe.schema import recipe_schema

READERS = """
import json
from pathlib import Path

from qpref.hooks import Field, Options, Reader, hookimpl
from qpref.records import Row, Source


class BookOptions(Options):
    sheets: tuple[str, ...] = Field(default=("first",), strict=False, description="Sheets to read.")
    marks: str | None = Field(default=None, description="File of marks.")


def read_book(path, context):
    book = json.loads(path.read_text())
    marks = context.options.marks and json.loads((context.folder / context.options.marks).read_text())
    for sheet in context.options.sheets:
        for number, values in enumerate(book[sheet], 1):
            row = values | ({"margin": marks[sheet]} if marks else {})
            yield Row(values=row, source=Source(path=f"{path}#{sheet}", line=number))


def read_plain(path):
    yield Row(values=json.loads(path.read_text()), source=Source(path=str(path), line=1))


def read_query(name, context):
    yield from read_book(context.folder / f"{name}.book", context)


@hookimpl
def qpref_readers():
    yield Reader(name="book", summary="sheets of rows", read=read_book, options=BookOptions)
    yield Reader(name="plain", summary="one row", read=read_plain)
    yield Reader(name="query", summary="a named book", read=read_query, takes="name", options=BookOptions)
"""


def row(number):
    return {"prompt": f"What is {number}?", "chosen": f"It is a number: {number}.", "rejected": f"NO IDEA {number}!"}


BOOK = {"first": [row(1), row(2)], "second": [row(3)]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`recipe({"train": ...})` writes `recipe.toml` with this `[data]` beside `pairs.book` and `marks.json`."""
    points = dict.fromkeys(("read-book", "read-plain", "read-query"), "acme_readers")
    put_distribution(tmp_path / "site", monkeypatch, points, {"acme_readers": READERS})
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "pairs.book").write_text(json.dumps(BOOK))
    (folder / "one.plain").write_text(json.dumps(row(9)))
    (folder / "marks.json").write_text(json.dumps({"first": 0.5, "second": 1.5}))

    def write(data):
        path = folder / "recipe.toml"
        path.write_text(tomli_w.dumps({"model": {"base": "org/base"}, "data": data, "loss": {"name": "dpo"}}))
        return path

    return write


def rows_of(plan):
    return [
        (Path(example.source.path).name, example.source.line, example.prompt[0].content, example.margin)
        for example in check_data(plan.sources, (), pairs_only=True).train.rows()
    ]


def test_a_reader_gets_the_options_of_its_table(recipe):
    plan = make_plan(recipe({"train": "pairs.book", "reader": {"sheets": ["second"]}}))
    assert rows_of(plan) == [("pairs.book#second", 1, "What is 3?", 0.0)]


def test_without_a_table_a_reader_gets_the_defaults_of_its_options(recipe):
    assert [line for _, line, *_ in rows_of(make_plan(recipe({"train": "pairs.book"})))] == [1, 2]


def test_rows_of_one_location_may_come_from_several_files(recipe):
    plan = make_plan(recipe({"train": "pairs.book", "reader": {"name": "book", "sheets": ["first", "second"]}}))
    assert [row[:2] for row in rows_of(plan)] == [
        ("pairs.book#first", 1),
        ("pairs.book#first", 2),
        ("pairs.book#second", 1),
    ]


def test_each_source_has_options_of_its_own(recipe):
    data = {
        "train": [
            {"path": "pairs.book", "reader": {"sheets": ["second"], "marks": "marks.json"}, "weight": 2.0},
            {"path": "one.plain"},
        ]
    }
    plan = make_plan(recipe(data))
    assert rows_of(plan) == [("pairs.book#second", 1, "What is 3?", 1.5), ("one.plain", 1, "What is 9?", 0.0)]
    checked = check_data(plan.sources, (), pairs_only=True).train
    assert {Path(path).name: weight for path, weight in checked.weights.items()} == {"pairs.book#second": 2.0}


def test_a_reader_of_names_gets_the_folder_of_the_recipe(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert rows_of(make_plan(recipe({"train": "query:pairs"})))[0][:2] == ("pairs.book#first", 1)


def test_relative_paths_of_readers_start_at_the_folder_that_the_recipe_names(recipe, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pairs.book").write_text(json.dumps({"first": [row(7)]}))
    plan = make_plan(recipe({"train": "query:pairs", "folder": "../elsewhere"}))
    assert [prompt for *_, prompt, _ in rows_of(plan)] == ["What is 7?"]


def test_the_rows_of_a_reopened_run_are_read_with_its_options_and_from_its_folder(recipe, tmp_path):
    table = {"name": "query", "sheets": ["second"], "marks": "marks.json"}
    plan = make_plan(recipe({"train": "query:pairs", "reader": table}))
    lock = tomllib.loads(tomli_w.dumps(plan.document))
    run = RecordedRun(path=tmp_path / "run", document=lock, facts={}, report={"refused": 0})
    assert rows_of(reopen_plan(run)) == rows_of(plan) == [("pairs.book#second", 1, "What is 3?", 1.5)]


def test_the_lock_of_a_recipe_whose_readers_have_no_options_names_no_folder(recipe):
    assert "folder" not in make_plan(recipe({"train": "one.plain"})).document["data"]


PROBLEMS = {
    "an unknown option": (
        {"train": "pairs.book", "reader": {"sheet": ["first"]}},
        "[data.reader] sheet: unknown option of reader 'book' (acme 2.0 [read-book]); did you mean 'sheets'?",
    ),
    "a value of another type": (
        {"train": "pairs.book", "reader": {"marks": 3}},
        "[data.reader] marks: expected a string, got 3",
    ),
    "options of a reader without any": (
        {"train": "one.plain", "reader": {"sheets": ["first"]}},
        "[data.reader] sheets: reader 'plain' (acme 2.0 [read-plain]) has no options",
    ),
    "an option of one source": (
        {"train": [{"path": "one.plain", "reader": {"name": "book", "page": 1}}]},
        "[data.train.0.reader] page: unknown option of reader 'book' (acme 2.0 [read-book])",
    ),
    "a name that is no text": (
        {"train": "one.plain", "reader": {"name": 3}},
        "[data] reader: name: expected text, got 3",
    ),
    "a name that no reader has": (
        {"train": "one.plain", "reader": {"name": "bok"}},
        "[data] reader: no reader 'bok' is installed; did you mean 'book'?",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_mistake_in_a_readers_table_is_named_by_its_key(recipe, case):
    data, problem = PROBLEMS[case]
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe(data))
    assert problem in caught.value.what


def test_one_option_may_be_overridden(recipe):
    plan = make_plan(recipe({"train": "pairs.book"}), ['data.reader.sheets=["second"]'])
    assert [prompt for *_, prompt, _ in rows_of(plan)] == ["What is 3?"]


def test_editors_know_the_options_of_readers(recipe):
    schema = recipe_schema(PluginHost(), "acme")
    for section in ("DataSection", "SourceSection"):
        arms = schema["$defs"][section]["properties"]["reader"]["anyOf"]
        assert [arm.get("title") for arm in arms if "title" in arm] == ["book", "query"]
        assert set(arms[-1]["properties"]) == {"name", "sheets", "marks"}

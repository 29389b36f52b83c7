"""[data.contest] in a recipe: what is resolved from it, and its mistakes by table and key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from qpref.errors import RecipeError
from qpref.recipe.resolve import make_plan

CONTEST = {"first": "a", "second": "b", "winner": "label", "first_wins": [1], "second_wins": [2]}


def recipe(**data):
    return {"model": {"base": "org/model"}, "loss": {"name": "dpo"}, "data": {"train": "a.jsonl"} | data}


def problem(**data):
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe(**data))
    (line,) = caught.value.what.splitlines()[1:]
    return line.strip()


def test_a_contest_is_that_of_the_source_else_of_the_data_unless_the_source_has_a_format():
    train = [
        {"path": "a.jsonl"},
        {"path": "b.jsonl", "contest": CONTEST | {"first": "x"}},
        {"path": "c.jsonl", "format": "arena"},
    ]
    sources = make_plan(recipe(train=train, contest=CONTEST, heldout="d.jsonl")).sources
    firsts = {source.location[-7:]: source.contest and source.contest.first for source in sources}
    assert firsts == {"a.jsonl": "a", "b.jsonl": "x", "c.jsonl": None, "d.jsonl": "a"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"first_wins": [{"min": -3, "max": -1}, "first"], "second_wins": [{"above": 0}, False], "tie": [0]},
        {"winner": {"first": "x", "second": "y", "tie": "z"}, "first_wins": [], "second_wins": []},
        {"winner": None, "scores": {"first": "x", "second": "y", "better": "lower"}, "first_wins": [],
         "second_wins": []},
    ],
    ids=["values", "ranges", "flags", "scores"],
)  # fmt: skip
def test_a_contest_survives_the_lock_file(tmp_path, keys):
    contest = {key: value for key, value in (CONTEST | keys).items() if value is not None}
    plan = make_plan(recipe(contest=contest))
    lock = tmp_path / "recipe.lock.toml"
    lock.write_text(tomli_w.dumps(plan.document))
    again = make_plan(lock)
    assert again.document == plan.document
    assert again.sources[0].contest == plan.sources[0].contest


def test_the_contest_of_the_documentation_is_one():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    (block,) = [block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[data.contest]" in block]
    (source,) = make_plan(recipe() | tomllib.loads(block)).sources
    assert (source.contest.first_wins, source.contest.second_wins, source.contest.tie) == ([1], [2], [0])


def test_a_contest_is_free_to_change_as_other_mappings_are():
    assert make_plan(recipe(contest=CONTEST)).fingerprint == make_plan(recipe()).fingerprint


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"frist": "a"}, "[data.contest] frist: unknown key; did you mean 'first'?"),
        ({"first": ""}, "[data.contest] first: must not be empty"),
        ({"winner": 3}, "[data.contest] winner: expected a string, got 3"),
        ({"winner": {"first": "x"}}, "[data.contest.winner] second: missing"),
        ({"winner": {"first": "x", "second": "y", "tye": "z"}}, "[data.contest.winner] tye: unknown key; did you mean"),
        ({"first_wins": 1}, "[data.contest] first_wins: expected a list, got 1"),
        ({"first_wins": [[1]]}, "[data.contest.first_wins] 0: expected a text, a number, true, false or a range"),
        ({"first_wins": [float("nan")]}, "[data.contest.first_wins] 0: expected a text, a number, true, false or"),
        ({"first_wins": [{"mn": 1}]}, "[data.contest.first_wins.0] mn: unknown key; did you mean 'min'?"),
        ({"first_wins": [{"min": "1"}]}, "[data.contest.first_wins.0] min: expected a number, got '1'"),
        ({"first_wins": [{"min": 1, "above": 1}]}, "[data.contest.first_wins] 0: a range has min or above"),
        ({"second_wins": [1, 2], "tie": ["2"]}, "[data] contest: 1 in first_wins and 1 in second_wins are the same"),
        ({"scores": {"first": "x", "second": "y"}}, "[data.contest.scores] better: missing"),
    ],
    ids=str,
)
def test_a_mistake_of_a_contest_is_named_by_its_key(keys, line):
    assert problem(contest=CONTEST | keys).startswith(line)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"contest": CONTEST, "format": "shp"}, "[data] contest says how rows are read, and so does format = 'shp'"),
        (
            {"train": [{"path": "a.jsonl", "format": "shp", "contest": CONTEST}]},
            "[data] a.jsonl: contest says how rows are read, and so does format: choose one",
        ),
        ({"contest": CONTEST, "columns": {"chosen": "x"}}, "[data] columns: chosen comes from the contest; remove it"),
        (
            {"contest": CONTEST, "columns": {"label": "v"}},
            "[data] contest: its columns have the file's own names; write",
        ),
    ],
    ids=["format", "format of a source", "chosen", "renamed"],
)
def test_what_is_said_twice_is_a_mistake(data, line):
    assert problem(**data).startswith(line)

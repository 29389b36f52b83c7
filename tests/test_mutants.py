"""The catalogue of mutants can't rot: every edit applies, every test that it names is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from mutants.catalogue import MUTANTS, NUM_BUGS
from mutants.mutant import Edit, Mutant, mutant
from mutants.run import Outcome

ROOT = Path(__file__).parents[1]
NAMED = pytest.mark.parametrize("each", MUTANTS, ids=lambda each: f"{each.bug} {each.mistake}")


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@NAMED
def test_an_edit_applies_and_leaves_a_program(each):
    assert list(each.problems()) == []
    for edit in each.edits:
        assert edit.old != edit.new
        ast.parse((ROOT / edit.file).read_text().replace(edit.old, edit.new))


@NAMED
def test_the_tests_that_catch_it_exist(each):
    assert each.tests
    for test in each.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file()
        assert not name or name.partition("[")[0] in functions_of(file)


def test_every_mistake_of_the_catalogue_has_a_mutant():
    assert {each.bug for each in MUTANTS if each.bug.startswith("C")} == {
        f"C{number}" for number in range(1, NUM_BUGS + 1)
    }


def test_an_edit_that_no_longer_applies_is_named(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    found = mutant("C1", "", "code.py", "= 1", "= 2"), mutant("C1", "", "other.py", "a", "b")
    assert [list(each.problems(tmp_path)) for each in found] == [
        ["C1: code.py has '= 1' 2 times"],
        ["C1: other.py is no file"],
    ]


def test_an_edit_changes_its_file_alone(tmp_path):
    for name in ("code.py", "other.py"):
        (tmp_path / name).write_text("a = 1\n")
    Edit("code.py", "a = 1", "a = 2").apply(tmp_path)
    assert [(tmp_path / name).read_text() for name in ("code.py", "other.py")] == ["a = 2\n", "a = 1\n"]


@pytest.mark.parametrize(("code", "is_killed"), [(101, True), (100, False), (102, False), (1, False), (None, False)])
def test_only_a_test_that_has_failed_kills(code, is_killed):
    assert Outcome(code, 0.0, "").is_killed is is_killed


def test_a_survivor_and_a_test_that_fails_anyway_fail_the_command(capsys):
    from mutants.__main__ import report

    mutants = [Mutant("C1", "a mistake", (), ("test",))] * 2
    passed, failed = Outcome(100, 0.0, "fine"), Outcome(101, 0.0, "bad")
    assert report(mutants, [failed, failed, passed]) == 0
    assert report(mutants, [failed, passed, passed]) == 1
    assert "1 of 2 mutants killed (50%)" in capsys.readouterr().out
    assert report(mutants, [failed, failed, failed]) == 1

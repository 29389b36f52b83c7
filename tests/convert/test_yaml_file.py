"""A YAML file of somebody else is read as plain values, or refused in one sentence before it costs anything."""

from __future__ import annotations

import os

import pytest

from qpref.convert.yaml_file import read_settings
from qpref.errors import RecipeError

LEVELS = 30
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, LEVELS))
MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, LEVELS))


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        read_settings(path)
    assert "\n" not in caught.value.what
    return caught.value.what.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, ": more than 20,000 values, aliases written out"),
        (MERGES, ": more than 20,000 values, aliases written out"),
        ("a: &a [*a]\n", ": line 1: an alias inside of its own value"),
        ("a: " + "[" * 5_000, ": nested more than 32 deep"),
        ("a: " + "[" * 40 + "]" * 40, ": nested more than 32 deep"),
        ("lr: !!python/object/apply:os.system [id]\n", ":1: not plain YAML: could not determine a constructor"),
        ("lr: !env HOME\n", ":1: not plain YAML: could not determine a constructor for the tag '!env'"),
        ("lr: 1\nbeta: 2\nlr: 3\n", ": line 3: lr is there twice"),
        ("lr: {a: 1, a: 2}\n", ": line 1: a is there twice"),
        ("- lr\n- beta\n", ": expected `key: value` lines"),
        ("just words\n", ": expected `key: value` lines"),
        ("# nothing\n", ": empty: expected `key: value` lines"),
        ("1: 2\n", ": 1: expected a text as key"),
        ("a: [1\nb: 2\n", ":2: not plain YAML: "),
        ("a: 1\n---\nb: 2\n", ":2: not plain YAML: "),
        ("a: \x00", ": unacceptable character #x0000"),
        ("x" * 300_000, ": cannot be read: it is larger than 256 KiB"),
    ],
)
def test_what_is_no_plain_configuration_is_refused(tmp_path, text, problem):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert refusal(path).startswith(problem)


def test_a_fifo_is_not_waited_for(tmp_path):
    path = tmp_path / "c.yaml"
    os.mkfifo(path)
    assert refusal(path) == ": cannot be read: it is a FIFO, not a regular file"


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path):
    assert refusal(tmp_path / "none.yaml") == ": no such file"
    path = tmp_path / "c.yaml"
    path.write_bytes(b"a: \xff\xfe\xfa")
    assert refusal(path) == ": not UTF-8"


def test_aliases_and_merges_of_an_honest_file_are_read_and_empty_values_left_out(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\nempty:\nnone: ''\n")
    assert read_settings(path) == {"base": {"a": 1, "b": 2}, "more": {"a": 1, "b": 3}}

"""What is read of run folders that are whole, running, old or damaged."""

from __future__ import annotations

import math

import pytest
from run_folders import make_run, train_rows

from qpref.errors import DataError, RecipeError
from qpref.report.read import read_metrics, read_object, read_run, read_runs


def lines(path, *texts: bytes):
    file = path / "metrics.jsonl"
    file.write_bytes(b"".join(texts))
    return read_metrics(file)


def test_rows_fall_into_columns_by_split_and_heldout_names_lose_their_prefix(tmp_path):
    metrics = lines(
        tmp_path,
        b'{"step": 0, "split": "eval", "eval_loss": 0.7, "tokens": 0, "seconds": 0.0}\n',
        b'{"step": 2, "split": "train", "loss": 0.5, "tokens": 9, "seconds": 1.5}\n',
        b'{"step": 4, "split": "train", "loss": 0.25, "tokens": 18, "seconds": 2.5}\n',
    )
    assert list(metrics.column("train", "loss").steps) == [2, 4]
    assert list(metrics.column("train", "loss").values) == [0.5, 0.25]
    assert list(metrics.column("eval", "loss").values) == [0.7]
    assert (metrics.last_step, metrics.names) == (4, ["loss", "tokens", "seconds"])


def test_a_torn_last_line_is_said_and_left_out(tmp_path):
    metrics = lines(tmp_path, b'{"step": 1, "split": "train", "loss": 0.5}\n', b'{"step": 2, "split": "train", "lo')
    assert metrics.is_torn
    assert metrics.bad_lines == []
    assert list(metrics.column("train", "loss").steps) == [1]


@pytest.mark.parametrize(
    "bad",
    [
        b"not json",
        b"[1, 2]",
        b"null",
        b'{"step": "one", "split": "train", "loss": 1}',
        b'{"step": 1, "split": "test", "loss": 1}',
        b'{"step": 1, "split": ["train"], "loss": 1}',
        b'{"split": "train", "loss": 1}',
        b'{"step": -1, "split": "train", "loss": 1}',
        b'{"step": true, "split": "train", "loss": 1}',
        b'{"step": 1, "split": "train", "loss": "\xff"}',
        b'{"step": 1, "split": "train", "loss": ' + b"[" * 100_000 + b"}",
        b'{"step": 1, "split": "train", "loss": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda bad: repr(bad[:40]),
)
def test_a_line_that_is_no_row_is_counted_and_the_others_are_read(tmp_path, bad):
    good = b'{"step": 1, "split": "train", "loss": 0.5}\n'
    metrics = lines(tmp_path, good, bad + b"\n", good)
    assert metrics.bad_lines == [2]
    assert len(metrics.column("train", "loss")) == 2


@pytest.mark.parametrize("value", [b"null", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e250", b"1" + b"0" * 400])
def test_a_value_that_no_chart_can_show_is_a_gap(tmp_path, value):
    metrics = lines(tmp_path, b'{"step": 1, "split": "train", "loss": ' + value + b"}\n")
    assert math.isnan(metrics.last("train", "loss"))


@pytest.mark.parametrize("value", [b'"0.5"', b"true", b"[0.5]", b'{"a": 1}'])
def test_what_is_no_number_makes_no_column(tmp_path, value):
    metrics = lines(tmp_path, b'{"step": 1, "split": "train", "loss": ' + value + b', "kl": 1}\n')
    assert metrics.names == ["kl"]


def test_runs_with_one_folder_name_are_told_apart_by_their_paths(tmp_path):
    runs = [make_run(tmp_path / parent / "run", train_rows([1.0])) for parent in "ab"]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]
    assert [run.name for run in read_runs(runs[:1])] == ["run"]


def test_a_run_named_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="is named twice"):
        read_runs([run, tmp_path / "." / "run"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no run of qpref \(it has no run.json\)"):
        read_run(tmp_path, "run")


def test_a_run_without_rows_recipe_or_result_is_read(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    run = read_run(tmp_path, "run")
    assert (run.metrics.names, run.recipe, run.result, run.data, run.is_finished) == ([], {}, None, None, False)


@pytest.mark.parametrize(("text", "words"), [("[1]", "expected a JSON object, found an array"), ("{", "not JSON")])
def test_a_file_that_is_no_object_is_named_with_what_it_is(tmp_path, text, words):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_object(tmp_path / "run.json")

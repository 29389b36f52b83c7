"""A smoke run of the benchmark on long answers: every part sees every row, and the table has a line for each."""

from __future__ import annotations

import json

from benchmarks.long_answers import CHECKS, measure, table, write_rows


def test_the_rows_are_the_same_each_time_and_as_long_as_described(tmp_path):
    for name in ("one", "other"):
        write_rows(tmp_path / name, 150)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    means = {side: sum(len(row[side]) for row in rows) / len(rows) for side in rows[0]}
    assert 650 < means["prompt"] < 950
    assert all(3700 < means[side] < 5000 for side in ("chosen", "rejected"))


def test_each_part_reads_every_row(capsys):
    result = measure(30) | {"date": "2026-01-01", "command": "x", "machine": "y"}
    assert [part["rows"] for part in result["parts"]] == [30] * (len(CHECKS) + 6)
    assert all(part["cpu_seconds"] > 0 for part in result["parts"])
    assert capsys.readouterr().out.count("rows/s") == len(result["parts"])
    assert table(result).count("\n| ") == len(result["parts"]) + 1

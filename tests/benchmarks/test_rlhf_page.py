"""docs/rlhf.md has the tables that were measured."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_the_newest_results():
    newest = max((ROOT / "benchmarks/results").glob("*-rlhf.md"))
    page = (ROOT / "docs/rlhf.md").read_text()
    rows = [line for line in newest.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in page] == []
    assert newest.name in page

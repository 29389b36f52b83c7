"""Write docs/reliability.md's table of mistakes and the tests that catch them, from tests/mutants.

Run `python docs/make_reliability.py`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.catalogue import MUTANTS  # noqa: E402 - the tests are no package

PAGE = ROOT / "docs/reliability.md"
TABLE = re.compile(r"^\| no\. \|.*\n(?:\|.*\n)+", re.MULTILINE)


def table() -> str:
    """Return a row for each mutant."""
    lines = ["| no. | mistake | code | caught by |", "|---|---|---|---|"]
    for each in MUTANTS:
        files = ", ".join(dict.fromkeys(f"`{edit.file}`" for edit in each.edits))
        tests = ", ".join(f"`{test.removeprefix('tests/').replace('::test_', ': ')}`" for test in each.tests)
        lines.append(f"| {each.bug} | {each.mistake} | {files} | {tests} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the page with the table of the mutants."""
    text, count = TABLE.subn(lambda _: table(), PAGE.read_text(encoding="utf-8"))
    assert count == 1, "the page has one table of mistakes"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

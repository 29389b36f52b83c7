"""Write docs/data.md's table of finding codes from the one in qpref/data/finding_codes.py.

Run `python docs/make_finding_codes.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from qpref.data.finding_codes import markdown_table

PAGE = Path(__file__).parent / "data.md"
TABLE = re.compile(r"^\| code \|.*\n(?:\|.*\n)+", re.MULTILINE)


def page() -> str:
    """Return the page with the table of the code."""
    text, count = TABLE.subn(lambda _: markdown_table() + "\n", PAGE.read_text(encoding="utf-8"))
    assert count == 1, "the page has one table of codes"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

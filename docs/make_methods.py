"""Rewrite the tables of docs/methods.md: what each method needs, and what the newest published experiment measured.

Run `python docs/make_methods.py` after `python -m benchmarks.frontier --publish`.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/methods.md"
PASSES = {
    frozenset(): "chosen, rejected",
    frozenset({"prompt"}): "prompt, chosen, rejected",
    frozenset({"reference"}): "chosen, rejected, under both",
    frozenset({"reference", "mismatched"}): "response, mismatched response, under both",
}


def needs_table() -> str:
    """Tabulate each method's data, reference, forward passes and lines of code, with its default options."""
    from benchmarks.frontier.points import METHODS
    from qpref.hooks.manager import LOSS, PluginHost

    host = PluginHost()
    lines = ["| method | data | reference | scored in each step | lines |", "|---|---|---|---|---|"]
    for method in METHODS:
        record = host.load(LOSS, method).record
        options = record.options()
        needs = record.needs_of(options)
        data = "pairs" if type(record).__name__ == "PairedLoss" else "single, labeled"
        reference = "yes" if "reference" in needs else "no"
        cells = [f"[{method}](losses/{method}.md)", data, reference, PASSES[needs], num_lines(record.build(options))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def num_lines(function: Callable[..., object]) -> int:
    """Count the lines of a function's body as Python's own formatter writes them, without comments and docstring."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) else definition.body
    return sum(len(ast.unparse(statement).splitlines()) for statement in body)


def measured_table() -> str:
    """Tabulate the newest published experiment, with its command."""
    from benchmarks.frontier.table import from_json, table

    found = sorted((ROOT / "benchmarks/results").glob("*-frontier*.json"))
    if not found:
        return "No result is published yet: `python -m benchmarks.frontier --publish`.\n"
    published = found[-1]
    content: dict[str, Any] = json.loads(published.read_text())
    name = published.with_suffix(".md").name
    source = f"`{content['command']}`, [{name}](../benchmarks/results/{name}):"
    return "\n".join([source, "", *table([from_json(row) for row in content["rows"]])]) + "\n"


def page() -> str:
    """Render the page with the current tables."""
    text = PAGE.read_text()
    for name, table in (("needs", needs_table), ("measured", measured_table)):
        begin, end = f"<!-- {name}: python docs/make_methods.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())

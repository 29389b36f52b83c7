"""Write a proposal as TOML: the plan in the header, the reason above each value."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from qpref.convert.write import toml_value
from qpref.first_recipe.propose import Proposal

WIDTH = 100


def recipe_text(proposal: Proposal, title: str, name: str, schema: str | None = None) -> str:
    """Return the recipe.

    Args:
        title: the first sentence of the header.
        name: of its file, for the commands in the header.
        schema: path of its JSON Schema, relative to it.
    """
    return "\n".join([*_header(proposal, title, name, schema), *_tables(proposal)]) + "\n"


def _header(proposal: Proposal, title: str, name: str, schema: str | None) -> Iterator[str]:
    if schema:
        yield f"#:schema {schema}"
    yield from _comment(title)
    yield "#"
    for command in ("check", "plan", "train"):
        yield f"#     qpref {command} {name}"
    yield "#"
    for sentence in proposal.plan:
        yield from _comment(sentence)


def _tables(proposal: Proposal) -> Iterator[str]:
    for table, values in proposal.tables.items():
        yield ""
        yield f"[{table}]"
        for key, value in values.items():
            if reason := proposal.reasons.get((table, key)):
                yield from _comment(reason)
            yield f"{key} = {toml_value(value)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip

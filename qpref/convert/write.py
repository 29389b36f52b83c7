"""Write a draft as a commented recipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from qpref.convert.draft import Draft
from qpref.recipe.sections import Recipe

ORDER = ("model", "adapter", "data", "train", "reference")
WIDTH = 100


def recipe_text(draft: Draft, head: str) -> str:
    """Return the recipe as TOML: each value with its origin, what differs and what has no equal above."""
    return "\n".join([*_remarks(draft, head), *_tables(draft)]) + "\n"


def remarks(draft: Draft, origin: str) -> list[str]:
    """Return what a reader has to know, as lines of at most 80 characters."""
    lines: list[str] = []
    for title, sentences in (
        ("not quite the same:", draft.differs),
        ("no equal, left out:", [f"{key}: {why}" for key, why in draft.no_equal.items()]),
        (f"no key of {origin} that is known, left out:", [", ".join(draft.unknown)] if draft.unknown else []),
        (
            "without an effect on the result, or done by qpref itself:",
            [", ".join(draft.by_itself)] if draft.by_itself else [],
        ),
    ):
        if sentences:
            lines.append(title)
            for sentence in sentences:
                lines += textwrap.wrap(sentence, 78, initial_indent="  ", subsequent_indent="    ",
                                       break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return lines


def _remarks(draft: Draft, head: str) -> Iterator[str]:
    yield f"# {head}"
    sentences = [*draft.differs, *(f"{key} has no equal: {why}" for key, why in draft.no_equal.items())]
    if sentences:
        yield "#"
    for sentence in sentences:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="# - ", subsequent_indent="#   ",
                                 break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _tables(draft: Draft) -> Iterator[str]:
    for table in ORDER:
        values = draft.tables.get(table, {})
        if values:
            yield ""
            yield f"[{table}]"
            order = list(Recipe.model_fields[table].annotation.model_fields)  # type: ignore[union-attr]
            yield from _lines(dict(sorted(values.items(), key=lambda item: order.index(item[0]))))
        if table == "data":
            for key, (sources, origin) in draft.sources.items():
                for source in sources:
                    yield ""
                    yield f"[[data.{key}]]"
                    yield from _lines(
                        {name: (value, origin if name == "path" else "") for name, value in source.items()}
                    )
            for loss in draft.losses:
                yield ""
                yield "[loss]" if len(draft.losses) == 1 else "[[loss]]"
                yield from _lines(loss)


def _lines(values: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    for key, (value, origin) in values.items():
        line = f"{key} = {toml_value(value)}"
        yield f"{line}  # {origin}" if origin else line


def toml_value(value: Any) -> str:
    """Format one value as TOML, tables inline, small numbers as people write them: 5e-6."""
    import tomli_w

    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {toml_value(one)}' for key, one in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    text = tomli_w.dumps({"key": value}).removeprefix("key = ").rstrip("\n")
    return re.sub(r"e([+-])0+(\d)", r"e\1\2", text) if isinstance(value, float) else text


def _key(key: str) -> str:
    import tomli_w

    return tomli_w.dumps({key: 1}).partition(" = 1")[0]

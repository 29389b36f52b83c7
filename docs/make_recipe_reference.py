"""Generate docs/recipe.md from the pydantic models that check a recipe, so that the two cannot diverge.

python docs/make_recipe_reference.py
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from qpref.hooks import manager
from qpref.recipe.contest_section import ContestSection, Verdict
from qpref.recipe.data_section import DataSection, SourceSection
from qpref.recipe.sections import Recipe

HEAD = """# The recipe, key by key

Made by `python docs/make_recipe_reference.py`; do not edit.

A recipe is a TOML file. Unknown keys are errors. `--set table.key=value` overrides one value. Relative paths start at
the recipe's folder. Tables of plugins hold `name` and the plugin's own options.

Editors complete and check a recipe by its JSON Schema, `#:schema recipe.schema.json` in its first line (VS Code with
Even Better TOML, Neovim or Helix with taplo). `qpref schema --output recipe.schema.json` writes it, with the options
of the plugins that are installed; [recipes/recipe.schema.json](../recipes/recipe.schema.json) has those of the
built-in ones.
Keys of TRL, Axolotl and LLaMA-Factory: [from other tools](from-other-tools.md).
"""

LOSS = """## [loss]

`name` selects the loss; the other keys are its own options. Several `[[loss]]` tables make a weighted sum (`weight`,
default 1); all of them on pairs, or all on single completions. Any numeric option can follow a schedule over the run:
`beta = { start = 0.1, end = 0.3, schedule = "linear" }` (or `"cosine"`), from the first optimizer step to the last. So
can the `weight` of a loss in a sum, which may be 0 at one end.
"""


def reference() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    for table, field in Recipe.model_fields.items():
        is_optional = get_origin(field.annotation) in (Union, types.UnionType)
        model = get_args(field.annotation)[0] if is_optional else field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel) and table != "loss":
            parts.append(f"## [{table}]\n\n{inspect.getdoc(model)}\n\n{_rows(model)}")
            if model is DataSection:
                title = "[[data.train]], [[data.heldout]]"
                parts.append(f"## {title}\n\n{SourceSection.__doc__}\n\n{_rows(SourceSection)}")
                parts.append(f"## [data.contest]\n\n{inspect.getdoc(ContestSection)}\n\n{_rows(ContestSection)}")
    parts.append(LOSS)
    host = manager.PluginHost()
    titles = {"loss": '## [loss] name = "{}"', "check": "## [checks]: {}", "sink": '## [[sinks]] name = "{}"'}
    titles["reward"] = '## [rounds.reward] name = "{}"'
    titles["read"] = '## [data.reader] name = "{}"'
    for offer in host.offers:
        if offer.kind in titles and offer.distribution == "qpref":
            record = host.load(manager.KINDS[offer.kind], offer.name).record
            if record.options is None:
                continue
            table = _rows(record.options) if record.options.model_fields else "No options.\n"
            parts.append(f"{titles[offer.kind].format(offer.name)}\n\n{record.summary}\n\n{table}")
    return "\n".join(parts)


def _rows(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = "required" if value is PydanticUndefined else f"`{_toml(value)}`"
        default = "" if value is None else default
        lines.append(f"| `{name}` | {_kind(field.annotation)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


def _kind(annotation: Any) -> str:
    origin, arms = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{_toml(arm)}`" for arm in arms)
    if annotation == Verdict:
        return "value"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(arm) for arm in arms if arm is not type(None))
    if origin is list:
        return "tables" if arms[0] is SourceSection else f"list of {_kind(arms[0])}s"
    if origin is dict:
        return "table" if arms[1] is Any else "table of strings"
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__)
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, str(annotation))


if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(reference())

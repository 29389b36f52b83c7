"""One setting under the names that other tools give it, and look-ups by those names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Tool = Literal["trl", "axolotl", "llamafactory"]
TOOLS: dict[Tool, str] = {"trl": "TRL", "axolotl": "Axolotl", "llamafactory": "LLaMA-Factory"}
"""Tools whose files `qpref convert` reads -> their names in texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A setting of other tools.

    Attributes:
        ours: `table.key` of the recipe, or `table` where the whole table stands for it; None where it has no equal.
        why: one clause for messages and docs: how the two differ, or why there is no equal. Empty where the value is
            simply copied.
        trl: its keys in TRL's files, separated by spaces; those of Unsloth's notebooks are TRL's.
        axolotl: its keys in Axolotl's files; `table.key` inside a table.
        llamafactory: its keys in LLaMA-Factory's files.
        others: names in PEFT, Unsloth, ms-swift and papers, which only messages explain.
        is_lost: training differs where this is set and not converted; False for what qpref does or chooses by itself.
    """

    ours: str | None
    why: str = ""
    trl: str = ""
    axolotl: str = ""
    llamafactory: str = ""
    others: str = ""
    is_lost: bool = True

    def keys(self, tool: Tool) -> list[str]:
        names: str = getattr(self, tool)
        return names.split()

    @property
    def names(self) -> Iterator[str]:
        """Yield each name once, those of tables included."""
        words = " ".join((self.trl, self.axolotl, self.llamafactory, self.others)).split()
        yield from dict.fromkeys(words)

    def explanation(self) -> str:
        """Say what it is here, for the message about an unknown key."""
        if self.ours is None:
            return self.why
        table, _, key = self.ours.partition(".")
        return f"here it is [{table}]{' ' if key else ''}{key}{': ' if self.why else ''}{self.why}"

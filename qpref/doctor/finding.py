"""One result of an examination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about this machine.

    Attributes:
        topic: heading that it stands under.
        status: ok; note: qpref trains, but slower or with less; problem: something doesn't work.
        message: the fact, in one sentence.
        fix: what to do; empty where nothing needs to be done.
    """

    topic: str
    status: Status
    message: str
    fix: str = ""

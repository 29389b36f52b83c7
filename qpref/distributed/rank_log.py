"""Log messages of a run of several processes: rank 0's as in a run of one, and of the others warnings alone.

Until training starts all processes do the same, and their warnings are the same; each is shown once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qpref.distributed.world import World

LOGGER = logging.getLogger("qpref")


@dataclass(slots=True)
class RankFilter:
    """Passes rank 0's messages, and the warnings of the others under their rank's name.

    Attributes:
        held: warnings before `release`; None after it.
    """

    rank: int
    held: list[tuple[int, str]] | None = field(default_factory=list)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return self.rank == 0
        if self.held is not None:
            self.held.append((record.levelno, record.getMessage()))
            return self.rank == 0
        if self.rank > 0:
            record.msg, record.args = f"rank {self.rank}: {record.getMessage()}", None
        return True


def release_warnings(world: World) -> None:
    """Show the warnings of this process that rank 0 hasn't shown, and from here on each at once."""
    filters = [each for each in LOGGER.filters if isinstance(each, RankFilter)]
    held = [text for each in filters for _, text in each.held or ()]
    shown = world.share(held, "warnings so far") if world.size > 1 else []
    for each in filters:
        own, each.held = each.held or [], None
        for level, text in own:
            if world.rank > 0 and text not in shown:
                LOGGER.log(level, "%s", text)


@contextmanager
def logged_by_rank(world: World) -> Iterator[None]:
    """Filter qpref's log messages by this process's rank."""
    own = RankFilter(world.rank)
    LOGGER.addFilter(own)
    try:
        yield
    finally:
        LOGGER.removeFilter(own)

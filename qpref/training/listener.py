"""A program's own function that gets each row of metrics, in the thread that trains"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from qpref.hooks.border import described, is_interrupt
from qpref.hooks.process_state import SHARED, ProcessState
from qpref.records import MetricRow

log = logging.getLogger("qpref")


class Listener:
    """Calls the function until it raises, and undoes what it changes for the whole process.

    A sink has a thread of its own; this has not, since plots and widgets want the thread of the program.
    """

    def __init__(self, function: Callable[[MetricRow], object]) -> None:
        self._function: Callable[[MetricRow], object] | None = function

    def write(self, row: MetricRow) -> None:
        """Hand over a copy of a row.

        Raises:
            KeyboardInterrupt: the user's.
        """
        if self._function is None:
            return
        state = ProcessState.now(random_numbers=True)
        before = replace(state, values={name: value for name, value in state.values.items() if name in SHARED})
        try:
            self._function(replace(row, values=dict(row.values)))
        except BaseException as error:
            if is_interrupt(error):
                raise
            self._drop(error)
        finally:
            before.restore()

    def _drop(self, error: BaseException) -> None:
        self._function = None
        log.warning("on_metrics raised %s; it isn't called again, metrics.jsonl has all rows", described(error))

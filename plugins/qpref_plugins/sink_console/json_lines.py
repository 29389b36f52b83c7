"""Rows as JSON objects, one a line, on standard output: the console of `qpref train --log-json`."""

from __future__ import annotations

import json
import math
import sys

from qpref.hooks import SinkContext
from qpref.records import MetricRow


class JsonWriter:
    """Prints the rows of one run; a value that isn't finite is null, as in metrics.jsonl."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context

    def write(self, row: MetricRow) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        event = {"event": "metrics", "step": row.step, "total_steps": self._context.total_steps, "split": row.split}
        state = {"tokens": row.tokens, "seconds": row.seconds, "peak_bytes": self._context.peak_bytes()}
        sys.stdout.write(json.dumps(event | values | state, allow_nan=False) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        """Have nothing to close."""

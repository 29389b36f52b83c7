"""Stream Parquet files: one batch of rows and its pages are in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qpref.errors import DataError
from qpref.hooks.signatures import HEAD_BYTES, signature_of
from qpref.records import Finding, Row
from qpref_plugins.read_arrow.cells import BATCH_ROWS, rows_of_table

BUFFER_BYTES = 2**20


def rows_of_parquet(path: Path) -> Iterator[Row | Finding]:
    """Yield the rows of the file; the line of a row is its number, from 1.

    Raises:
        DataError: the file isn't Parquet, or is damaged.
    """
    number = 1
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                yield from rows_of_table(batch, str(path), number)
                number += batch.num_rows
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, number, error) from None
    except pyarrow.ArrowException as error:
        raise _damaged(path, number, error) from None


def _damaged(path: Path, number: int, error: Exception) -> DataError:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.startswith(b"PAR1") and (signature := signature_of(head)):
        return DataError(f"{path}: not a Parquet file but {signature}")
    return DataError(f"{path}:{number}: not a Parquet file, or damaged: {str(error).splitlines()[0]}{_as_text(head)}")


def _as_text(head: bytes) -> str:
    """Name the reader of a text file that is called Parquet; empty for anything else."""
    reader = {b"{": "jsonl", b"[": "json"}.get(head.lstrip()[:1])
    return f'; it starts as JSON: set [data] reader = "{reader}"' if reader else ""

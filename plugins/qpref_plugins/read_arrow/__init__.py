"""Readers of Parquet files, Hugging Face's `Dataset.save_to_disk` folders and hub datasets, all as Arrow tables.

pyarrow and datasets are imported when the first row is read; `qpref plugins` and `qpref check` of other files import
neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpref.hooks import Reader, hookimpl
from qpref.records import Finding, Row


def read_parquet(path: Path) -> Iterator[Row | Finding]:
    from qpref_plugins.read_arrow.parquet import rows_of_parquet

    yield from rows_of_parquet(path)


def read_saved(path: Path) -> Iterator[Row | Finding]:
    from qpref_plugins.read_arrow.datasets import rows_of_folder

    yield from rows_of_folder(path)


def read_hub(name: Path) -> Iterator[Row | Finding]:
    from qpref_plugins.read_arrow.datasets import rows_of_hub

    yield from rows_of_hub(str(name))


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    yield Reader(name="parquet", summary="Parquet files", read=read_parquet)
    yield Reader(
        name="datasets", summary="folders of Hugging Face's Dataset.save_to_disk", read=read_saved, takes="folder"
    )
    yield Reader(name="hf", summary="datasets of the Hugging Face hub", read=read_hub, takes="name")

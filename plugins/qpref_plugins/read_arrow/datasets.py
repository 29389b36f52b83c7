"""Rows of Hugging Face datasets: saved in a folder, or streamed from the hub at one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets

from qpref.errors import DataError
from qpref.records import Finding, Row
from qpref_plugins.read_arrow.cells import BATCH_ROWS, rows_of_table

_NAME = re.compile(
    r"(?P<dataset>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?"
)


def rows_of_folder(folder: Path) -> Iterator[Row | Finding]:
    """Yield the rows of a `Dataset.save_to_disk` folder; the line of a row is its number, from 1.

    Raises:
        DataError: the folder holds no dataset, or several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        named = f"name one: {folder / splits[0]}" if splits else "and they are missing"
        raise DataError(f"{folder}: holds the splits {', '.join(splits) or 'of a DatasetDict'}; {named}")
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder}: not a folder of Dataset.save_to_disk: it has no state.json")
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 - whatever a damaged folder makes the library raise
        raise DataError(f"{folder}: cannot be read as a saved dataset: {_first_line(error)}") from None
    yield from _rows(saved, str(folder))


def rows_of_hub(name: str) -> Iterator[Row | Finding]:
    """Yield the rows of a hub dataset, `org/name/config@revision:split`; the line of a row is its number, from 1.

    Raises:
        DataError: the hub has no such dataset, or it cannot be read.
    """
    wanted = HubName.of(name)
    try:
        streamed = _streamed(wanted)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client has dozens of errors
        raise DataError(
            f"hf:{name}: cannot be read: {_first_line(error)}", "check the name and the connection to the hub"
        ) from None
    yield from _rows(streamed, f"hf:{name}")


@dataclass(frozen=True, slots=True)
class HubName:
    """Parts of `org/name/config@revision:split`; config, revision and split are optional."""

    dataset: str
    config: str | None
    revision: str | None
    split: str | None

    @classmethod
    def of(cls, name: str) -> HubName:
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise DataError(f"hf:{name}: expected hf:org/name, optionally with /config, @revision and :split")
        return cls(**parts.groupdict())


def _streamed(wanted: HubName) -> Any:
    if Path(wanted.dataset).exists():  # load_dataset would load this folder instead
        raise DataError(f"hf:{wanted.dataset}: the current folder has a folder of that name; run qpref in another one")
    commit = _commit(wanted.dataset, wanted.revision)
    splits = datasets.load_dataset(wanted.dataset, wanted.config, revision=commit, streaming=True)
    return _split(splits, wanted)


def _split(splits: Any, wanted: HubName) -> Any:
    """Select the named split, else `train`, else the only one."""
    split = wanted.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise DataError(f"hf:{wanted.dataset}: no split '{split}'; it has {', '.join(splits)}")
    return splits[split]


@cache
def _commit(dataset: str, revision: str | None) -> str | None:
    """Look up the commit of a revision, once per process, so that every pass of a run reads the same rows."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(dataset, revision=revision).sha


def _rows(dataset: Any, path: str) -> Iterator[Row | Finding]:
    number = 1
    tables = iter(dataset.with_format("arrow").iter(batch_size=BATCH_ROWS))
    while True:
        try:
            table = next(tables, None)
        except Exception as error:  # noqa: BLE001 - files and connections break in the library's own ways
            raise DataError(f"{path}:{number}: reading stopped: {_first_line(error)}") from None
        if table is None:
            return
        yield from rows_of_table(table, path, number)
        number += table.num_rows


def _first_line(error: Exception) -> str:
    """Return type and first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""Hugging Face datasets: saved to a folder, or from the hub at one commit.

Hub datasets are downloaded rather than streamed: a run reads its rows several times, and a later run may be offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets

from qpref.errors import DataError, UnreachableDataError
from qpref.hooks.hub import hub_failure
from qpref.hooks.signatures import signature_of_file
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
    except Exception as error:  # noqa: BLE001 - a damaged folder makes the library raise anything
        raise DataError(
            f"{folder}: cannot be read as a saved dataset: {_reason(folder) or _first_line(error)}"
        ) from None
    yield from _rows(saved, str(folder))


def _reason(folder: Path) -> str:
    """Name the first of the folder's tables that is something else, such as a Git LFS pointer; empty where none is."""
    for file in sorted(folder.glob("*.arrow")):
        signature = signature_of_file(file)
        if signature and "Arrow" not in signature.what:
            return f"{file.name} is {signature}"
    return ""


def rows_of_hub(name: str) -> Iterator[Row | Finding]:
    """Yield the rows of a hub dataset, `org/name/config@revision:split`; the line of a row is its number, from 1.

    Raises:
        DataError: the hub has no such dataset, or it cannot be read.
        UnreachableDataError: it isn't on this machine, and the hub is out of reach.
    """
    wanted = HubName.of(name)
    if Path(wanted.dataset).exists():  # datasets would load that folder instead
        raise DataError(f"hf:{wanted.dataset}: the current folder has a folder of that name; run qpref in another one")
    yield from _rows(_split(_downloaded(wanted.dataset, wanted.config, wanted.revision), wanted), f"hf:{name}")


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


@cache
def _downloaded(dataset: str, config: str | None, revision: str | None) -> Any:
    """Download a dataset's splits at the revision's current commit; offline, load the local copy of an earlier run.

    Cached for the process, so that every pass of a run reads the same commit.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        facts = hub.dataset_info(dataset, revision=revision)
        if facts.gated:
            hub.auth_check(dataset, repo_type="dataset")  # datasets would hide the hub's reason
        builder = datasets.load_dataset_builder(dataset, config, revision=facts.sha)
        if builder.hash != facts.sha:  # where the hub fails, datasets loads the newest copy of any commit
            raise ConnectionError(f"datasets loaded commit {builder.hash}, not {facts.sha}")
        # The card's numbers of rows and bytes are often out of date; the download checks each file's size.
        builder.download_and_prepare(verification_mode="no_checks")
        return builder.as_dataset()
    except Exception as error:  # noqa: BLE001 - the hub's clients and the builders have dozens of errors
        failure = hub_failure(error, "dataset", revision)
        if not failure.unreachable:
            raise DataError(f"hf:{dataset}: {failure.what}", failure.hint) from None
    return _kept(dataset, config, revision, UnreachableDataError(f"hf:{dataset}: {failure.what}", failure.hint))


def _kept(dataset: str, config: str | None, revision: str | None, otherwise: UnreachableDataError) -> Any:
    """Load the newest copy of the dataset in the cache of `datasets`.

    Raises:
        UnreachableDataError: there is none, or it isn't known to be of this revision.
    """
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            repo_id=dataset, dataset_name=dataset.split("/")[1], config_name=config, version="auto", hash="auto"
        )
    except (ValueError, OSError):
        raise otherwise from None
    if revision not in (None, builder.hash):
        what = (
            f"hf:{dataset}: revision '{revision}' can't be looked up, and the copy on this machine has another commit"
        )
        raise UnreachableDataError(what, f"{otherwise.hint}; or use that copy: hf:{dataset}@{builder.hash}")
    builder.download_and_prepare()
    return builder.as_dataset()


def _split(splits: Any, wanted: HubName) -> Any:
    """Select the named split, else `train`, else the only one."""
    split = wanted.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise DataError(f"hf:{wanted.dataset}: no split '{split}'; it has {', '.join(splits)}")
    return splits[split]


def _rows(dataset: Any, path: str) -> Iterator[Row | Finding]:
    number = 1
    tables = iter(dataset.with_format("arrow").iter(batch_size=BATCH_ROWS))
    while True:
        try:
            table = next(tables, None)
        except Exception as error:  # noqa: BLE001 - the library's errors for broken files differ by format
            raise DataError(f"{path}:{number}: reading stopped: {_first_line(error)}") from None
        if table is None:
            return
        yield from rows_of_table(table, path, number)
        number += table.num_rows


def _first_line(error: Exception) -> str:
    """Return the type and the first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""`qpref cache`"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from qpref.cli.groups import SuggestingGroup
from qpref.cli.options import json_option
from qpref.cli.output import echo

KINDS = {
    "models": "converted base models; qpref merge needs those of its runs",
    "pypi": "files from PyPI wheels",
    "reference": "reference log-probabilities",
    "tokens": "token ids of preference data",
    "sha256": "hashes of large files",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the cache; `last_used` is an ISO date and time."""

    kind: str
    name: str
    num_bytes: int
    last_used: str


@click.group("cache", cls=SuggestingGroup, invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the cache on this machine with sizes, or clear it.

    The cache folder is $QPREF_CACHE, by default qpref in the user's cache folder. Reference log-probabilities take at
    most $QPREF_REFERENCE_CACHE_BYTES (default 20 GiB), token ids $QPREF_TOKEN_CACHE_BYTES (default 5 GiB); the least
    recently used are removed first.
    """
    if ctx.invoked_subcommand is not None:
        return
    from qpref.fsio import cache_folder

    entries = list(_entries(cache_folder()))
    if as_json:
        echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    for kind, description in KINDS.items():
        found = [entry for entry in entries if entry.kind == kind]
        size = sum(entry.num_bytes for entry in found)
        echo(f"{kind:10} {_size(size):>10}  {description}")
        if kind != "sha256":
            for entry in found:
                echo(f"{'':10} {_size(entry.num_bytes):>10}  {entry.name}, last used {entry.last_used[:16]}")
    echo(f"{'all':10} {_size(sum(entry.num_bytes for entry in entries)):>10}  {cache_folder()}")


@command.command("clear")
@click.argument("kinds", nargs=-1, required=True, type=click.Choice(list(KINDS)))
def clear(kinds: tuple[str, ...]) -> None:
    """Remove all entries of the given KINDS; they are fetched or computed when next needed."""
    from qpref import fsio

    for kind in dict.fromkeys(kinds):
        folder = fsio.cache_folder() / kind
        freed = sum(_bytes(path) for path in folder.glob("*"))
        if folder.is_dir():
            fsio.remove_tree(folder)
        echo(f"{kind}: {_size(freed)} freed")


def _entries(cache: Path) -> Iterator[Entry]:
    for kind in KINDS:
        for path in sorted((cache / kind).glob("*")):
            times = [file.lstat().st_mtime for file in (path, *path.rglob("*"))]
            used = datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds")
            yield Entry(kind, path.name, _bytes(path), used)


def _bytes(path: Path) -> int:
    """Sum the sizes of what removing an entry frees: of links themselves, not of what they lead to."""
    statuses = (file.lstat() for file in (path, *path.rglob("*")))
    return sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

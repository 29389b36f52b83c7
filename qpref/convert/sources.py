"""Sources of data: names, files and columns as `[data]` has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.convert.draft import Draft

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".ndjson", ".gz")


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders in which relative paths of a file start, and those of the recipe will.

    Attributes:
        origins: the current folder and that of the file; the first that has a path counts.
        target: folder of the recipe.
    """

    origins: tuple[Path, ...]
    target: Path

    def find(self, name: str) -> Path | None:
        """Return the existing file or folder of this name."""
        path = Path(name).expanduser()
        return next((origin / path for origin in self.origins if (origin / path).exists()), None)

    def local(self, path: Path) -> str:
        """Write a path as the recipe has it: relative to its folder, unless it is absolute already."""
        return os.path.relpath(path.absolute(), self.target.absolute())


def location(name: str, folders: Folders, config: str | None = None, split: str | None = None,
             revision: str | None = None) -> str:  # fmt: skip
    """Name a source: a path if it exists or looks like one, else a dataset of the hub."""
    found = folders.find(name)
    if found is not None:
        return folders.local(found)
    if name.startswith((".", "/", "~")) or name.lower().endswith(FILE_SUFFIXES):
        return folders.local(folders.origins[0] / Path(name).expanduser())
    config = f"/{config}" if config and config != "default" else ""
    return f"hf:{name}{config}{f'@{revision}' if revision else ''}{f':{split}' if split else ''}"


def put_sources(draft: Draft, key: str, tables: list[dict[str, Any]], origin: str) -> None:
    """Put one source as a path, several or one with settings of its own as tables."""
    if len(tables) == 1 and set(tables[0]) == {"path"}:
        draft.put(f"data.{key}", tables[0]["path"], origin)
    elif tables:
        draft.sources[key] = (tables, origin)


def columns_of(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's `columns`, without those that have qpref's name already."""
    renamed = {ours: theirs for ours, theirs in pairs.items() if isinstance(theirs, str) and theirs and theirs != ours}
    return {"columns": renamed} if renamed else {}


def put_share(draft: Draft, key: str, size: float | None) -> bool:
    """Put the held-out share; returns whether there are held-out rows. A number of rows has no equal."""
    if not size:
        return False
    if size < 1:
        draft.put("data.heldout_share", min(size, 0.5), f"{key} {size:g}")
        if size > 0.5:
            draft.differs.append(f"heldout_share = 0.5, the most that it can be, for {key} {size:g}")
        return True
    draft.put("data.heldout_share", 0.05, f"{key} {size:g}")
    draft.differs.append(f"heldout_share = 0.05: held-out rows are a share of the prompts; {key} {size:g} counts rows")
    return True


def put_lengths(draft: Draft, longest: int | None, prompt: int | None, origin: str, overflow: str) -> None:
    """Put `max_length` and what goes with it; a tool without a limit for prompts lets them fill all but one token."""
    if longest is None:
        draft.differs.append(
            "max_length: the file has no limit; rows over qpref's are errors, so raise it if there are"
        )
        return
    draft.put("data.max_length", longest, origin)
    limit = min(prompt, longest - 1) if prompt else longest - 1
    draft.put("data.max_prompt_length", limit, "" if prompt else "no limit of its own in the file")
    draft.put("data.on_overflow", overflow, "")

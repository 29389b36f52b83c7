"""Distributions for tests, as pip leaves them: metadata, entry points and modules in a folder of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest


def put_distribution(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry_points: Mapping[str, str],
    modules: Mapping[str, str],
    requires: Iterable[str] = (),
) -> None:
    """Install the distribution `acme 2.0` in this process, until the test ends.

    Args:
        modules: name -> source.
    """
    info = folder / "acme-2.0.dist-info"
    info.mkdir(parents=True)
    lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n{lines}")
    table = "".join(f"{name} = {module}\n" for name, module in entry_points.items())
    (info / "entry_points.txt").write_text(f"[qpref]\n{table}")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setitem(sys.modules, name, None)  # so that the module of this test goes with it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)

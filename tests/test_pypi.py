"""Files inside wheels; downloads themselves are tested with the bases that they hold (tests/policy/test_source.py)."""

from __future__ import annotations

import logging
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


def test_the_log_says_how_much_of_how_much_is_fetched(tmp_path, monkeypatch, caplog):
    """A stand-in for pip names the size as pip does, has 3 MB after a while, and waits until that is in the log."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pypi, "SECONDS_BETWEEN_MESSAGES", 0.05)
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        "echo '  Downloading tiny_base-1.0-py3-none-any.whl (88.5 MB)'\n"
        'head -c 3000000 /dev/zero > "$TMPDIR/part"\n'
        f"while [ ! -e {tmp_path}/seen ]; do sleep 0.05; done\n"
        "echo 'ERROR: enough' >&2\n"
        "exit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    class Seen(logging.Handler):
        def emit(self, record):
            if record.getMessage() == "tiny-base: 3.0 MB of 88.5 MB fetched":
                (tmp_path / "seen").touch()

    handler = Seen()
    caplog.set_level("INFO", "qpref")
    logging.getLogger("qpref").addHandler(handler)
    try:
        with pytest.raises(pypi.WheelError, match="ERROR: enough"):
            pypi.fetch("pypi:tiny-base==1.0/tiny_base/tiny.gguf")
    finally:
        logging.getLogger("qpref").removeHandler(handler)
    assert (tmp_path / "seen").exists()

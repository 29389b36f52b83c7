"""The Dockerfile copies what its image needs. No image is built here: its steps run in an environment of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

import pytest
from manual_commands import ROOT

KNOWN = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, in their order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def copied() -> list[tuple[str, str]]:
    """Each file or folder that is copied, and its place in the image."""
    pairs = []
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path into the build: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#") and (fnmatch(path, pattern) or fnmatch(path, f"{pattern}/*")):
            sent = line.startswith("!")
    return sent


def value_of(instruction: str) -> str:
    return next(rest for word, rest in reversed(instructions()) if word == instruction)


def test_the_dockerfile_has_instructions_that_are_known_and_ends_as_another_user_than_root():
    assert {word for word, _ in instructions()} <= KNOWN
    assert instructions()[0][0] == "FROM"
    assert value_of("USER") != "root"
    assert json.loads(value_of("ENTRYPOINT")) == ["qpref"]


def test_what_is_copied_is_in_the_repository_and_sent_to_the_build():
    for source, _ in copied():
        assert (ROOT / source).exists()
        assert is_sent(source)
    assert not is_sent(".git/config")
    assert not is_sent("runs/quickstart/run.json")


def test_the_image_has_the_python_that_qpref_is_tested_with():
    assert value_of("FROM") == "python:3.11-slim"
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.soak
def test_what_is_copied_installs_and_answers(tmp_path):
    source = tmp_path / "src"
    for name, target in copied():
        folder = tmp_path / target.lstrip("/") if target.startswith("/") else source / target
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "borrowed.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in borrowed))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--ignore-installed", "--no-deps", "--no-build-isolation", "--no-index", source], check=True)

    entry = [str(tmp_path / "venv/bin" / json.loads(value_of("ENTRYPOINT"))[0])]
    assert "Usage: qpref" in answer(tmp_path, *entry, *json.loads(value_of("CMD")))
    where = answer(
        tmp_path, python, "-c", "import qpref, qpref_plugins.loss_dpo as d; print(qpref.__file__, d.__file__)"
    )
    assert all(str(site) in path for path in where.split())
    resolved = answer(tmp_path, *entry, "train", "recipes/quickstart.toml", "--dry-run")
    assert "# run folder: runs/quickstart" in resolved


def answer(folder: Path, *command: str | Path) -> str:
    environment = os.environ | {"QPREF_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

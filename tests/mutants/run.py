"""Run mutants: each in a copy of the tree, with the tests that have to fail on it.

The processes are forked from one that has imported the libraries, but nothing of qpref: that import takes longer than
most of the tests.
"""

from __future__ import annotations

import compileall
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .mutant import ROOT, Mutant

LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "safetensors.torch", "pytest")
COPIED = ("qpref", "plugins", "tests", "pyproject.toml")
"""Of the tree."""
LIMIT_SECONDS, ALL_TESTS_LIMIT_SECONDS = 600, 3600
"""For the tests of one mutant, and for those of all mutants without an edit."""
PASSED, FAILED = 100, 101
"""Exit codes of a process whose tests pytest has run: 100 and pytest's own. Any other one is an error."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of pytest in a copy of the tree.

    Attributes:
        code: of the process; None where it took too long.
    """

    code: int | None
    seconds: float
    output: str

    @property
    def is_killed(self) -> bool:
        return self.code == FAILED

    @property
    def has_passed(self) -> bool:
        return self.code == PASSED


def preload() -> None:
    """Import the libraries that the tests need, on one thread, so that processes can be forked from this one."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "qpref" not in sys.modules, "the tests would run on this tree, not on the copy"


def run_all(jobs: Sequence[tuple[Sequence[Mutant], Sequence[str]]], parallel: int) -> Iterator[Outcome]:
    """Run each job's tests with its mutants' edits applied, `parallel` at a time; yields in the jobs' order."""
    with tempfile.TemporaryDirectory(prefix="qpref-mutants-") as folder, ThreadPoolExecutor(parallel) as threads:
        original = Path(folder) / "original"  # the tree may change meanwhile
        original.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, original / name)
        compileall.compile_dir(original, quiet=2)  # once, and not for each mutant
        yield from threads.map(lambda job: _run(original, *job), jobs)


def _run(original: Path, mutants: Sequence[Mutant], tests: Sequence[str]) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=original.parent) as folder:
        tree, output = Path(folder) / "tree", Path(folder) / "output"
        shutil.copytree(original, tree)
        for edit in (edit for mutant in mutants for edit in mutant.edits):
            edit.apply(tree)
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, tests, output))
        process.start()
        process.join(LIMIT_SECONDS if mutants else ALL_TESTS_LIMIT_SECONDS)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        said = output.read_text(errors="replace") if output.exists() else ""
    return Outcome(code, time.monotonic() - started, said)


def _pytest(tree: Path, tests: Sequence[str], output: Path) -> None:
    """Run pytest in this process, on the packages of `tree`; both streams go to `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    folders = [str(tree), str(tree / "plugins")]
    sys.path[:] = [
        *folders,
        *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "plugins")),
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # of the processes that tests start
    os.chdir(tree)
    import pytest

    temporary = output.with_name("tmp")
    # Of the libraries that were imported before pytest, some have plugins for it.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, f"--basetemp={temporary}", *tests])
    sys.stdout.flush()
    import qpref

    assert Path(qpref.__file__).is_relative_to(tree), qpref.__file__
    os._exit(PASSED + int(code))

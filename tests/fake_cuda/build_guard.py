"""Compiles guard.cpp against the installed torch, into a temporary folder, once per source and torch version.

    python build_guard.py        # prints where the library is

It never imports torch: the library has to be in the process before that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def build() -> Path:
    """The compiled library; makes it where it is not there yet.

    Raises:
        RuntimeError: there is no compiler, or it fails; what it said is in the message.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is not installed"
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    digest = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}" / f"guard-{digest}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the CUDA stand-in needs g++ or clang++")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    half = target.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(half)]
    command += ["-I", str(torch / "include"), "-L", str(torch / "lib"), "-lc10", "-ltorch_cpu"]
    command += [f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"guard.cpp does not compile against this torch:\n{done.stderr}")
    half.replace(target)
    return target


if __name__ == "__main__":
    print(build())

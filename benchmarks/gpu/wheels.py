"""Wheels for a machine with a GPU and without a network.

    python -m benchmarks.gpu.wheels FOLDER --python 3.12 --cuda 130      make the folder, on a machine with a network
    python -m benchmarks.gpu --wheels FOLDER                             install it, where the GPU is

torch, transformers, peft and accelerate have to be there already. qpref is built from this repository. A wheel of
bitsandbytes holds a library for every CUDA version; the one for yours and the CPU's are kept, 4 of 43 MB.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MISSING = ("bitsandbytes", "trl", "gguf", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
           "typing-extensions", "tomli-w", "rapidfuzz", "pluggy", "datasets", "multiprocess", "dill",
           "xxhash")  # fmt: skip
"""What a machine with torch, transformers and peft lacks, with the requirements of each."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "any")  # fmt: skip


def install(folder: Path, site: Path) -> Path:
    """Install the wheels into a folder for PYTHONPATH, from the disk alone, and return it.

    Raises:
        SystemExit: pip refuses them.
    """
    found = [str(path) for path in sorted(folder.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if not found or subprocess.run([*command, "--target", str(site), *found], check=False).returncode:
        raise SystemExit(f"{folder}: no wheels, or pip refuses them")
    return site


def slim(wheel: Path, cuda: str) -> None:
    """Drop bitsandbytes' libraries for other CUDA versions from its wheel, in place; RECORD is rewritten."""
    staging, rows = wheel.with_suffix(".staging"), []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED) as result:
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for name in source.namelist():
            library = re.search(r"libbitsandbytes_(\w+)\.so$", name)
            if name == record or (library and library[1] not in (f"cuda{cuda}", "cpu")):
                continue
            data = source.read(name)
            result.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}")
        result.writestr(record, "\n".join([*rows, f"{record},,"]) + "\n")
    staging.replace(wheel)


def _download(folder: Path, python: str) -> None:
    versions = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line for line in versions if "==" in line}
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, *(pinned.get(name, name) for name in MISSING)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python where the GPU is")
    parser.add_argument("--cuda", default="130", help="version of CUDA that torch was built for there, without the dot")
    options = parser.parse_args()
    _download(options.folder, options.python)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(options.folder), str(ROOT)],
        check=True,
    )
    for wheel in options.folder.glob("bitsandbytes-*.whl"):
        slim(wheel, options.cuda)
    total = sum(wheel.stat().st_size for wheel in options.folder.glob("*.whl"))
    print(f"{options.folder}: {total / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""The CUDA path on a real GPU, in four scripts of 7, 7, 7 and 6 minutes. HAS NOT RUN ON A GPU YET.

    python -m benchmarks.gpu                            all four
    python -m benchmarks.gpu correct                    one of them: correct, memory, timing, race
    python -m benchmarks.gpu memory --only caps         the stages whose name contains this text
    python -m benchmarks.gpu --rehearse                 the same code on a CPU, at tiny sizes: proves that it runs

Each stage is a process of its own with a time limit; a failed one doesn't stop the others. After each stage, the
results of its script are written to a dated JSON in --output, with a table of all of them beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu import tables, wheels
from benchmarks.gpu.plan import MINUTES, SCRIPTS, Stage, chosen

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
LOG_LINES = 40


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [script for script in options.scripts if script not in SCRIPTS]
    if unknown:
        parser.error(f"no script is called {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    if options.only and not chosen(options.scripts or list(SCRIPTS), options.only):
        raise SystemExit(f"no stage has '{options.only}' in its name; benchmarks/gpu/plan.py lists them")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qpref-gpu-") as temporary:
        scratch = options.scratch or Path(temporary)
        (scratch / "bases").mkdir(parents=True, exist_ok=True)
        environment = _environment(Path(temporary), options.wheels)
        failed = 0
        for script in options.scripts or SCRIPTS:
            failed += _run_script(script, options, scratch, environment)
    sys.exit(min(failed, 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=", ".join(SCRIPTS))
    parser.add_argument("--only", help="run the stages whose name contains this text")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files and the table")
    parser.add_argument(
        "--scratch", type=Path, help="folder for models, kept for the next command  [default: temporary]"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to install first, for a machine without a network"
    )
    parser.add_argument(
        "--model", default="", help="real model of `memory`, a GGUF file or a folder  [the quickstart's]"
    )
    return parser


def _environment(temporary: Path, folder: Path | None) -> dict[str, str]:
    """Make the environment of the stages: this repository, offline, and the carried wheels."""
    paths = [str(ROOT)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(temporary / "datasets"),
        "QPREF_CACHE": str(temporary / "qpref"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    if folder is not None:
        paths.insert(0, str(wheels.install(folder, temporary / "site")))
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder.resolve())}
    return environment | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _run_script(script: str, options: argparse.Namespace, scratch: Path, environment: dict[str, str]) -> int:
    """Run a script's stages, and write its results after each. Returns the number of stages that didn't pass."""
    stages = chosen([script], options.only)
    if not stages:
        return 0
    result = _head(script, options, environment)
    started = time.monotonic()
    for stage in stages:
        left = MINUTES[script] * 60 - (time.monotonic() - started)
        stage = replace(stage, seconds=min(stage.seconds, int(left)))
        outcome = _run(stage, options, scratch, environment) if left >= 1 else {"status": "no time left", "rows": []}
        result["stages"].append({"name": stage.name, **outcome})
        print(f"{script} {stage.name}: {outcome['status']}, {outcome.get('seconds', 0):.0f} s", flush=True)
        _write(result, options.output)
    print(tables.table(result), flush=True)
    return sum(stage["status"] != "passed" for stage in result["stages"])


def _head(script: str, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Describe the measurement: date, command, machine, versions. The GPU is described in a process of its own."""
    code = (
        "import json, sys; from benchmarks import machine; from benchmarks.gpu.device import open_device; "
        f"device = open_device({options.rehearse}); "
        "print(json.dumps(machine.describe(0) | {'device': device.name} | device.describe()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "script": script,
        "command": " ".join(["python -m benchmarks.gpu", *_without_paths(sys.argv[1:])]),
        "commit": machine.commit(ROOT),
        "rehearsal": options.rehearse,
        "machine": json.loads(done.stdout.splitlines()[-1]),
        "stages": [],
    }


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Shorten paths of this machine to their last part."""
    return [Path(each).name if each.startswith("/") else each for each in arguments]


def _run(stage: Stage, options: argparse.Namespace, scratch: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage in a process group of its own, which is killed when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.json", Path(folder) / "log"
        mode = "rehearse" if options.rehearse else "measure"
        command = [sys.executable, "-m", "benchmarks.gpu.context", stage.script, stage.name, str(scratch), str(rows)]
        before = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, mode, options.model],
                cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
            try:
                status = "failed" if process.wait(stage.seconds) else "passed"
            except subprocess.TimeoutExpired:
                status = f"stopped after {stage.seconds} s"
            finally:
                _kill_group(process)
        outcome = {"status": status, "seconds": round(time.monotonic() - before, 1), "rows": _read(rows)}
        if status != "passed":
            outcome["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return outcome


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(rows: Path) -> list[dict[str, Any]]:
    return json.loads(rows.read_text()) if rows.exists() else []


def _write(result: dict[str, Any], output: Path) -> None:
    name = f"{result['date'][:10]}-gpu-{result['script']}{'-rehearsal' if result['rehearsal'] else ''}"
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / f"{name}.md").write_text(tables.table(result))


if __name__ == "__main__":
    main()

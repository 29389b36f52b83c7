"""qpref against TRL: cost of a training step, in CPU seconds (seconds on a GPU) and memory.

    python -m benchmarks.run --suite cpu                    two CPU cores, 135M: what qpref claims
    python -m benchmarks.run --suite ablations              its techniques one by one; TRL as shipped on long prompts
    python -m benchmarks.run --suite scaling                growing numbers of pairs and growing lengths
    python -m benchmarks.run --suite cuda                   a GPU, 135M to 8B; HAS NOT BEEN RUN: no GPU was at hand
    python -m benchmarks.run --suite cpu --quick            a smoke test, in half a minute

Writes a dated JSON with every step's figures, and a table made from it, to benchmarks/results or to --output.
Models (true shapes, random weights), tokenizer and data are generated in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import contestants, machine, race, scaling, tables
from benchmarks.contestants import Race
from benchmarks.shapes import Shape, make_base

SUITES: dict[str, Callable[[], list[Race]]] = {
    "cpu": contestants.cpu_suite,
    "ablations": contestants.ablation_suite,
    "scaling": contestants.growth_suite,
    "cuda": contestants.cuda_suite,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    parser.add_argument("--quick", action="store_true", help="two-layer model and three steps: a smoke test")
    parser.add_argument("--only", help="run the races whose name contains this text")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qpref-benchmark-") as scratch:
        race.set_environment(Path(scratch))
        result = _describe(options) | {"records": []}
        if options.suite == "scaling":
            result["data"] = scaling.measure(Path(scratch), options.quick)
            _write(result, options)
        for one in _races(options):
            print(f"{one.name}: {', '.join(contestant.name for contestant in one.contestants)}", flush=True)
            base = _base(one.shape, Path(scratch))
            result["records"] += race.run_race(one, base, result["device"])
            _write(result, options)  # in case a later race fails
    print(_write(result, options))


def _races(options: argparse.Namespace) -> list[Race]:
    chosen = SUITES[options.suite]()
    if options.quick:
        chosen = [contestants.quick(race) for race in chosen]
    return [race for race in chosen if options.only is None or options.only in race.name]


def _device(suite: str) -> str:
    return "cuda" if suite == "cuda" else "cpu"


def _describe(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the measurement: date, command, machine."""
    device = _device(options.suite)
    here, there = race.processes(device).Pipe()
    process = race.processes(device).Process(target=machine.send_peaks, args=(there, device, race.THREADS))
    process.start()
    measured = here.recv()
    process.join()
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
        "suite": options.suite,
        "device": device,
        "machine": machine.describe(race.THREADS),
        "peaks": measured,
    }


def _base(shape: Shape, scratch: Path) -> Path:
    """Make the shape's model unless it exists; remove the previous one, since an 8B's weights take 16 GB."""
    folder = scratch / shape.name
    if not folder.exists():
        for other in scratch.glob("*/config.json"):
            shutil.rmtree(other.parent)
        make_base(shape, folder)
    return folder


def _write(result: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the JSON and the table, and return the table."""
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{result['date'][:10]}-{options.suite}{'-quick' if options.quick else ''}"
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    table = tables.table(result)
    (options.output / f"{name}.md").write_text(table)
    return table


if __name__ == "__main__":
    main()

"""qpref against TRL: cost of a training step, in CPU seconds and memory.

    python -m benchmarks.run --suite cpu                    two CPU cores, 135M: what qpref claims
    python -m benchmarks.run --suite ablations              its techniques one by one; TRL as shipped on long prompts
    python -m benchmarks.run --suite scaling                growing numbers of pairs and growing lengths
    python -m benchmarks.run --suite cuda                   a GPU, 1B to 8B: `python -m benchmarks.gpu` with its
                                                            options; HAS NOT BEEN RUN ON A GPU YET
    python -m benchmarks.run --suite cpu --quick            a smoke test, in half a minute

Writes a dated JSON with every step's figures, and a table made from it, to benchmarks/results or to --output.
Models (true shapes, random weights), tokenizer and data are generated in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import contestants, machine, race, scaling, tables
from benchmarks.contestants import Race
from benchmarks.gpu import __main__ as gpu
from benchmarks.shapes import Shape, make_base

SUITES: dict[str, Callable[[], list[Race]]] = {
    "cpu": contestants.cpu_suite,
    "ablations": contestants.ablation_suite,
    "scaling": contestants.growth_suite,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "cuda"), required=True)
    parser.add_argument(
        "--quick", action="store_true", help="two-layer model and three steps: a smoke test; on a CPU always"
    )
    parser.add_argument("--only", help="run the races whose name contains this text")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the table")
    options, further = parser.parse_known_args()
    if options.suite == "cuda":
        given = ["--rehearse"] * options.quick + (["--only", options.only] if options.only else [])
        gpu.main([*further, *given, "--output", str(options.output)])
    if further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
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


def _describe(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the measurement: date, command, machine."""
    here, there = race.processes("cpu").Pipe()
    process = race.processes("cpu").Process(target=machine.send_peaks, args=(there, "cpu", race.THREADS))
    process.start()
    measured = here.recv()
    process.join()
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
        "suite": options.suite,
        "device": "cpu",
        "machine": machine.describe(race.THREADS),
        "peaks": measured,
    }


def _base(shape: Shape, scratch: Path) -> Path:
    """Make the shape's model unless it exists."""
    folder = scratch / shape.name
    return folder if folder.exists() else make_base(shape, folder)


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

"""Edit a run's records as nothing but a test does: with the hashes that stand for them written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpref import fsio, publish, sealed
from qpref.training.run_json import RECORDS


def reseal(run: Path) -> None:
    """Write the hashes of an edited run again, so that what looks deeper has to see the edit."""
    facts = _unsealed(run / "run.json")
    if "files" in facts:
        facts["files"] |= {name: fsio.sha256_file(run / name) for name in RECORDS if (run / name).is_file()}
    sealed.write_sealed(run / "run.json", facts)
    if (run / "result.json").is_file() and (run / "adapter").is_dir():
        result = _unsealed(run / "result.json")
        sealed.write_sealed(run / "result.json", result | {"adapter_files": publish.manifest(run / "adapter")})


def edit_facts(run: Path, **changes: object) -> None:
    """Change values of run.json; None removes one."""
    facts = _unsealed(run / "run.json") | changes
    (run / "run.json").write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
    reseal(run)


def _unsealed(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    return {name: value for name, value in values.items() if name != sealed.SEAL}

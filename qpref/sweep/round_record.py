"""Record of on-policy rounds, rounds.json in their folder: what each stage came to, and the settings behind it.

Each stage is on the disk before the next one starts, so a command that was killed continues with the stage that it was
in. The stages themselves continue too: sampling by its journal, training by its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref import sealed
from qpref.errors import CheckpointError, RecipeError

NAME = "rounds.json"
OVERWRITE = "start over with --overwrite"


class RoundRecord:
    """Results of finished stages, by round ("start" for the policy before the first) and stage.

    Args:
        folder: of the rounds.
        settings: JSON values that decide every stage.
        resume: continue from the record that is there.
        overwrite: leave it aside.

    Raises:
        RecipeError: the folder holds rounds, and neither `resume` nor `overwrite` is set.
        CheckpointError: they were made with other settings, or the record is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = folder / NAME
        self._settings = dict(settings)
        self._stages: dict[str, Any] = {}
        if not self.path.exists() or overwrite:
            self._write()
            return
        if not resume:
            raise RecipeError(
                f"{folder}: holds rounds", "continue with --resume, replace them with --overwrite, or use --output"
            )
        before = self._read()
        if changed := [name for name in self._settings if before["settings"].get(name) != self._settings[name]]:
            raise CheckpointError(
                f"{folder}: these rounds were made with another {' and another '.join(changed)}",
                f"resume with what they were started with, or {OVERWRITE}",
            )
        self._stages = before["stages"]

    def get(self, name: str, stage: str) -> Any:
        """Return a stage's result; None where it isn't finished."""
        return self._stages.get(name, {}).get(stage)

    def put(self, name: str, stage: str, result: Any) -> None:
        """Record the result of a finished stage, as JSON values."""
        self._stages.setdefault(name, {})[stage] = result
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            found = sealed.read_sealed(self.path)
            if not {"settings", "stages"} <= found.keys():
                raise ValueError("it is no record of rounds")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}", OVERWRITE) from None
        return found

    def _write(self) -> None:
        sealed.write_sealed(self.path, {"settings": self._settings, "stages": self._stages})

"""The adapter folder of a run, checked before others get it."""

from __future__ import annotations

from pathlib import Path

from qpref.errors import MergeError, RecipeError
from qpref.policy import adapter_folder
from qpref.training.folder import EXPORT_AGAIN, RunFolder


def adapter_to_push(run: Path) -> Path:
    """Find the adapter of a finished run.

    Raises:
        RecipeError: it is no finished run.
        MergeError: the adapter isn't as training wrote it, or names a folder of this machine as its base.
    """
    folder = RunFolder(run)
    if not folder.run_json.is_file() or not folder.adapter.is_dir():
        raise RecipeError(f"{run}: no finished run", "name a run; qpref merge RUN OUT --push uploads a merged model")
    if damage := folder.adapter_damage():
        raise MergeError(damage, EXPORT_AGAIN)
    base = adapter_folder.read_settings(folder.adapter).get("base_model_name_or_path")
    if not base or Path(base).is_absolute():
        raise MergeError(
            f"{folder.adapter}: names {base} as its base, which others don't have",
            "upload it by hand",
        )
    return folder.adapter

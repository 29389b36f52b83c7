"""Push a folder to the hub; the token comes only from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qpref.errors import MergeError, RecipeError


def refuse_push(name: str) -> None:
    """Refuse, before any work, a push that cannot succeed.

    Raises:
        RecipeError: the name is no valid hub id, or HF_TOKEN isn't set.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # missing in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise RecipeError("--push: expected ORG/NAME, such as my-org/my-model")
    if not os.environ.get("HF_TOKEN"):
        raise RecipeError("--push needs a token with write access in HF_TOKEN", "export HF_TOKEN=... and try again")


def push(folder: Path, name: str, message: str) -> str:
    """Upload a folder as one commit, and return the repository's URL; a missing repository is created, private.

    Raises:
        MergeError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Refused connections are errors of the hub's HTTP library, whose name differs between its versions.
    transport_error: Any = HfHubHTTPError.__bases__[0]

    hub = HfApi(token=os.environ["HF_TOKEN"])
    try:
        repository = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (transport_error, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MergeError(f"{name}: not pushed: {reason}", f"the model is in {folder}") from error
    return str(repository)

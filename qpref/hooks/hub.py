"""Failures of the Hugging Face hub's clients, each as one sentence and a hint.

The clients raise dozens of nested exception types, whose messages open with a status and a request id.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

UNREACHABLE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")
"""Names of the errors raised when nothing answers; the clients' HTTP library differs between versions."""
WITH_ACCESS = "set HF_TOKEN to a token with access to it, or run `hf auth login`"


@dataclass(frozen=True, slots=True)
class HubFailure:
    """A failure of the hub; `what` is worded to follow the name of the model or dataset and a colon.

    Attributes:
        unreachable: the hub gave no answer, so it isn't known whether the model or dataset exists.
    """

    what: str
    hint: str
    unreachable: bool = False


def hub_failure(error: BaseException, kind: Literal["model", "dataset"], revision: str | None) -> HubFailure:
    """Explain an error that a client of the hub has raised.

    Args:
        revision: the requested one.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            what = f"this {kind} is gated on the hub"
            return HubFailure(what, f"accept its terms on its page there, and {WITH_ACCESS}")
        if isinstance(cause, RevisionNotFoundError):
            return HubFailure(
                f"the hub has no revision '{revision}' of this {kind}", "name a branch, a tag or a commit"
            )
        if isinstance(cause, RepositoryNotFoundError):
            what = f"the hub has no {kind} of this name, or it is private"
            return HubFailure(what, f"check the name; for a private one {WITH_ACCESS}")
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause.response.status_code, str(cause))
        if type(cause).__name__ == "OfflineModeIsEnabled":
            what = f"HF_HUB_OFFLINE is set, and this {kind} isn't in the hub's cache on this machine"
            return HubFailure(what, "run once with HF_HUB_OFFLINE=0 to download it", unreachable=True)
        if type(cause).__name__ in UNREACHABLE:
            what = f"the hub at {constants.ENDPOINT} can't be reached: {_first_line(cause)}"
            return HubFailure(what, "check the network and HF_ENDPOINT", unreachable=True)
    transport_error: Any = HfHubHTTPError.__bases__[0]
    for cause in causes:
        if isinstance(cause, transport_error) or "Consistency check failed" in str(cause):
            return HubFailure(
                f"the download was interrupted: {_first_line(cause)}", "run it again; downloaded parts are kept"
            )
    root = [error, *(cause for before, cause in pairwise(causes) if cause is before.__cause__)][-1]
    return HubFailure(f"can't be fetched: {_first_line(root)}", "check the name, the network and the disk")


def _answered(status: int, message: str) -> HubFailure:
    if status in (401, 403):
        return HubFailure(f"the hub refuses access ({status})", WITH_ACCESS)
    lines = [line.strip()[:200] for line in message.splitlines() if line.strip()]
    what = ": ".join([f"the hub answers {status}", *lines[:1]])  # some answers have no words
    return HubFailure(what, "try again later", unreachable=status >= 500)


def _causes(error: BaseException) -> list[BaseException]:
    """List the error and its causes, also where it was raised `from None`."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

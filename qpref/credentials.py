"""Passwords and tokens in texts: found, so that they are neither printed nor stored.

They belong in the environment (HF_TOKEN), never in a recipe, an address or a revision. Recognized are the forms of
common services, the user part of a URL, assignments to names such as WANDB_API_KEY, and the values that the environment
holds under such names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

HIDDEN = "***"
MIN_LENGTH = 12
"""Shortest value of the environment that is taken for a secret; shorter ones are words."""
SECRET_NAME = re.compile(r"(?i)(token|key|secret|password|passwd|credentials?)$")
_NAMES = r"token|key|secret|password|passwd|signature|sig|auth|credentials?"
PATTERNS = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^\s/?#'\"\\<>@]+@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"(?i)([?&][\w.-]*(?:{_NAMES})=)[^\s&#'\"\\<>]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b([A-Z][A-Z0-9_]*_(?:TOKEN|KEY|SECRET|PASSWORD)['\"]?\s*[=:]\s*['\"]?)[^\s'\"\\]{6,}"),
     rf"\1{HIDDEN}"),
    (re.compile(r"\bhf_(?=\w*[A-Z0-9])\w{10,}"), HIDDEN),
    (re.compile(r"\bsk-(?=[\w-]*[A-Z0-9])[\w-]{10,}"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|pypi-AgE)[\w-]{10,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bAIza[\w-]{30,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),
)  # fmt: skip


def redact(text: str) -> str:
    """Replace every password and token in a text by asterisks."""
    if len(text) >= MIN_LENGTH:
        for value in _of_environment(os.environ):
            text = text.replace(value, HIDDEN)
    for pattern, kept in PATTERNS:
        text = pattern.sub(kept, text)
    return text


def keys_with_credentials(value: object, key: str = "") -> Iterator[str]:
    """Yield the dotted key of each text inside nested dicts and lists that holds a password or token."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            path = f"{key}.{name}" if key else str(name)
            if isinstance(name, str) and redact(name) != name:
                yield key or "recipe"
            else:
                yield from keys_with_credentials(inner, path)
    elif isinstance(value, str):
        if redact(value) != value:
            yield key
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from keys_with_credentials(inner, f"{key}.{index}")


def _of_environment(environment: Mapping[str, str]) -> list[str]:
    """List the secrets of the environment, the longest first; a path under such a name is none."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name)}
    return sorted(
        (value for value in found if len(value) >= MIN_LENGTH and "/" not in value[:2]), key=len, reverse=True
    )

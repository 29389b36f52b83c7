"""The tokenizer of a base, and the tokens that end its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.patterns import why_slow
from qpref.policy.foreign_files import check_types, read_by_library, read_object, refuse_other_kinds
from qpref.policy.model_config import MAX_VOCABULARY
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BIG_TABLES = frozenset({"vocab", "merges", "added_tokens"})


def load_tokenizer(model: ModelSection, base: BaseFolder) -> Any:
    """Load the base's tokenizer, or the one that the recipe names.

    Raises:
        PolicyError: transformers can't load it.
    """
    return _load(model.tokenizer or str(base.path))


def tokenizer_difference(tokenizer: Any, folder: Path) -> str | None:
    """Name the part in which the tokenizer in a folder differs from `tokenizer`; None where they are the same.

    Raises:
        PolicyError: transformers can't load it.
    """
    other = _load(str(folder))
    if other.chat_template != tokenizer.chat_template:
        return "chat template"
    same = _ids(other) == _ids(tokenizer) and _rules(other) == _rules(tokenizer)
    return None if same else "tokenizer"


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash a tokenizer's vocabulary, first and last token and chat template, alike in all versions of transformers."""
    vocabulary, *ends = _ids(tokenizer)
    content = repr([sorted((index, token) for token, index in vocabulary.items()), *ends, tokenizer.chat_template])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _ids(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.bos_token, tokenizer.eos_token


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Describe how a fast tokenizer splits and joins texts; the padding and truncation of its last call don't count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}


def _load(source: str) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        _check_files(Path(source))
    with read_by_library(source, "no tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("a text", add_special_tokens=True)
    if not tokenizer.get_vocab():
        raise PolicyError(
            f"{source}: its tokenizer has no tokens, as without tokenizer.json",
            "copy the tokenizer's files to the base, or name them in [model] tokenizer",
        )
    return tokenizer


def stop_tokens(base: BaseFolder) -> list[int]:
    """Read the token ids that end generation by the base's own settings.

    Raises:
        PolicyError: the settings cannot be read.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = base.path / name
        if path.exists():
            values = read_object(path)
            check_types(path, values, {"eos_token_id": ("a token id, or a list of them", _are_token_ids)})
            value = values.get("eos_token_id")
            found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def _are_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < MAX_VOCABULARY for each in ids)


def _check_files(folder: Path) -> None:
    """Check a tokenizer's files before transformers reads them.

    Raises:
        PolicyError: one is no regular file or no JSON object, or splits text by a pattern that can take for ever.
    """
    refuse_other_kinds(folder)
    for name in JSON_FILES:
        path = folder / name
        if path.exists():
            values = read_object(path)
            for pattern in _patterns(values):
                if reason := why_slow(pattern, of_tokenizer=True):
                    raise PolicyError(f"{path}: the pattern {pattern[:60]!r} is refused: {reason}")


def _patterns(value: object) -> Iterator[str]:
    """Yield the regular expressions of a tokenizer.json: each is the text under a key \"Regex\"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex" and isinstance(inner, str):
                yield inner
            elif key not in BIG_TABLES:
                yield from _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)

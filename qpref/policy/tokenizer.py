"""The tokenizer of a base, and the tokens that end its answers."""

from __future__ import annotations

import json
from typing import Any

from qpref.errors import PolicyError
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection


def load_tokenizer(model: ModelSection, base: BaseFolder) -> Any:
    """Load the base's tokenizer, or the one that the recipe names.

    Raises:
        PolicyError: transformers can't load it.
    """
    from transformers import AutoTokenizer

    source = model.tokenizer or str(base.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise PolicyError(f"{source}: no tokenizer that transformers can load: {error}") from error
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
        try:
            value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise PolicyError(f"{path}: not a JSON object: {error}") from None
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found

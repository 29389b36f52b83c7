"""Control tokens, which end turns and name roles: only templates may write them, texts with one are refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.example_rows import RefusedRowError


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """A tokenizer's special tokens and stop tokens.

    Attributes:
        pattern: matches their texts, the longest first.
        ids: their ids, without the unknown token, which any text may contain.
    """

    tokenizer: Any
    pattern: re.Pattern[str]
    ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, stop_tokens: Iterable[int]) -> ControlTokens:
        """Collect the control tokens of a tokenizer."""
        added = tokenizer.added_tokens_decoder
        texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        texts |= {added[token].content for token in stop_tokens if token in added}
        pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
        ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(texts))) - {tokenizer.unk_token_id}
        return cls(tokenizer, pattern, ids)

    def refuse_in_texts(self, texts: Iterable[str]) -> None:
        """Refuse texts of the data that contain a control token.

        Raises:
            RefusedRowError: one does.
        """
        for text in texts:
            if found := self.pattern.search(text):
                raise RefusedRowError("control_token", f"the text holds the control token {found[0]}")

    def refuse_normalized(self, text: str, ids: Sequence[int]) -> None:
        """Refuse control tokens that only appear through the tokenizer's Unicode normalization.

        Args:
            text: rendered text; the control tokens written in it are the template's.
            ids: its token ids.

        Raises:
            RefusedRowError: the ids have more control tokens than the text.
        """
        found = Counter({token: ids.count(token) for token in self.ids.intersection(ids)})
        if found.total() > len(written := self.pattern.findall(text)):
            rest = found - Counter(self.tokenizer.convert_tokens_to_ids(written))
            name = self.tokenizer.convert_ids_to_tokens(next(iter(rest)))
            raise RefusedRowError("control_token", f"the tokenizer normalizes text to the control token {name}")

    def last_start(self, text: str) -> int:
        """Return the offset of the last control token in a text; 0 if it has none."""
        return max((match.start() for match in self.pattern.finditer(text)), default=0)

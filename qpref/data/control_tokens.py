"""Control tokens: they end turns and tell whose turn it is, so they come from templates alone and never from a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.example_rows import RefusedRowError


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """A tokenizer's special tokens, and those that generation stops at.

    Attributes:
        pattern: finds their texts, the longest first.
        ids: without that of unknown text, which any text may hold.
    """

    tokenizer: Any
    pattern: re.Pattern[str]
    ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, stop_tokens: Iterable[int]) -> ControlTokens:
        added = tokenizer.added_tokens_decoder
        texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        texts |= {added[token].content for token in stop_tokens if token in added}
        pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
        ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(texts))) - {tokenizer.unk_token_id}
        return cls(tokenizer, pattern, ids)

    def refuse_typed(self, texts: Iterable[str]) -> None:
        """
        Raises:
            RefusedRowError: a text of the data holds a control token.
        """
        for text in texts:
            if found := self.pattern.search(text):
                raise RefusedRowError("control_token", f"the text holds the control token {found[0]}")

    def refuse_hidden(self, text: str, ids: Sequence[int]) -> None:
        """Refuse a control token that only the tokenizer's normalizing makes of a text.

        Args:
            text: a rendering, all of whose written control tokens are the template's.
            ids: its tokens.

        Raises:
            RefusedRowError: there are more control tokens than are written.
        """
        found = [token for token in ids if token in self.ids]
        if len(found) > len(written := self.pattern.findall(text)):
            rest = Counter(found) - Counter(self.tokenizer.convert_tokens_to_ids(written))
            name = self.tokenizer.convert_ids_to_tokens(next(iter(rest)))
            raise RefusedRowError("control_token", f"the tokenizer makes the control token {name} of the text")

    def last_in(self, text: str) -> int:
        """The character at which a text's last control token starts; 0 where it has none."""
        return max((match.start() for match in self.pattern.finditer(text)), default=0)

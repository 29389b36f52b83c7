"""Characters of a text that tests of characters look at; core and checks share the work of finding them."""

from __future__ import annotations

from functools import lru_cache

_PLAIN = bytes(code for code in range(127) if code >= 32 or code in b"\t\n\r")


@lru_cache(maxsize=8)
def odd_characters(text: str) -> str:
    """Return a text's characters that aren't plain ASCII, in order: few, as a rule, so that patterns are fast on them.

    Plain are the printable characters, tab, newline and carriage return. Half surrogate pairs are odd characters too.
    """
    return text.encode("utf-8", "surrogatepass").translate(None, _PLAIN).decode("utf-8", "surrogatepass")

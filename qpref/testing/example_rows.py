"""Examples that a validator is checked with: pairs and single completions as public data have them."""

from __future__ import annotations

from collections.abc import Iterator

from qpref.hooks.types import Split
from qpref.records import Message, PreferencePair, Source, UnpairedExample

SplitExample = tuple[PreferencePair | UnpairedExample, Split]
_TEXTS = (
    "What is the capital of France?",
    "Größe, naïve, Ærø: wie heißt das?",
    "日本語で答えてください。",
    "اكتب جملة قصيرة.",
    "😀 <b>bold</b> &amp; http://example.org/?q=1 \t\r\n```python\nprint(1)\n```",
    "one two three " * 200,
    "?",
)
_TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def examples() -> list[SplitExample]:
    """Return fresh examples in the order of a run: held-out ones, then training ones, from two files."""
    return list(_examples())


def pairs_alone() -> list[SplitExample]:
    """Return the pairs among the examples."""
    return [one for one in _examples() if isinstance(one[0], PreferencePair)]


def completions_alone() -> list[SplitExample]:
    """Return the single completions among the examples."""
    return [one for one in _examples() if isinstance(one[0], UnpairedExample)]


def _examples() -> Iterator[SplitExample]:
    splits: tuple[tuple[Split, str], ...] = (("heldout", "heldout.jsonl"), ("train", "train.jsonl"))
    for split, path in splits:
        line = 0
        for number, text in enumerate(_TEXTS):
            line += 1
            yield _pair(text, number, Source(path=path, line=line)), split
        line += 1
        for number in range(3):  # the pairs of one ranked row share its source
            yield _pair("Rank these.", number, Source(path=path, line=line), number), split
        for number, text in enumerate(_TEXTS):
            line += 1
            yield _completion(text, number, Source(path=path, line=line)), split
        for number in range(2):  # the same row again, as files have it
            line += 1
            yield _pair(_TEXTS[0], number, Source(path=path, line=line)), split


def _turns(text: str, variant: int) -> tuple[Message, ...]:
    if variant % 3 == 1:
        return (Message(role="system", content="Be brief."), Message(role="user", content=text))
    if variant % 3 == 2:
        calls = [{"type": "function", "function": {"name": "find", "arguments": {"q": [text]}}}]
        return (
            Message(role="user", content="Hello"),
            Message(role="assistant", content="", extra={"tool_calls": calls}),
            Message(role="user", content=text),
        )
    return (Message(role="user", content=text),)


def _pair(text: str, variant: int, source: Source, number: int = 0) -> PreferencePair:
    return PreferencePair(
        prompt=_turns(text, variant),
        chosen=(Message(role="assistant", content=f"An answer to {text}"),),
        rejected=(Message(role="assistant", content="I don't know." * (variant + 1)),),
        tools=(_TOOL,) if variant % 3 == 2 else (),
        margin=0.5 * variant,
        number=number,
        source=source,
    )


def _completion(text: str, variant: int, source: Source) -> UnpairedExample:
    return UnpairedExample(
        prompt=_turns(text, variant),
        completion=(Message(role="assistant", content=f"A single answer to {text}"),),
        label=variant % 2 == 0,
        source=source,
    )


def long_examples(count: int, num_characters: int) -> Iterator[SplitExample]:
    """Yield training pairs with long texts, each of which is made when it is asked for, and none of which repeats."""
    for line in range(1, count + 1):
        word = f"{line:x}z "
        text = word * (num_characters // len(word))
        yield _pair(text, 0, Source(path="long.jsonl", line=line)), "train"

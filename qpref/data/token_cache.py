"""Token ids on disk, by content: a row that was tokenized once, by this tokenizer and template, is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref import fsio, shards
from qpref.data.example_rows import ExampleRow, responses_of
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DiskError
from qpref.installed import version_of
from qpref.records import Finding, Message, PreferencePair, TokenizedExample
from qpref.shards import KEY_BYTES, ShardStore

log = logging.getLogger("qpref")

FORMAT = 2
"""Part of every key: raise it when the same row is tokenized differently."""
ROWS_AT_ONCE = 256
LIMIT_BYTES = 5 * 2**30
"""What all shards may take together, unless QPREF_TOKEN_CACHE_BYTES says otherwise."""


def root() -> Path:
    return fsio.cache_folder() / "tokens"


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Tokenizes as its tokenizer does, and remembers the rows of which there was nothing to warn."""

    tokenizer: PairTokenizer
    store: ShardStore

    @classmethod
    def open(cls, tokenizer: PairTokenizer) -> TokenCache | None:
        """The cache of a tokenizer; None where the disk has no place, or where what the tokenizer does isn't known."""
        backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
        template = tokenizer.template and str(tokenizer.tokenizer.chat_template)
        if backend is None or (template and "strftime_now" in template):
            return None  # a template that writes the date gives other tokens tomorrow
        versions = [version_of(name) for name in ("transformers", "tokenizers", "jinja2")]
        if None in versions:
            return None
        decisive = [
            FORMAT,
            backend.to_str(),
            template,
            tokenizer.tokenizer.special_tokens_map,
            tokenizer.stop_tokens,
            tokenizer.prefix,
            versions,
        ]
        folder = root() / _hash(decisive).hex()
        try:
            shards.shrink(root(), shards.size_limit("QPREF_TOKEN_CACHE_BYTES", LIMIT_BYTES))
            return cls(tokenizer, ShardStore.open(folder, uuid.uuid4().hex, loss_level=logging.DEBUG))
        except DiskError as error:
            log.warning("token ids are not cached: %s", error.what)
            return None

    def tokenize(
        self, rows: Iterable[ExampleRow], max_prompt_length: int | None = None
    ) -> Iterator[TokenizedExample | Finding]:
        """As `PairTokenizer.tokenize`."""
        try:
            for some in _batched(itertools.groupby(rows, key=lambda row: row.source)):
                yield from self._tokenize(some, max_prompt_length)
        finally:
            self.store.close()

    def _tokenize(self, some: Sequence[list[ExampleRow]], limit: int | None) -> Iterator[TokenizedExample | Finding]:
        """Rows that came from one place are tokenized together or not at all."""
        keys = [[_key(row, limit) for row in together] for together in some]
        known = [all(key in self.store for key in each) for each in keys]
        missing = [row for together, is_known in zip(some, known, strict=True) if not is_known for row in together]
        fresh = itertools.groupby(self.tokenizer.tokenize(missing, limit), key=lambda one: one.source)
        new: dict[bytes, bytes] = {}
        for together, own_keys, is_known in zip(some, keys, known, strict=True):
            if is_known:
                yield from (self._read(row, key) for row, key in zip(together, own_keys, strict=True))
                continue
            answers = list(next(fresh)[1])  # of each place there is one, or why there is none
            examples = [one for one in answers if isinstance(one, TokenizedExample)]
            if len(examples) == len(answers) == len(together):
                new |= {key: _content(example) for key, example in zip(own_keys, examples, strict=True)}
            yield from answers
        self.store.add(new)

    def _read(self, row: ExampleRow, key: bytes) -> TokenizedExample:
        words = array("i")
        words.frombytes(self.store.get(key) or b"")
        prompt_cut, count = words[:2]
        lengths = words[2 : 2 + count]
        ends = list(itertools.accumulate(lengths, initial=2 + count))
        prompt, *branches = (words[start:end] for start, end in itertools.pairwise(ends))
        label, margin = (None, row.margin) if isinstance(row, PreferencePair) else (row.label, 0.0)
        return TokenizedExample(
            prompt=prompt,
            branches=tuple(branches),
            truncated=(False,) * len(branches),
            prompt_cut=bool(prompt_cut),
            weight=row.weight,
            margin=margin,
            label=label,
            number=row.number,
            source=row.source,
        )


def _content(example: TokenizedExample) -> bytes:
    """An example's ids as little 4-byte words: whether the prompt is cut, the number of parts, their lengths, they."""
    parts = [example.prompt, *example.branches]
    head = array("i", [example.prompt_cut, len(parts), *map(len, parts)])
    return b"".join(part.tobytes() for part in (head, *parts))


def _key(row: ExampleRow, limit: int | None) -> bytes:
    """Of all that decides a row's token ids."""
    sides = [[_plain(message) for message in turns] for turns in (row.prompt, *responses_of(row))]
    return _hash([limit, sides, [dict(tool) for tool in row.tools]])


def _plain(message: Message) -> list[object]:
    return [message.role, message.content, dict(message.extra)]


def _hash(value: object) -> bytes:
    # In the order of the keys, which templates render.
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=KEY_BYTES).digest()


def _batched(groups: Iterable[tuple[object, Iterable[ExampleRow]]]) -> Iterator[list[list[ExampleRow]]]:
    """Some hundred rows at once, those of one place in one list."""
    some: list[list[ExampleRow]] = []
    for _, together in groups:
        some.append(list(together))
        if len(some) == ROWS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some

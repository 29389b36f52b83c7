"""Cache of token ids on disk, keyed by the row's content, the tokenizer and its template."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qpref import fsio, shards
from qpref.data.example_rows import ExampleRow, responses_of, tokenized_row
from qpref.data.masking import NO_MASKS, Masking
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DiskError
from qpref.installed import version_of
from qpref.records import Finding, Message, TokenizedExample
from qpref.shards import KEY_BYTES, ShardStore

log = logging.getLogger("qpref")

FORMAT = 3
"""Version of the tokenization, part of the folder's name: raise it when the same row gets different ids."""
ROWS_AT_ONCE = 256
LIMIT_BYTES = 5 * 2**30
"""Maximum size of all shards, unless $QPREF_TOKEN_CACHE_BYTES sets another."""


def root() -> Path:
    """Return the folder of all token caches."""
    return fsio.cache_folder() / "tokens"


def folder_of(tokenizer: PairTokenizer) -> Path | None:
    """Return the folder of a tokenizer's cache; None where its output can't be keyed by content."""
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
    return root() / _hash(decisive).hex()


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Tokenize as its tokenizer does; rows without findings are cached."""

    tokenizer: PairTokenizer
    store: ShardStore

    @classmethod
    def open(cls, tokenizer: PairTokenizer) -> TokenCache | None:
        """Open the cache of a tokenizer; None where the disk refuses, or where its output can't be keyed by content."""
        if (folder := folder_of(tokenizer)) is None:
            return None
        try:
            shards.shrink(root(), shards.size_limit("QPREF_TOKEN_CACHE_BYTES", LIMIT_BYTES))
            return cls(tokenizer, ShardStore.open(folder, uuid.uuid4().hex, loss_level=logging.DEBUG))
        except DiskError as error:
            fsio.warn_unwritable("token ids are not cached", error)
            return None

    def tokenize(
        self, rows: Iterable[ExampleRow], max_prompt_length: int | None = None
    ) -> Iterator[TokenizedExample | Finding]:
        """Tokenize rows, with the interface of `PairTokenizer.tokenize`."""
        try:
            for batch in _batched(itertools.groupby(rows, key=lambda row: row.source)):
                yield from self._tokenize(batch, max_prompt_length)
        finally:
            self.store.close()

    def _tokenize(self, batch: Sequence[list[ExampleRow]], limit: int | None) -> Iterator[TokenizedExample | Finding]:
        """Tokenize a batch of sources; the examples of one source are all read from the cache, or all computed."""
        keys = [[_key(row, limit, self.tokenizer.masking) for row in together] for together in batch]
        known = [self._known(together, own_keys) for together, own_keys in zip(batch, keys, strict=True)]
        missing = [row for together, found in zip(batch, known, strict=True) if found is None for row in together]
        computed = itertools.groupby(self.tokenizer.tokenize(missing, limit), key=lambda one: one.source)
        new: dict[bytes, bytes] = {}
        for together, own_keys, found in zip(batch, keys, known, strict=True):
            if found is not None:
                yield from found
                continue
            results = list(next(computed)[1])  # each source has at least one example or finding
            examples = [one for one in results if isinstance(one, TokenizedExample)]
            if len(examples) == len(results) == len(together):
                new |= {key: _content(example) for key, example in zip(own_keys, examples, strict=True)}
            yield from results
        self.store.add(new)

    def _known(self, rows: Sequence[ExampleRow], keys: Sequence[bytes]) -> list[TokenizedExample] | None:
        """Read the examples of one source; None unless the cache has all of them."""
        found: list[TokenizedExample] = []
        for row, key in zip(rows, keys, strict=True):
            if (example := _read(row, self.store.get(key), self.tokenizer.masking)) is None:
                return None
            found.append(example)
        return found


def _read(row: ExampleRow, content: bytes | None, masking: Masking) -> TokenizedExample | None:
    """Read an example from its record; None without one, and for a record that `_content` has not written, since others
    may write to a shared cache."""
    words = array("i", content or b"")
    num_branches = len(responses_of(row))
    count = words[1] if len(words) > 1 else 0
    if count != 1 + num_branches and not (count == 1 + 2 * num_branches and _may_be_masked(row, masking)):
        return None
    lengths = words[2 : 2 + count]
    if len(lengths) != count or min(words) < 0 or 0 in lengths or 2 + count + sum(lengths) != len(words):
        return None
    ends = list(itertools.accumulate(lengths, initial=2 + count))
    prompt, *rest = (words[start:end] for start, end in itertools.pairwise(ends))
    branches, masks = rest[:num_branches], rest[num_branches:]
    if masks and (list(map(len, masks)) != list(map(len, branches)) or not all(map(any, masks))):
        return None
    example = tokenized_row(row, prompt, branches, prompt_cut=bool(words[0]))
    return replace(example, masks=tuple(bytes(map(bool, mask)) for mask in masks), scores_masked=masking.scores_masked)


def _content(example: TokenizedExample) -> bytes:
    """Encode an example's ids as 4-byte words: prompt_cut, number of parts, length of each part, the parts.

    Parts are the prompt, the branches and, where tokens are masked, the masks."""
    parts = [example.prompt, *example.branches, *(array("i", list(mask)) for mask in example.masks)]
    head = array("i", [example.prompt_cut, len(parts), *map(len, parts)])
    return b"".join(part.tobytes() for part in (head, *parts))


def _key(row: ExampleRow, limit: int | None, masking: Masking = NO_MASKS) -> bytes:
    """Hash everything that decides a row's token ids and masks."""
    sides = [[_plain(message) for message in turns] for turns in (row.prompt, *responses_of(row))]
    masks: list[object] = []
    if _may_be_masked(row, masking):
        masks = [[turns[0].masked for turns in responses_of(row)], [each.pattern for each in masking.patterns]]
    return _hash([limit, sides, [dict(tool) for tool in row.tools], *masks])


def _may_be_masked(row: ExampleRow, masking: Masking) -> bool:
    return any(masking.applies_to(turns[0]) for turns in responses_of(row))


def _plain(message: Message) -> list[object]:
    return [message.role, message.content, dict(message.extra)]


def _hash(value: object) -> bytes:
    # Keys stay in their order, since templates render them in it.
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=KEY_BYTES).digest()


def _batched(groups: Iterable[tuple[object, Iterable[ExampleRow]]]) -> Iterator[list[list[ExampleRow]]]:
    """Collect the rows of each source in a list, and these lists in batches of ROWS_AT_ONCE."""
    batch: list[list[ExampleRow]] = []
    for _, together in groups:
        batch.append(list(together))
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch

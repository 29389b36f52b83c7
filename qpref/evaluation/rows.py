"""The pairs that models are compared on: read, cut to a number, freed of what can't be compared, and held against the
prompts that were trained on."""

from __future__ import annotations

import logging
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref.data.check import CheckedFile, read_rows
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length
from qpref.errors import DataError, RecipeError
from qpref.hooks.manager import READER, Loaded, PluginHost
from qpref.recipe import DataSection
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many of the evaluated prompts stand in some training data.

    Attributes:
        exact: word for word.
        normalized: in their case, white space and Unicode form alone different, the exact ones included.
        pairs: the numbers of those pairs, by `normalized`.
    """

    exact: int
    normalized: int
    pairs: frozenset[int]


def read_pairs(path: Path, reader: str | None = None) -> list[PreferencePair]:
    """All pairs of a file, in its order.

    Raises:
        DataError: it cannot be read, some row is no pair, or there is none.
    """
    checked = _open(path, reader)
    unpaired = [finding for finding in checked.report.findings if finding.code == "unpaired"]
    if unpaired:
        raise DataError(
            f"{unpaired[0].source}: a single completion with a label ({len(unpaired)} such rows of "
            f"{checked.report.read}); accuracy and margins compare a chosen with a rejected response",
            "evaluate on pairs: rows of prompt, chosen, rejected",
        )
    checked.report.stop_on_errors(allowed_share=0.0)
    return [row for row in checked.rows() if isinstance(row, PreferencePair)]


def training_prompts(data: DataSection) -> list[str] | None:
    """The prompts that a run was trained on, as texts; None where its data aren't there any more."""
    path = Path(data.train)
    if not path.is_file():
        return None
    return [text_of(row.prompt) for row in _open(path, data.reader, pairs_alone=False).rows()]


def _open(path: Path, reader: str | None, pairs_alone: bool = True) -> CheckedFile:
    """The one place where evaluation reads a data file."""
    return read_rows(path, reader_for(path, reader), (), pairs_alone)


def reader_for(path: Path, named: str | None = None) -> Loaded:
    """The reader of that name, or the one whose name is the file's suffix.

    Raises:
        RecipeError: there is none.
    """
    host = PluginHost()
    known = sorted({offer.name for offer in host.offers if offer.kind == READER.prefix}, key=len)
    fitting = [name for name in known if path.name.lower().endswith(f".{name}")]
    if named is None and not fitting:
        raise RecipeError(f"{path}: no reader for this suffix; installed: {', '.join(f'.{name}' for name in known)}")
    return host.load(READER, named or fitting[-1])


def sample_pairs(pairs: Sequence[PreferencePair], most: int | None, seed: int) -> list[PreferencePair]:
    """At most so many of the pairs, at random but in their order."""
    if most is None or most >= len(pairs):
        return list(pairs)
    return [pairs[place] for place in sorted(random.Random(seed).sample(range(len(pairs)), most))]


def overlap(pairs: Sequence[PreferencePair], trained_on: Iterable[str]) -> Overlap:
    """Which pairs have a prompt that was trained on: the whole prompt, all its turns."""
    exact = set(trained_on)
    normalized = {normalize(text) for text in exact}
    texts = [text_of(pair.prompt) for pair in pairs]
    found = frozenset(place for place, text in enumerate(texts) if normalize(text) in normalized)
    return Overlap(sum(text in exact for text in texts), len(found), found)


def text_of(prompt: Sequence[Message]) -> str:
    """A whole prompt as one text; a lone user turn is its words, as in a row that gives it as a text."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def normalize(text: str) -> str:
    """What is left of a text without case, Unicode form and white space's kind and amount."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PairTokenizer, data: DataSection
) -> tuple[dict[Source, TokenizedExample], list[Finding | Source]]:
    """The pairs as one model meets them, by place, and those that it can't be asked about: refused by its template or
    tokenizer, or longer than `data` allows."""
    kept: dict[Source, TokenizedExample] = {}
    left_out: list[Finding | Source] = []
    dropping = data.model_copy(update={"on_overflow": "drop"})
    for example in tokenizer.tokenize(pairs):
        fitted = example if isinstance(example, Finding) else fit_length(example, dropping)
        if isinstance(fitted, TokenizedExample):
            kept[fitted.source] = fitted
        else:
            left_out.append(fitted if isinstance(fitted, Finding) else example.source)
    return kept, left_out


def same_for_all(tokenized: Sequence[dict[Source, TokenizedExample]], pairs: Sequence[PreferencePair]) -> list[int]:
    """The numbers of the pairs that every model can be asked about.

    Raises:
        DataError: there is none.
    """
    kept = [place for place, pair in enumerate(pairs) if all(pair.source in examples for examples in tokenized)]
    if not kept:
        raise DataError(
            f"{pairs[0].source.path}: no pair is left that every model can be asked about",
            "they are longer than --max-length allows, or a chat template refuses them",
        )
    return kept

"""The pairs that models are compared on: read, cut to a number, freed of what can't be compared, and held against the
prompts that were trained on."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.check import CheckedData, CheckedRows, check_data
from qpref.data.reload import reload_data
from qpref.data.split import HeldOutShare
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.errors import DataError
from qpref.recipe.data_section import DataSection
from qpref.recipe.resolve import make_data_plan, make_plan
from qpref.records import Finding, Message, PreferencePair, TokenizedExample, UnpairedExample


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


def data_at(location: str) -> CheckedRows:
    """The rows of a file, or of another place that a reader knows.

    Raises:
        RecipeError: no reader fits.
        DataError: it cannot be read.
    """
    return check_data(make_data_plan(location).sources, (), pairs_only=False).train


def data_of_run(document: Mapping[str, Any], *, heldout_alone: bool = False) -> CheckedData:
    """The rows that a run trains on and holds out, by its recipe; where the metrics went is of no interest here.

    Args:
        heldout_alone: read no training data, where they aren't needed for the held-out ones.

    Raises:
        RecipeError, PluginError: the recipe names what isn't installed.
        DataError: the data cannot be read.
    """
    plan = make_plan({**document, "sinks": []})
    data, seed = plan.recipe.data, plan.recipe.train.seed
    share = HeldOutShare(data.heldout_share, seed) if data.heldout_share else None
    sources = (plan.of_heldout_alone() if heldout_alone else plan).sources
    return check_data(sources, (), pairs_only=False, share=share)


def heldout_has_changed(
    document: Mapping[str, Any], fingerprints: Mapping[str, str], tokenizer: PairTokenizer
) -> bool | None:
    """Whether a run held other data out than its recipe names today; None where that can't be told.

    Args:
        fingerprints: as run.json has them.

    Raises:
        DataError: the data cannot be read, or training would refuse them.
    """
    plan = make_plan({**document, "sinks": []})
    return reload_data(plan, tokenizer).has_changed(plan, fingerprints)


def pairs_of(checked: CheckedRows, skip_bad: float = 0.0) -> list[PreferencePair]:
    """All pairs, in their order.

    Raises:
        DataError: some row is no pair, more rows than allowed are bad, or there is none.
    """
    checked.report.stop_on_errors(skip_bad)
    rows = list(checked.rows())
    unpaired = [row for row in rows if isinstance(row, UnpairedExample)]
    if unpaired:
        raise DataError(
            f"{unpaired[0].source}: a single completion with a label ({len(unpaired)} such rows of {len(rows)}); "
            "accuracy and margins compare a chosen with a rejected response",
            "evaluate on pairs: rows of prompt, chosen, rejected",
        )
    if not rows:
        raise DataError(f"{checked.report.label}: holds no pair")
    return [row for row in rows if isinstance(row, PreferencePair)]


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
) -> tuple[dict[int, TokenizedExample], list[Finding]]:
    """The pairs as one model meets them, by their numbers, and why it can't be asked about the others: its template or
    tokenizer refuses them, or they are longer than `data` allows and it doesn't have them cut."""
    kept: dict[int, TokenizedExample] = {}
    refused: list[Finding] = []
    limits = data if data.on_overflow == "truncate" else data.model_copy(update={"on_overflow": "error"})
    found = tokenizer.tokenize(pairs, prompt_limit(limits))
    ends = (one for one in found if isinstance(one, TokenizedExample) or one.severity == "error")
    for number, (_, example) in enumerate(zip(pairs, ends, strict=True)):
        fitted = example if isinstance(example, Finding) else fit_length(example, limits)
        assert fitted is not None
        if isinstance(fitted, Finding):
            refused.append(fitted)
        else:
            kept[number] = fitted
    return kept, refused


def same_for_all(tokenized: Sequence[Mapping[int, TokenizedExample]], pairs: Sequence[PreferencePair]) -> list[int]:
    """The numbers of the pairs that every model can be asked about.

    Raises:
        DataError: there is none.
    """
    kept = [number for number in range(len(pairs)) if all(number in examples for examples in tokenized)]
    if not kept:
        raise DataError(
            f"{pairs[0].source.path}: no pair is left that every model can be asked about",
            "they are longer than --max-length allows, or a chat template refuses them",
        )
    return kept

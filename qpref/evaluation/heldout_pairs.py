"""The pairs that models are compared on: read, sampled, tokenized for each model, and checked for overlap with the
training data."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpref.data.check import CheckedData, CheckedRows, check_data
from qpref.data.reload import reload_data
from qpref.data.split import HeldOutShare
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.errors import DataError
from qpref.recipe.data_section import DataSection
from qpref.recipe.reopen import RecordedRun, reopen_plan
from qpref.recipe.resolve import make_data_plan
from qpref.records import Finding, Message, PreferencePair, TokenizedExample, UnpairedExample


@dataclass(frozen=True, slots=True)
class Overlap:
    """Evaluated prompts that also occur in some training data.

    Attributes:
        exact: number of identical prompts.
        normalized: number of prompts equal up to case, white space and Unicode form, the identical ones included.
        pairs: indices of the pairs counted by `normalized`.
    """

    exact: int
    normalized: int
    pairs: frozenset[int]


def data_at(location: str) -> CheckedRows:
    """Read the rows of a file or any other location that a reader supports.

    Raises:
        RecipeError: no reader fits.
        DataError: it cannot be read.
    """
    return check_data(make_data_plan(location).sources, (), pairs_only=False).train


def data_of_run(run: RecordedRun, *, heldout_alone: bool = False) -> CheckedData:
    """Read a run's training and held-out rows by its recipe, including rows that its checks refuse.

    Args:
        heldout_alone: skip the training data unless the held-out rows are split from them.

    Raises:
        RecipeError: a reader isn't installed.
        PluginError: a reader is broken.
        DataError: the data cannot be read.
    """
    plan = reopen_plan(run, heldout_alone=heldout_alone, checks=False)
    data, seed = plan.recipe.data, plan.recipe.train.seed
    share = HeldOutShare(data.heldout_share, seed) if data.heldout_share else None
    return check_data(plan.sources, (), pairs_only=False, share=share)


def heldout_has_changed(run: RecordedRun, tokenizer: PairTokenizer) -> bool | None:
    """Return whether a run's held-out data have changed since training; None where that can't be determined.

    Raises:
        RecipeError: a reader, or a check that refused rows, isn't installed.
        DataError: the data cannot be read, or training would refuse them.
    """
    plan = reopen_plan(run, heldout_alone=True)
    return reload_data(plan, tokenizer).has_changed(plan, run.facts["fingerprints"])


def pairs_of(checked: CheckedRows, skip_bad: float = 0.0) -> list[PreferencePair]:
    """List all pairs, in file order.

    Raises:
        DataError: a row is no pair, more rows than allowed are bad, or there are no rows.
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
        raise DataError(f"{checked.report.label}: has no pairs")
    return [row for row in rows if isinstance(row, PreferencePair)]


def sample_pairs(pairs: Sequence[PreferencePair], most: int | None, seed: int) -> list[PreferencePair]:
    """Draw a random sample of at most `most` pairs, kept in their order."""
    if most is None or most >= len(pairs):
        return list(pairs)
    return [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), most))]


def overlap(pairs: Sequence[PreferencePair], trained_on: Iterable[str]) -> Overlap:
    """Find the pairs whose whole prompt, all turns, is in the training data.

    Args:
        trained_on: the training prompts, by `text_of`.
    """
    exact = set(trained_on)
    normalized = {normalize(text) for text in exact}
    texts = [text_of(pair.prompt) for pair in pairs]
    found = frozenset(index for index, text in enumerate(texts) if normalize(text) in normalized)
    return Overlap(sum(text in exact for text in texts), len(found), found)


def text_of(prompt: Sequence[Message]) -> str:
    """Join a prompt's turns into one text; a single user turn is its bare content, as in a row with a plain string."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def normalize(text: str) -> str:
    """Normalize case, Unicode form (NFKC) and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PairTokenizer, data: DataSection
) -> tuple[dict[int, TokenizedExample], list[Finding]]:
    """Tokenize the pairs for one model; return the examples by pair index, and the findings on refused pairs.

    A pair is refused by the model's chat template or tokenizer, or where it exceeds the length limits of `data` and
    `data.on_overflow` isn't truncate.
    """
    kept: dict[int, TokenizedExample] = {}
    refused: list[Finding] = []
    limits = data if data.on_overflow == "truncate" else data.model_copy(update={"on_overflow": "error"})
    found = tokenizer.tokenize(pairs, prompt_limit(limits))
    ends = (one for one in found if isinstance(one, TokenizedExample) or one.severity == "error")
    for index, (_, example) in enumerate(zip(pairs, ends, strict=True)):
        fitted = example if isinstance(example, Finding) else fit_length(example, limits)
        assert fitted is not None
        if isinstance(fitted, Finding):
            refused.append(fitted)
        else:
            kept[index] = fitted
    return kept, refused


def same_for_all(tokenized: Sequence[Mapping[int, TokenizedExample]], pairs: Sequence[PreferencePair]) -> list[int]:
    """Return the indices of the pairs that every model can be scored on.

    Raises:
        DataError: no pair is left.
    """
    kept = [index for index in range(len(pairs)) if all(index in examples for examples in tokenized)]
    if not kept:
        raise DataError(
            f"{pairs[0].source.path}: no pair is left that every model can be scored on",
            "the pairs are longer than --max-length, or a chat template refuses them",
        )
    return kept

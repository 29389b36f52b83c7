"""Lengths of a plan's training data, as exactly as this machine can tell without fetching a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qpref.data.example_rows import ExampleRow, responses_of
from qpref.data.load import load_rows
from qpref.data.masking import Masking
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.errors import DataError, UnreachableDataError
from qpref.memory.demand import Workload
from qpref.memory.known_shapes import local_base
from qpref.memory.stream import Lengths
from qpref.policy.source import BaseFolder
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.choices import SourceChoice
from qpref.recipe.data_section import DataSection
from qpref.recipe.plan import Plan
from qpref.records import Finding, TokenizedExample

CHARACTERS_PER_TOKEN = 4
MOST_TOKENIZED, LONGEST_TOKENIZED = 2000, 64
"""Rows of a large file that are tokenized: an evenly spread sample, and the longest."""
ASSUMED_RESPONSES = 4
"""Responses of a list while the data can't be read; the recipe doesn't say how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedData:
    """Lengths of the training data.

    Attributes:
        origin: source of the lengths, for messages.
        lengths: lengths of all examples, or of a sample.
        longest: lengths of the longest examples, where `lengths` is a sample.
        num_examples: number of all examples; None where the file is missing.
    """

    origin: str
    lengths: list[Lengths]
    longest: list[Lengths]
    num_examples: int | None

    def with_mismatched(self) -> PlannedData:
        """Add another example's completion after each prompt, for a loss that needs mismatched completions."""
        partners = [responses for _, responses in (*self.lengths[1:], self.lengths[0])]
        pairs = zip(self.lengths, partners, strict=True)
        lengths: list[Lengths] = [(prompt, [*own, *other]) for (prompt, own), other in pairs]
        longest: list[Lengths] = [(prompt, [*own, *own]) for prompt, own in self.longest]
        return replace(self, lengths=lengths, longest=longest)

    def workload(self, batch_size: int, shared: bool) -> Workload:
        typical = Workload.of(self.lengths, batch_size, shared)
        longest = Workload.of([*self.lengths, *self.longest], batch_size, shared)
        return replace(typical, longest_lengths=longest.longest_lengths, longest=longest.longest)


def planned_data(plan: Plan) -> PlannedData:
    """Read the lengths of the training data, or take the recipe's limits where they can't be read now.

    Raises:
        DataError: the data are there and training would refuse them.
    """
    sources = [source for source in plan.sources if source.split == "train"]
    location = ", ".join(source.location for source in sources)
    if missing := [source.location for source in sources if _is_missing(source)]:
        return longest_allowed(plan, f"{missing[0]}: no such file")
    try:
        train = load_rows(replace(plan, sources=tuple(sources))).train
    except UnreachableDataError as error:
        return longest_allowed(plan, error.what)
    rows = list(train.rows())
    planned = _tokenized(plan, rows, location) or _estimated(plan.recipe.data, rows, location)
    weights = [train.weights.get(row.source.path, 1.0) for row in rows]
    if planned.num_examples is None or not train.weights:
        return planned
    return replace(planned, num_examples=round(planned.num_examples * sum(weights) / len(weights)))


def _is_missing(source: SourceChoice) -> bool:
    is_path = source.reader.record.takes != "name" and not source.location.startswith("pypi:")
    return is_path and not Path(source.location.removeprefix(f"{source.reader.record.name}:")).exists()


def longest_allowed(plan: Plan, reason: str) -> PlannedData:
    """Assume that every example has the greatest lengths that the recipe allows."""
    data = plan.recipe.data
    prompt, response = data.max_prompt_length, data.max_length - data.max_prompt_length
    kind, count = ("pair", 2) if plan.is_paired else ("completion", 1)
    kind, count = ("list", ASSUMED_RESPONSES) if plan.is_listed else (kind, count)
    lengths = f"{prompt} + {count} x {response} tokens"
    origin = f"{reason}; each {kind} is taken to be {lengths}, the longest allowed"
    return PlannedData(origin=origin, lengths=[(prompt, [response] * count)], longest=[], num_examples=None)


def _tokenized(plan: Plan, rows: list[ExampleRow], location: str) -> PlannedData | None:
    """Tokenize a sample with the base's own tokenizer; None where it isn't on this machine."""
    data = plan.recipe.data
    tokenizer = _local_tokenizer(plan)
    if tokenizer is None:
        return None
    spread = rows[:: -(-len(rows) // MOST_TOKENIZED)]
    longest = sorted(rows, key=_characters)[-LONGEST_TOKENIZED:] if len(spread) < len(rows) else []
    lengths, longest_lengths = (_lengths(tokenizer, some, data) for some in (spread, longest))
    if not lengths:
        raise DataError(f"{location}: no example is left within [data] max_length and max_prompt_length")
    kept = round(len(rows) * len(lengths) / len(spread))
    left_out = f", {len(rows) - kept} of them left out" if kept < len(rows) else ""
    sample = "" if len(spread) == len(rows) else f" (by {len(spread)} of them)"
    origin = f"{location}: {len(rows)} examples{left_out}{sample}, by the base's tokenizer"
    return PlannedData(origin=origin, lengths=lengths, longest=longest_lengths, num_examples=kept)


def _local_tokenizer(plan: Plan) -> PairTokenizer | None:
    model = plan.recipe.model
    folder = local_base(model)
    if folder is None or not (
        Path(model.tokenizer).is_dir() if model.tokenizer else (folder / "tokenizer.json").exists()
    ):
        return None
    base = BaseFolder(path=folder, weights={})
    return PairTokenizer.of(
        load_tokenizer(model, base), plan.recipe.data.template, stop_tokens(base), Masking.of(plan.recipe.data)
    )


def _lengths(tokenizer: PairTokenizer, rows: Sequence[ExampleRow], data: DataSection) -> list[Lengths]:
    """Tokenize rows and return the lengths of those that training would keep."""
    found: list[Lengths] = []
    for example in tokenizer.tokenize(rows, prompt_limit(data)):
        fitted = example if isinstance(example, Finding) else fit_length(example, data)
        if isinstance(fitted, TokenizedExample):
            found.append((len(fitted.prompt), [len(branch) for branch in fitted.branches]))
    return found


def _estimated(data: DataSection, rows: list[ExampleRow], location: str) -> PlannedData:
    """Estimate tokens from characters."""
    lengths: list[Lengths] = []
    for row in rows:
        prompt, *responses = (max(1, size // CHARACTERS_PER_TOKEN) for size in _sizes(row))
        prompt = min(prompt, data.max_prompt_length)
        lengths.append((prompt, [min(size, data.max_length - prompt) for size in responses]))
    origin = f"{location}: {len(rows)} examples; tokens estimated, {CHARACTERS_PER_TOKEN} characters each"
    return PlannedData(origin=origin, lengths=lengths, longest=[], num_examples=len(rows))


def _sizes(row: ExampleRow) -> list[int]:
    """Count characters of the prompt and of each response."""
    return [sum(len(message.content) for message in turns) for turns in (row.prompt, *responses_of(row))]


def _characters(row: ExampleRow) -> int:
    return sum(_sizes(row))

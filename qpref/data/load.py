"""A file of pairs -> tokenized examples, in two stages: what needs no model, then what needs its tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from qpref.data.check import DataReport, read_pairs
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length
from qpref.hooks.manager import Loaded
from qpref.plan import Plan
from qpref.recipe import DataSection
from qpref.records import Finding, PreferencePair, TokenizedExample

log = logging.getLogger("qpref")

CheckedPairs = tuple[list[PreferencePair], DataReport]


def load_pairs(plan: Plan) -> tuple[CheckedPairs, CheckedPairs | None]:
    """The training and held-out pairs, checked as far as that goes without a model.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows.
    """
    data = plan.recipe.data
    train = _load(Path(data.train), plan.train_reader, plan)
    if data.heldout is None or plan.heldout_reader is None:
        return train, None
    return train, _load(Path(data.heldout), plan.heldout_reader, plan)


def _load(path: Path, reader: Loaded, plan: Plan) -> CheckedPairs:
    pairs, report = read_pairs(path, reader, plan.validators)
    report.log_warnings()
    report.stop_on_errors(plan.recipe.data.skip_bad)
    return report.keep(pairs), report


def tokenize_pairs(checked: CheckedPairs, tokenizer: PairTokenizer, data: DataSection) -> list[TokenizedExample]:
    """The kept pairs as token ids, within the recipe's lengths.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows, or none is left.
    """
    pairs, report = checked
    examples: list[TokenizedExample] = []
    for example in tokenizer.tokenize(pairs):
        fitted = example if isinstance(example, Finding) else fit_length(example, data)
        if isinstance(fitted, Finding):
            report.findings.append(fitted)
        elif fitted is None:
            report.dropped += 1
        else:
            examples.append(fitted)
    report.stop_on_errors(data.skip_bad)
    num_cut = sum(any(example.truncated) for example in examples)
    if report.dropped or num_cut:
        log.info("%s: of %d pairs, %d left out and %d cut for their length", report.path, report.read, report.dropped,
                 num_cut)  # fmt: skip
    return examples


def fingerprint(examples: Sequence[TokenizedExample]) -> str:
    """SHA-256 of all that training reads of the examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((len(example.prompt), example.weight, example.margin)).encode())
        digest.update(example.prompt.tobytes())
        for branch in example.branches:
            digest.update(len(branch).to_bytes(4, "little") + branch.tobytes())
    return digest.hexdigest()

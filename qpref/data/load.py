"""A file of rows -> tokenized examples, in two stages: what needs no model, then what needs its tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from qpref.data.check import CheckedFile, DataReport, read_rows
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.hooks.manager import Loaded
from qpref.plan import Plan
from qpref.recipe import DataSection
from qpref.records import Finding, PreferencePair, TokenizedExample

log = logging.getLogger("qpref")


def load_rows(plan: Plan) -> tuple[CheckedFile, CheckedFile | None]:
    """The training and held-out files, checked as far as that goes without a model.

    Under a loss of single completions each pair becomes two of them.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows.
    """
    data = plan.recipe.data
    train = _load(Path(data.train), plan.train_reader, plan)
    if data.heldout is None or plan.heldout_reader is None:
        return train, None
    return train, _load(Path(data.heldout), plan.heldout_reader, plan)


def _load(path: Path, reader: Loaded, plan: Plan) -> CheckedFile:
    checked = read_rows(path, reader, plan.validators, plan.is_paired)
    checked.report.log_warnings()
    checked.report.stop_on_errors(plan.recipe.data.skip_bad)
    if not plan.is_paired:
        _explain_singles(checked, plan)
        checked.as_singles = True
    return checked


def _explain_singles(checked: CheckedFile, plan: Plan) -> None:
    pairs, margins = 0, False
    for row in checked.rows():
        if isinstance(row, PreferencePair):
            pairs += 1
            margins |= bool(row.margin)
    if pairs:
        log.info("%s: the loss '%s' is of single completions; %d pairs become %d of them, and batch_size counts those",
                 checked.path, plan.losses[0].plugin.record.name, pairs, 2 * pairs)  # fmt: skip
    if margins:
        log.warning("%s: the rows' margins have no meaning for single completions and are left out", checked.path)


def tokenize_rows(checked: CheckedFile, tokenizer: PairTokenizer, data: DataSection) -> list[TokenizedExample]:
    """The kept examples as token ids, within the recipe's lengths; their texts pass through one at a time.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows, or none is left.
    """
    report = checked.report
    examples: list[TokenizedExample] = []
    dropped = set()
    num_known = len(report.findings)
    for example in tokenizer.tokenize(checked.rows(), prompt_limit(data)):
        fitted = example if isinstance(example, Finding) else fit_length(example, data)
        if isinstance(fitted, TokenizedExample):
            examples.append(fitted)
            continue
        if fitted is not None:
            report.findings.append(fitted)
        if isinstance(example, TokenizedExample) and (fitted is None or fitted.severity == "warning"):
            dropped.add(example.source)
    contradictions = _contradictions(examples)
    report.findings += contradictions
    dropped |= {finding.source for finding in contradictions}
    report.dropped = len(dropped - report.refused)
    DataReport(report.path, findings=report.findings[num_known:]).log_warnings()
    report.stop_on_errors(data.skip_bad)
    examples = [example for example in report.keep(examples) if example.source not in dropped]
    num_cut = len({example.source for example in examples if example.prompt_cut or any(example.truncated)})
    if report.dropped or num_cut:
        log.info("%s: of %d rows, %d left out and %d cut for their length", report.path, report.read, report.dropped,
                 num_cut)  # fmt: skip
    return examples


def _contradictions(examples: Sequence[TokenizedExample]) -> list[Finding]:
    """Pairs that became completions and, cut to length, say the same with both labels."""
    findings = []
    for good, bad in itertools.pairwise(examples):
        if good.source == bad.source and good.label and not bad.label and good.branches == bad.branches:
            message = f"dropped: cut to their first {len(good.branches[0])} tokens, chosen and rejected are the same"
            findings.append(Finding(code="identical", severity="warning", message=message, source=good.source))
    return findings


def fingerprint(examples: Sequence[TokenizedExample]) -> str:
    """SHA-256 of all that training reads of the examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((len(example.prompt), example.weight, example.margin, example.label)).encode())
        digest.update(example.prompt.tobytes())
        for branch in example.branches:
            digest.update(len(branch).to_bytes(4, "little") + branch.tobytes())
    return digest.hexdigest()

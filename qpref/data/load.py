"""A recipe's data -> tokenized examples, in two stages: what needs no model, then what needs its tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence

from qpref.data.check import CheckedData, CheckedRows, check_data
from qpref.data.split import HeldOutShare, mixed
from qpref.data.token_cache import TokenCache
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.errors import DataError
from qpref.recipe.data_section import DataSection
from qpref.recipe.resolve import Plan
from qpref.records import Finding, PreferencePair, TokenizedExample

log = logging.getLogger("qpref")


def check_rows(plan: Plan) -> CheckedData:
    """All rows of the recipe's data, looked at as far as that goes without a model, and not stopped at.

    Raises:
        DataError: a source cannot be read.
    """
    data = plan.recipe.data
    share = HeldOutShare(data.heldout_share, plan.recipe.train.seed) if data.heldout_share else None
    checked = check_data(plan.sources, plan.validators, pairs_alone=plan.is_paired, share=share)
    if not plan.is_paired:
        for rows in (checked.train, checked.heldout):
            if rows is not None:
                rows.as_singles = True
    return checked


def load_rows(plan: Plan) -> CheckedData:
    """The same for a run, which bad rows stop before anything else is loaded.

    Under a loss of single completions each pair becomes two of them.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows.
    """
    checked = check_rows(plan)
    checked.report.log_warnings()
    checked.report.stop_on_errors(plan.recipe.data.skip_bad)
    for rows in (checked.train, checked.heldout):
        if rows is not None and rows.is_empty:
            raise DataError(rows.why_empty)
    if not plan.is_paired:
        _explain_singles(checked.train, plan)
    return checked


def _explain_singles(checked: CheckedRows, plan: Plan) -> None:
    pairs, margins = 0, False
    for row in checked.looked_at():
        for example in () if isinstance(row, Finding) or checked.report.leaves_out(row[0].source) else row:
            if isinstance(example, PreferencePair):
                pairs += 1
                margins |= bool(example.margin)
    label = checked.label
    if pairs:
        log.info("%s: the loss '%s' is of single completions; %d pairs become %d of them, and batch_size counts those",
                 label, plan.losses[0].plugin.record.name, pairs, 2 * pairs)  # fmt: skip
    if margins:
        log.warning("%s: the rows' margins have no meaning for single completions and are left out", label)


def tokenize_rows(
    checked: CheckedRows, tokenizer: PairTokenizer, data: DataSection, seed: int
) -> list[TokenizedExample]:
    """The kept examples as token ids, within the recipe's lengths, each as often as its source's weight says.

    Their texts pass through one at a time.

    Raises:
        DataError: rows are refused, more than `[data] skip_bad` allows, or none is left.
    """
    report = checked.report
    told, refused, dropped, num_cut = set(report.counts), report.refused, report.dropped, report.num_cut
    examples = list(tokenized(checked, tokenizer, data))
    report.log_warnings(told)
    if report.refused > refused:
        report.stop_on_errors(data.skip_bad)
    if not examples:
        raise DataError(checked.why_empty)
    if not any(example.weight for example in examples):
        raise DataError(f"{checked.label}: every row has the weight 0, so none would be learned from")
    dropped, num_cut = report.dropped - dropped, report.num_cut - num_cut
    if dropped or num_cut:
        log.info("%s: of %d rows, %d left out and %d cut for their length", checked.label, checked.read, dropped,
                 num_cut)  # fmt: skip
    return list(mixed(examples, checked.weights, seed)) if checked.split == "train" else examples


def tokenized(checked: CheckedRows, tokenizer: PairTokenizer, data: DataSection) -> Iterator[TokenizedExample]:
    """Each kept example as token ids, computed or remembered. What refuses or drops a part of a row does so to all."""
    report = checked.report
    remembering = (TokenCache.open(tokenizer) if data.cache else None) or tokenizer
    rows = remembering.tokenize(checked.rows(), prompt_limit(data))
    for source, found in itertools.groupby(rows, key=lambda one: one.source):
        fitted = [one if isinstance(one, Finding) else fit_length(one, data) for one in found]
        findings = [one for one in fitted if isinstance(one, Finding)]
        examples = [one for one in fitted if isinstance(one, TokenizedExample)]
        findings += _contradictions(examples)
        report.add(findings)
        if None in fitted or any(finding.code == "identical" for finding in findings):
            report.drop(source)
        if report.leaves_out(source):
            continue
        report.num_cut += any(example.prompt_cut or any(example.truncated) for example in examples)
        for example in examples:
            sides = ("chosen", "rejected") if example.label is None else ("completion",)
            sizes = {side: len(branch) for side, branch in zip(sides, example.branches, strict=True)}
            report.note_lengths({"prompt": len(example.prompt)} | sizes, "tokens")
        yield from examples


def _contradictions(examples: Sequence[TokenizedExample]) -> list[Finding]:
    """Pairs that became completions and, cut to length, say the same with both labels."""
    findings = []
    for good, bad in itertools.pairwise(examples):
        is_pair = good.number == bad.number and good.label and not bad.label
        if is_pair and any(good.truncated + bad.truncated) and good.branches == bad.branches:
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

"""Load a recipe's data in two stages: checked rows, which need no model, then token ids, which need its tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence

from qpref.data.check import CheckedData, CheckedRows, check_data
from qpref.data.data_report import DataReport
from qpref.data.split import HeldOutShare, resample
from qpref.data.token_cache import TokenCache
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length, prompt_limit
from qpref.errors import DataError, RecipeError
from qpref.recipe.data_section import DataSection
from qpref.recipe.plan import Plan
from qpref.records import Finding, RankedList, TokenizedExample
from qpref.rows.loss_columns import side_of

log = logging.getLogger("qpref")


def check_rows(plan: Plan) -> CheckedData:
    """Read and check all rows of the recipe's data without a model; refused rows don't stop it.

    Raises:
        DataError: a source cannot be read.
        RecipeError: a loss on lists reads a column that is about one response.
    """
    if plan.is_listed:
        _refuse_sides(plan.columns)
    data = plan.recipe.data
    share = HeldOutShare(data.heldout_share, plan.recipe.train.seed) if data.heldout_share else None
    checked = check_data(plan.sources, plan.validators, pairs_only=plan.is_paired, share=share)
    for rows in checked.splits:
        rows.as_singles, rows.as_lists = not plan.is_paired, plan.is_listed
    return checked


def load_rows(plan: Plan) -> CheckedData:
    """Read and check all rows for a run; stop on bad rows, before anything else is loaded.

    A loss on single completions splits each pair into two.

    Raises:
        DataError: more rows are refused than `[data] skip_bad` allows, or none is left.
    """
    checked = check_rows(plan)
    checked.report.log_warnings()
    checked.report.stop_on_errors(plan.recipe.data.skip_bad)
    for rows in (checked.train, checked.heldout):
        if rows is not None and rows.is_empty:
            raise DataError(rows.why_empty)
    if not plan.is_paired:
        _explain_singles(checked.train, plan)
    if plan.is_listed:
        _explain_lists(checked, plan)
    return checked


def _refuse_sides(columns: Sequence[str]) -> None:
    for name in columns:
        if side_of(name) is not None:
            raise RecipeError(
                f"[loss] a loss on lists reads the column '{name}', which is about one response, not about the list",
                "its record's columns are numbers of the whole row; the responses' scores are the need 'scores'",
            )


def _explain_singles(checked: CheckedRows, plan: Plan) -> None:
    label, pairs = checked.label, checked.count_kept(checked.pairs)
    if pairs:
        log.info("%s: the loss '%s' is on single completions: %d pairs become %d of them, which batch_size counts",
                 label, plan.losses[0].plugin.record.name, pairs, 2 * pairs)  # fmt: skip
    if checked.count_kept(checked.margins):
        log.warning("%s: the rows' margins have no meaning for single completions and are left out", label)


def _explain_lists(checked: CheckedData, plan: Plan) -> None:
    """Say which rows are lists, and of how many responses; refuse lists without scores where the loss needs them."""
    name = plan.losses[0].plugin.record.name if plan.losses else ""
    for rows in checked.splits:
        sizes: Counter[int] = Counter()
        for one in rows.rows():
            assert isinstance(one, RankedList)
            sizes[len(one.responses)] += 1
            if "scores" in plan.needs and not one.scores:
                raise DataError(
                    f"{one.source}: its responses have no scores, which the loss '{name}' needs under its options",
                    "add a column `scores` with a number for each response: docs/data.md#row-formats",
                )
        pairs, total = sizes[2], sum(sizes.values())
        lengths = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        log.info("%s: the loss '%s' is on lists: %d lists of %s responses%s; batch_size counts lists",
                 rows.label, name, total, lengths,
                 f", {pairs} of them pairs" if pairs else "")  # fmt: skip


def tokenize_rows(
    checked: CheckedRows, tokenizer: PairTokenizer, data: DataSection, seed: int
) -> list[TokenizedExample]:
    """Tokenize the kept rows within the recipe's length limits; training rows are resampled by their source's weight.

    Texts are streamed; only token ids stay in memory.

    Raises:
        DataError: more rows are refused than `[data] skip_bad` allows, or none is left.
    """
    report = checked.report
    logged, refused, dropped, num_cut = set(report.counts), report.refused, report.dropped, report.num_cut
    examples = list(tokenized(checked, tokenizer, data))
    report.log_warnings(logged)
    if report.refused > refused:
        report.stop_on_errors(data.skip_bad)
    if not examples:
        raise DataError(checked.why_empty)
    if not any(example.weight for example in examples):
        raise DataError(f"{checked.label}: every row has weight 0, so there is nothing to learn from")
    dropped, num_cut = report.dropped - dropped, report.num_cut - num_cut
    if dropped or num_cut:
        log.info("%s: of %d rows, %d dropped and %d truncated for their length", checked.label, checked.read, dropped,
                 num_cut)  # fmt: skip
    return list(resample(examples, checked.weights, seed)) if checked.split == "train" else examples


def tokenized(checked: CheckedRows, tokenizer: PairTokenizer, data: DataSection) -> Iterator[TokenizedExample]:
    """Tokenize each kept example, or read it from the cache. If one example of a row is left out, the whole row is."""
    report = checked.report
    cache_or_tokenizer = (TokenCache.open(tokenizer) if data.cache else None) or tokenizer
    rows = cache_or_tokenizer.tokenize(checked.rows(), prompt_limit(data))
    for source, found in itertools.groupby(rows, key=lambda one: one.source):
        fitted = [one if isinstance(one, Finding) else fit_length(one, data) for one in found]
        findings = [one for one in fitted if isinstance(one, Finding)]
        examples = [one for one in fitted if isinstance(one, TokenizedExample)]
        findings += _contradictions(examples)
        report.add(findings)
        if None in fitted or any(finding.code in ("identical", "masked") for finding in findings):
            report.drop(source)
        if report.leaves_out(source):
            continue
        report.num_cut += any(example.prompt_cut or any(example.truncated) for example in examples)
        for example in examples:
            _note_lengths(example, report)
        yield from examples


def _note_lengths(example: TokenizedExample, report: DataReport) -> None:
    report.note_lengths({"prompt": len(example.prompt)}, "tokens")
    if example.ranks:
        for branch in example.branches:
            report.note_lengths({"response": len(branch)}, "tokens")
        return
    sides = ("chosen", "rejected") if example.label is None else ("completion",)
    report.note_lengths({side: len(branch) for side, branch in zip(sides, example.branches, strict=True)}, "tokens")


def _contradictions(examples: Sequence[TokenizedExample]) -> list[Finding]:
    """Find pairs, split into completions, whose two completions became identical when truncated."""
    findings = []
    for good, bad in itertools.pairwise(examples):
        is_pair = good.number == bad.number and good.label and not bad.label
        if is_pair and any(good.truncated + bad.truncated) and good.branches == bad.branches:
            message = f"dropped: cut to their first {len(good.branches[0])} tokens, chosen and rejected are the same"
            findings.append(Finding(code="identical", severity="warning", message=message, source=good.source))
    return findings


def fingerprint(examples: Sequence[TokenizedExample]) -> str:
    """Hash everything that training reads of the examples, in order; SHA-256 in hex."""
    digest = hashlib.sha256()
    for example in examples:
        of_list = (example.ranks, example.scores) if example.ranks else ()
        digest.update(repr((len(example.prompt), example.weight, example.margin, example.label, *of_list)).encode())
        if example.columns:
            digest.update(repr(sorted(example.columns.items())).encode())
        digest.update(example.prompt.tobytes())
        for branch in example.branches:
            digest.update(len(branch).to_bytes(4, "little") + branch.tobytes())
        if example.masks:
            digest.update(repr((example.scores_masked, example.masks)).encode())
    return digest.hexdigest()

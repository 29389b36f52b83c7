"""One evaluation from paths to report: the same pairs through one model after the other."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qpref.errors import DataError, DeviceMemoryError, RecipeError
from qpref.evaluation import rows
from qpref.evaluation.models import Subject, common_dtype, identify
from qpref.evaluation.report import ModelReport, Report
from qpref.evaluation.scores import PairScores, Reference, positions, score_pairs, score_reference
from qpref.evaluation.statistics import Bootstrap
from qpref.evaluation.summary import summarize
from qpref.recipe import DataSection
from qpref.records import Finding, PreferencePair, Source, TokenizedExample
from qpref.training.invariants import check_layout

log = logging.getLogger("qpref")

DEFAULT_BETA = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of `evaluate`.

    Attributes:
        models: paths or hub ids, the first of which the others are compared with.
        data: the file of pairs; None for the first run's held-out file.
        beta: None for the first run's.
        samples: bootstrap draws.
        max_pairs: at most so many, at random.
        max_length: tokens of prompt and response; None for the first run's, else what the models were made for.
        all_float32: compute in float32 even where all models have one type.
        base, quantization: for models that no run explains.
        without_overlap: leave out the pairs whose prompt a run was trained on.
    """

    models: Sequence[str]
    data: Path | None = None
    beta: float | None = None
    samples: int = 2000
    seed: int = 0
    max_pairs: int | None = None
    max_length: int | None = None
    all_float32: bool = False
    base: str | None = None
    quantization: Literal["nf4", "none"] = "none"
    without_overlap: bool = False


def evaluate(request: Request) -> Report:
    """Score the pairs under every model, one model in memory at a time.

    Raises:
        QprefError: of the kind that fits.
    """
    subjects = [identify(name, base=request.base, quantization=request.quantization) for name in request.models]
    subjects = _with_common_settings(subjects, request.max_length)
    path = request.data or _heldout(subjects)
    asked = rows.sample_pairs(rows.read_pairs(path, _reader(subjects, path)), request.max_pairs, request.seed)
    overlaps = [_overlap(subject, asked) for subject in subjects]
    seen = frozenset().union(*(found.pairs for found in overlaps if found)) if request.without_overlap else frozenset()
    pairs = [pair for place, pair in enumerate(asked) if place not in seen]
    if not pairs:
        raise DataError(f"{path}: every prompt stands in the training data", "bring pairs with other prompts")
    examples, left_out = _tokenize(subjects, pairs)
    kept = {example.source for example in examples[0]}
    pairs = [pair for pair in pairs if pair.source in kept]
    beta, beta_from = _beta(subjects, request.beta)
    scores, references = _score(subjects, examples, request)
    bootstrap = Bootstrap.of([rows.text_of(pair.prompt) for pair in pairs], request.samples, request.seed)
    summaries = summarize(scores, beta, bootstrap, [pair.source.path for pair in pairs])
    models = zip(subjects, references, overlaps, summaries, strict=True)
    return Report(
        data=str(path),
        read=len(asked),
        pairs=len(pairs),
        overlapping_left_out=len(seen),
        left_out=left_out,
        beta=beta,
        beta_from=beta_from,
        seed=request.seed,
        samples=request.samples,
        dtype=common_dtype(subjects, request.all_float32),
        models=[
            ModelReport(name=subject.name, kind=subject.kind, reference=reference, overlap=overlap, summary=summary)
            for subject, reference, overlap, summary in models
        ],
    )


def _with_common_settings(subjects: Sequence[Subject], max_length: int | None) -> list[Subject]:
    """The subjects with one limit of lengths, and the first run's template for those that no run explains."""
    runs = [subject.recipe.data for subject in subjects if subject.is_of_run]
    data = runs[0] if runs else min((subject.recipe.data for subject in subjects), key=lambda data: data.max_length)
    if max_length is not None:
        data = data.model_copy(update={"max_length": max_length, "max_prompt_length": max_length - 1})
    limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}

    def settled(subject: Subject) -> Subject:
        own = subject.recipe.data.model_copy(update=limits) if subject.is_of_run else data
        return replace(subject, recipe=subject.recipe.model_copy(update={"data": own}))

    return [settled(subject) for subject in subjects]


def _heldout(subjects: Sequence[Subject]) -> Path:
    for subject in subjects:
        if subject.is_of_run and subject.recipe.data.heldout:
            return Path(subject.recipe.data.heldout)
    raise RecipeError("no run among the models has a held-out file", "name pairs with --data")


def _reader(subjects: Sequence[Subject], path: Path) -> str | None:
    """The reader that a run has named for its held-out file."""
    named = [s.recipe.data.reader for s in subjects if s.is_of_run and s.recipe.data.heldout == str(path)]
    return named[0] if named else None


def _overlap(subject: Subject, pairs: Sequence[PreferencePair]) -> rows.Overlap | None:
    if not subject.is_of_run:
        return None
    trained_on = rows.training_prompts(subject.recipe.data)
    if trained_on is None:
        log.warning("%s: its training data aren't there, so nobody knows whether the prompts overlap", subject.name)
        return None
    return rows.overlap(pairs, trained_on)


def _tokenize(
    subjects: Sequence[Subject], pairs: Sequence[PreferencePair]
) -> tuple[list[list[TokenizedExample]], tuple[int, str]]:
    """For each model the pairs that all of them can be asked about; how many aren't among them, and why not."""
    tokenized = [rows.tokenize_pairs(pairs, subject.tokenizer(), subject.recipe.data) for subject in subjects]
    places = rows.same_for_all([kept for kept, _ in tokenized], pairs)
    examples = [[kept[pairs[place].source] for place in places] for kept, _ in tokenized]
    reasons = [_reason(problem, subjects[0].recipe.data) for _, left in tokenized for problem in left]
    return examples, (len(pairs) - len(places), reasons[0] if reasons else "")


def _reason(problem: Finding | Source, data: DataSection) -> str:
    if isinstance(problem, Finding):
        return f"{problem.source}: {problem.message}"
    return (
        f"{problem}: longer than {data.max_length} tokens, or its prompt than {data.max_prompt_length} (--max-length)"
    )


def _beta(subjects: Sequence[Subject], asked: float | None) -> tuple[float, str]:
    if asked is not None:
        return asked, "--beta"
    for subject in subjects:
        if subject.beta is not None:
            return subject.beta, subject.name
    return DEFAULT_BETA, "the default; --beta says another"


def _score(
    subjects: Sequence[Subject], examples: Sequence[Sequence[TokenizedExample]], request: Request
) -> tuple[list[PairScores], list[str | None]]:
    """Each model's scores, and the name of the model whose reference they are against.

    Models with a reference of their own go first: the first one's serves the models that have none.
    """
    dtype = common_dtype(subjects, request.all_float32)
    scores: dict[int, PairScores] = {}
    names: dict[int, str | None] = {}
    shared: Reference | None = None
    wanted = any(not subject.has_reference for subject in subjects)
    for place in sorted(range(len(subjects)), key=lambda place: not subjects[place].has_reference):
        subject, own = subjects[place], examples[place]
        log.info("%s: scoring %d pairs", subject.name, len(own))
        try:
            found, reference = _score_one(subject, own, shared, dtype or subject.dtype, request.seed)
        except torch.OutOfMemoryError as error:
            hint = (
                "compare fewer models, or lower --max-length"
                if dtype is None
                else ("the models compute in float32 here; evaluate them one at a time, each in its own type")
            )
            raise DeviceMemoryError(f"{subject.name}: the device ran out of memory", hint) from error
        scores[place], names[place] = found, reference.name if reference else None
        if wanted and shared is None:
            shared = reference
        del reference
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    order = range(len(subjects))
    return [scores[place] for place in order], [names[place] for place in order]


def _score_one(
    subject: Subject, examples: Sequence[TokenizedExample], shared: Reference | None, dtype: str, seed: int
) -> tuple[PairScores, Reference | None]:
    """One model's scores and what they are against."""
    policy = subject.load(dtype)
    check_layout(policy, examples[0])
    looked_at = positions(examples, seed)
    reference = shared
    if subject.has_reference:
        reference = score_reference(subject.name, policy, examples, looked_at)
    elif shared is not None and not shared.fits(examples):
        log.warning("%s: its tokens aren't those of %s, so it has no reference here", subject.name, shared.name)
        reference = None
    return score_pairs(policy, examples, looked_at, reference), reference

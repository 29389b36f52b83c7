"""One evaluation from paths to report: the same pairs through one model after the other."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qpref.errors import DataError, DeviceMemoryError, QprefError, RecipeError
from qpref.evaluation import heldout_pairs as rows
from qpref.evaluation.comparison import ModelReport, Report
from qpref.evaluation.models import Subject, common_dtype, identify
from qpref.evaluation.scores import PairScores, Reference, positions, score_pairs, score_reference
from qpref.evaluation.statistics import Bootstrap
from qpref.evaluation.summary import summarize
from qpref.recipe.reopen import RecordedRun
from qpref.records import PreferencePair, TokenizedExample
from qpref.training.invariants import check_layout

log = logging.getLogger("qpref")

DEFAULT_BETA = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of `evaluate`.

    Attributes:
        models: paths or hub ids, the first of which the others are compared with.
        data: where the pairs are, as `[data] train` has it; None for what the first run holds out.
        beta: None for the first run's.
        samples: bootstrap draws.
        max_pairs: at most so many, at random.
        max_length: tokens of prompt and response; None for the first run's, else what the models were made for.
        all_float32: compute in float32 even where all models have one type.
        base, quantization: for models that no run explains.
        without_overlap: leave out the pairs whose prompt a run was trained on.
    """

    models: Sequence[str]
    data: str | None = None
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
    label, everything, changed = _pairs(subjects, request.data)
    asked = rows.sample_pairs(everything, request.max_pairs, request.seed)
    overlaps = [_overlap(subject, asked) for subject in subjects]
    if not any(subject.is_of_run for subject in subjects):
        for subject in subjects:
            log.warning("%s: nobody knows whether its prompts were trained on; name its run too", subject.name)
    seen: frozenset[int] = frozenset()
    if request.without_overlap:
        seen = seen.union(*(found.pairs for found in overlaps if found))
    pairs = [pair for place, pair in enumerate(asked) if place not in seen]
    if not pairs:
        raise DataError(f"{label}: every prompt stands in the training data", "bring pairs with other prompts")
    examples, places, reason = _tokenize(subjects, pairs)
    left_out = len(pairs) - len(places), reason
    pairs = [pairs[place] for place in places]
    beta, beta_from = _beta(subjects, request.beta)
    scores, references = _score(subjects, examples, request)
    bootstrap = Bootstrap.of([rows.text_of(pair.prompt) for pair in pairs], request.samples, request.seed)
    summaries = summarize(scores, beta, bootstrap, [pair.source.path for pair in pairs])
    models = zip(subjects, references, overlaps, summaries, strict=True)
    return Report(
        data=label,
        data_changed=changed,
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


def _pairs(subjects: Sequence[Subject], location: str | None) -> tuple[str, list[PreferencePair], bool | None]:
    """What to call the data, their pairs, and whether a run held out others than these."""
    if location is not None:
        return location, rows.pairs_of(rows.data_at(location)), None
    for subject in subjects:
        if subject.run is not None:
            heldout = rows.data_of_run(subject.run, heldout_alone=True).heldout
            if heldout is not None:
                # The share that training allowed was of all rows, not of the held-out ones.
                found = rows.pairs_of(heldout, 1.0 if subject.recipe.data.skip_bad else 0.0)
                label = ", ".join(dict.fromkeys(source.choice.location for source in heldout.sources))
                return label, found, _has_changed(subject, subject.run)
    raise RecipeError("no run among the models holds data out", "name pairs with --data")


def _has_changed(subject: Subject, run: RecordedRun) -> bool | None:
    """Whether a run's held-out data aren't what they were; None, and a warning, where they can't be read as then."""
    try:
        return rows.heldout_has_changed(run, subject.tokenizer())
    except QprefError as error:
        log.warning("%s: nobody knows whether the held-out data are those of training: %s", subject.name, error.what)
        return None


def _overlap(subject: Subject, pairs: Sequence[PreferencePair]) -> rows.Overlap | None:
    """With what the model was trained on; None, and a warning for a run, where that isn't known."""
    if subject.run is None:
        return None
    try:
        train = rows.data_of_run(subject.run).train
        return rows.overlap(pairs, (rows.text_of(row.prompt) for row in train.rows()))
    except QprefError as error:
        log.warning("%s: nobody knows whether the prompts were trained on: %s", subject.name, error.what)
        return None


def _tokenize(
    subjects: Sequence[Subject], pairs: Sequence[PreferencePair]
) -> tuple[list[list[TokenizedExample]], list[int], str]:
    """For each model the pairs that all of them can be asked about; their numbers; why the first other isn't there."""
    tokenized = [rows.tokenize_pairs(pairs, subject.tokenizer(), subject.recipe.data) for subject in subjects]
    places = rows.same_for_all([kept for kept, _ in tokenized], pairs)
    refused = [finding for _, findings in tokenized for finding in findings]
    examples = [[kept[place] for place in places] for kept, _ in tokenized]
    return examples, places, f"{refused[0].source}: {refused[0].message}" if refused else ""


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

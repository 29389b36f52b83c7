"""Evaluate models from their paths to the comparison: the same pairs through one model after the other."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qpref.errors import DataError, QprefError, RecipeError
from qpref.evaluation import heldout_pairs
from qpref.evaluation.comparison import ComparedModel, Comparison
from qpref.evaluation.scores import PairScores, Reference, kl_positions, score_pairs, score_reference
from qpref.evaluation.statistics import Bootstrap
from qpref.evaluation.subjects import Subject, common_dtype, identify
from qpref.evaluation.summary import summarize
from qpref.policy.out_of_memory import out_of_memory_as
from qpref.recipe.reopen import RecordedRun
from qpref.records import PreferencePair, TokenizedExample
from qpref.training.invariants import check_company, check_layout
from qpref.training.model_limits import refuse_beyond_limits

log = logging.getLogger("qpref")

DEFAULT_BETA = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one evaluation.

    Attributes:
        models: paths or hub ids; the others are compared with the first.
        data: location of the pairs, as in `[data] train`; None for the first run's held-out data.
        beta: None for the first run's.
        samples: number of bootstrap resamples.
        max_pairs: evaluate a random sample of this size; None for all pairs.
        max_length: tokens of prompt and response; None for the first run's, else the models' context length.
        all_float32: compute in float32 even where all models share a dtype.
        base, quantization: for models without a run.
        without_overlap: drop the pairs whose prompt is in a run's training data.
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


def evaluate(request: Request) -> Comparison:
    """Score the pairs under every model, one model in memory at a time.

    Raises:
        QprefError: a model or the data cannot be read, no pair is left, or memory ran out.
    """
    subjects = [identify(name, base=request.base, quantization=request.quantization) for name in request.models]
    subjects = with_common_settings(subjects, request.max_length)
    label, all_pairs, changed = _pairs(subjects, request.data)
    sampled = heldout_pairs.sample_pairs(all_pairs, request.max_pairs, request.seed)
    overlaps = [_overlap(subject, sampled) for subject in subjects]
    if not any(subject.is_of_run for subject in subjects):
        for subject in subjects:
            log.warning("%s: its training data are unknown, so overlap isn't checked; name its run too", subject.name)
    trained_on: frozenset[int] = frozenset()
    if request.without_overlap:
        trained_on = trained_on.union(*(overlap.pairs for overlap in overlaps if overlap))
    pairs = [pair for index, pair in enumerate(sampled) if index not in trained_on]
    if not pairs:
        raise DataError(f"{label}: every prompt is in the training data", "use pairs with other prompts")
    examples, indices, reason = tokenize_for_all(subjects, pairs)
    left_out = len(pairs) - len(indices), reason
    pairs = [pairs[index] for index in indices]
    beta, beta_from = _beta(subjects, request.beta)
    scores, references = _score(subjects, examples, request)
    bootstrap = Bootstrap.of([heldout_pairs.text_of(pair.prompt) for pair in pairs], request.samples, request.seed)
    summaries = summarize(scores, beta, bootstrap, [pair.source.path for pair in pairs])
    models = zip(subjects, references, overlaps, summaries, strict=True)
    return Comparison(
        data=label,
        data_changed=changed,
        read=len(sampled),
        pairs=len(pairs),
        overlapping_left_out=len(trained_on),
        left_out=left_out,
        beta=beta,
        beta_from=beta_from,
        seed=request.seed,
        samples=request.samples,
        dtype=common_dtype(subjects, request.all_float32),
        models=[
            ComparedModel(name=subject.name, kind=subject.kind, reference=reference, overlap=overlap, summary=summary)
            for subject, reference, overlap, summary in models
        ],
    )


def with_common_settings(subjects: Sequence[Subject], max_length: int | None) -> list[Subject]:
    """Give all subjects one length limit, and the first run's chat template to those without a run."""
    runs = [subject.recipe.data for subject in subjects if subject.is_of_run]
    data = runs[0] if runs else min((subject.recipe.data for subject in subjects), key=lambda data: data.max_length)
    if max_length is not None:
        data = data.model_copy(update={"max_length": max_length, "max_prompt_length": max_length - 1})
    limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}

    def with_limits(subject: Subject) -> Subject:
        own = subject.recipe.data.model_copy(update=limits) if subject.is_of_run else data
        return replace(subject, recipe=subject.recipe.model_copy(update={"data": own}))

    return [with_limits(subject) for subject in subjects]


def _pairs(subjects: Sequence[Subject], location: str | None) -> tuple[str, list[PreferencePair], bool | None]:
    """Read the pairs; return the data's name, the pairs, and whether they have changed since a run's training."""
    if location is not None:
        return location, heldout_pairs.pairs_of(heldout_pairs.data_at(location)), None
    for subject in subjects:
        if subject.run is not None:
            heldout = heldout_pairs.data_of_run(subject.run, heldout_alone=True).heldout
            if heldout is not None:
                # Training applied its allowed share of bad rows to all rows, not to the held-out ones alone.
                found = heldout_pairs.pairs_of(heldout, 1.0 if subject.recipe.data.skip_bad else 0.0)
                label = ", ".join(dict.fromkeys(source.choice.location for source in heldout.sources))
                return label, found, _has_changed(subject, subject.run)
    raise RecipeError("none of the models is a run with held-out data", "name pairs with --data")


def _has_changed(subject: Subject, run: RecordedRun) -> bool | None:
    """Return whether a run's held-out data have changed; None, and a warning, where they can't be reloaded."""
    try:
        return heldout_pairs.heldout_has_changed(run, subject.tokenizer())
    except QprefError as error:
        log.warning("%s: can't check whether the held-out data have changed: %s", subject.name, error.what)
        return None


def _overlap(subject: Subject, pairs: Sequence[PreferencePair]) -> heldout_pairs.Overlap | None:
    """Count the pairs whose prompt is in the model's training data; None where those are unknown, warning for a run."""
    if subject.run is None:
        return None
    try:
        train = heldout_pairs.data_of_run(subject.run).train
        return heldout_pairs.overlap(pairs, (heldout_pairs.text_of(row.prompt) for row in train.rows()))
    except QprefError as error:
        log.warning("%s: can't check the overlap with its training data: %s", subject.name, error.what)
        return None


def tokenize_for_all(
    subjects: Sequence[Subject], pairs: Sequence[PreferencePair]
) -> tuple[list[list[TokenizedExample]], list[int], str]:
    """Tokenize for each model the pairs that all can be scored on; also their indices and the first refusal."""
    tokenized = [heldout_pairs.tokenize_pairs(pairs, subject.tokenizer(), subject.recipe.data) for subject in subjects]
    indices = heldout_pairs.same_for_all([kept for kept, _ in tokenized], pairs)
    refused = [finding for _, findings in tokenized for finding in findings]
    examples = [[kept[index] for index in indices] for kept, _ in tokenized]
    return examples, indices, f"{refused[0].source}: {refused[0].message}" if refused else ""


def _beta(subjects: Sequence[Subject], given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "given"
    for subject in subjects:
        if subject.beta is not None:
            return subject.beta, subject.name
    return DEFAULT_BETA, "default, since no run names one"


def _score(
    subjects: Sequence[Subject], examples: Sequence[Sequence[TokenizedExample]], request: Request
) -> tuple[list[PairScores], list[str | None]]:
    """Score every model, and name the model whose reference each one is compared with.

    Models with their own reference are scored first; models without one are compared with the first such reference.
    """
    dtype = common_dtype(subjects, request.all_float32)
    subjects[0].announce_device()
    scores: dict[int, PairScores] = {}
    names: dict[int, str | None] = {}
    shared: Reference | None = None
    needs_shared = any(not subject.has_reference for subject in subjects)
    for index in sorted(range(len(subjects)), key=lambda index: not subjects[index].has_reference):
        subject, own = subjects[index], examples[index]
        log.info("%s: scoring %d pairs", subject.name, len(own))
        hint = (
            "compare fewer models, or lower --max-length"
            if dtype is None
            else "the models compute in float32 here; evaluate them one at a time, each in its own dtype"
        )
        with out_of_memory_as(f"{subject.name}: the device ran out of memory", hint):
            found, reference = _score_one(subject, own, shared, dtype or subject.dtype, request.seed)
        scores[index], names[index] = found, reference.name if reference else None
        if needs_shared and shared is None:
            shared = reference
        del reference
        release_memory()
    order = range(len(subjects))
    return [scores[index] for index in order], [names[index] for index in order]


def release_memory() -> None:
    """Free the memory of a model that nothing refers to, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _score_one(
    subject: Subject, examples: Sequence[TokenizedExample], shared: Reference | None, dtype: str, seed: int
) -> tuple[PairScores, Reference | None]:
    """Score one model; also return the reference that it is compared with."""
    policy = subject.load(dtype)
    refuse_beyond_limits(policy, examples)
    check_layout(policy, examples[0])
    check_company(policy, examples)
    positions = kl_positions(examples, seed)
    reference = shared
    if subject.has_reference:
        reference = score_reference(subject.name, policy, examples, positions)
    elif shared is not None and not shared.fits(examples):
        log.warning("%s: its token ids differ from those of %s, so it has no reference here", subject.name, shared.name)
        reference = None
    return score_pairs(policy, examples, positions, reference), reference

"""The forgetting gate: score models and their bases on a regression set, and warn of a significant loss.

The built-in set is the folder gate_items: a JSON Lines file of pairs for each category, written for qpref.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpref.errors import DataError, RecipeError
from qpref.evaluation import heldout_pairs
from qpref.evaluation.evaluate import release_memory, tokenize_for_all, with_common_settings
from qpref.evaluation.forgetting import Items, measure
from qpref.evaluation.gate_report import GatedModel, GateReport, lost_item
from qpref.evaluation.scores import Floats, log_probabilities
from qpref.evaluation.subjects import Subject, common_dtype, identify
from qpref.policy.out_of_memory import out_of_memory_as
from qpref.policy.reference import as_reference, frozen
from qpref.records import Message, PreferencePair, TokenizedExample
from qpref.training.invariants import check_company, check_layout
from qpref.training.model_limits import refuse_beyond_limits

log = logging.getLogger("qpref")

BUILT_IN = Path(__file__).with_name("gate_items")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRequest:
    """Options of the gate.

    Attributes:
        models: paths or hub ids.
        items: location of pairs, as in `[data] train`, a category for each file; None for the built-in set.
        samples: number of bootstrap resamples.
        seed: of the bootstrap and the test.
        all_float32: compute in float32 even where all models share a dtype.
        base, quantization: for models without a run.
    """

    models: Sequence[str]
    items: str | None = None
    samples: int = 2000
    seed: int = 0
    all_float32: bool = False
    base: str | None = None
    quantization: Literal["nf4", "none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """[N, 2] log-probabilities of a model, and of its own base where it has an adapter."""

    model: Floats
    base: Floats | None


def gate(request: GateRequest) -> GateReport:
    """Compare every model with its base on the items, one model in memory at a time.

    The base of a model with an adapter is that model with the adapter off, or with its start adapter. A plain model is
    compared with the first such base, else with the first model.

    Raises:
        QprefError: a model or the items cannot be read, a plain model is alone, or memory ran out.
    """
    subjects = [identify(name, base=request.base, quantization=request.quantization) for name in request.models]
    if len(subjects) == 1 and not subjects[0].has_reference:
        raise RecipeError(
            f"{subjects[0].name}: a plain model, with nothing to compare it with", "name its base or its run first"
        )
    # A run's own max_length is of its training; the items need what the model can read.
    subjects = with_common_settings(subjects, min(subject.context for subject in subjects))
    pairs = read_items(request.items)
    examples, kept, reason = tokenize_for_all(subjects, pairs)
    dtype = common_dtype(subjects, request.all_float32)
    subjects[0].announce_device()
    scores = [_score(subject, own, dtype or subject.dtype) for subject, own in zip(subjects, examples, strict=True)]
    return GateReport(
        items=request.items or "built-in",
        read=len(pairs),
        left_out=(len(pairs) - len(kept), reason),
        seed=request.seed,
        samples=request.samples,
        dtype=dtype,
        models=_compare(subjects, scores, [pairs[index] for index in kept], request),
    )


def read_items(location: str | None) -> list[PreferencePair]:
    """Read a regression set; the built-in one by default.

    Raises:
        RecipeError: no reader fits.
        DataError: it cannot be read, a row is no pair, or its two answers are the same.
    """
    locations = [location] if location else [str(path) for path in sorted(BUILT_IN.glob("*.jsonl"))]
    pairs = [pair for each in locations for pair in heldout_pairs.pairs_of(heldout_pairs.data_at(each))]
    for pair in pairs:
        if _answer(pair.chosen) == _answer(pair.rejected):
            raise DataError(f"{pair.source}: chosen and rejected are the same text", "give each item a wrong answer")
    return pairs


def items_of(pairs: Sequence[PreferencePair]) -> Items:
    """Find the couples of the pairs, and each pair's category: the name of its file."""
    answers = [(_answer(pair.chosen), _answer(pair.rejected)) for pair in pairs]
    return Items.of(answers, [Path(pair.source.path).name.partition(".")[0] for pair in pairs])


def _answer(response: Sequence[Message]) -> str:
    return "\n".join(message.content for message in response)


def _compare(
    subjects: Sequence[Subject], scores: Sequence[_Scores], pairs: Sequence[PreferencePair], request: GateRequest
) -> list[GatedModel]:
    """Compare each model with its own base; one without, with the first such base, else with the first model."""
    items = items_of(pairs)
    first = next((index for index, subject in enumerate(subjects) if subject.has_reference), 0)
    shared = scores[first].base if subjects[first].has_reference else scores[first].model
    assert shared is not None
    found = []
    for index, (subject, own) in enumerate(zip(subjects, scores, strict=True)):
        if index == first and own.base is None:
            continue
        base = shared if own.base is None else own.base
        changes = measure(items, base, own.model, samples=request.samples, seed=request.seed)
        lost = [lost_item(pairs[at], items.categories[at], changes.log_odds[at]) for at in changes.lost_items()]
        named = subjects[first if own.base is None else index].name
        found.append(GatedModel(name=subject.name, kind=subject.kind, base=named, changes=changes, lost=lost))
    return found


def _score(subject: Subject, examples: Sequence[TokenizedExample], dtype: str) -> _Scores:
    log.info("%s: scoring %d items", subject.name, len(examples))
    with out_of_memory_as(f"{subject.name}: the device ran out of memory", "compare fewer models"):
        policy = subject.load(dtype)
        refuse_beyond_limits(policy, examples)
        check_layout(policy, examples[0])
        check_company(policy, examples)
        base = None
        if subject.has_reference:
            with as_reference(policy):
                base = log_probabilities(policy, examples)
        with frozen(policy):
            found = _Scores(model=log_probabilities(policy, examples), base=base)
    del policy
    release_memory()
    return found

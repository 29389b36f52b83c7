"""Rows of preferences from sampled responses and their scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qpref.records import Message

Form = Literal["extremes", "pairs", "ranked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredResponses:
    """The responses to one prompt with their scores, higher is better."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...]


def preference_rows(scored: ScoredResponses, form: Form, min_gap: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of one prompt, as a data file has them; none where no two responses differ enough.

    Of equal responses one is left. An empty response is left out: no row may have one.

    Args:
        form: "extremes" makes a pair of the best and the worst response, "pairs" one of any two, "ranked" a list from
            best to worst.
        min_gap: least difference of the scores of a pair, or of the first and the last of a list; more than 0 is always
            needed.
    """
    ranked = _ranked(scored)
    if len(ranked) < 2 or not _differ(ranked[0], ranked[-1], min_gap):
        return
    prompt = [_plain(message) for message in scored.prompt]
    if form == "ranked":
        texts, scores = zip(*ranked, strict=True)
        yield {"prompt": prompt, "responses": list(texts), "scores": list(scores)}
        return
    pairs = [(ranked[0], ranked[-1])] if form == "extremes" else itertools.combinations(ranked, 2)
    for better, worse in pairs:
        if _differ(better, worse, min_gap):
            yield {
                "prompt": prompt,
                "chosen": better[0],
                "rejected": worse[0],
                "score_chosen": better[1],
                "score_rejected": worse[1],
            }


def _ranked(scored: ScoredResponses) -> list[tuple[str, float]]:
    """Distinct responses with their scores, from best to worst; ties stay in the order in which they were drawn."""
    distinct: dict[str, float] = {}
    for text, score in zip(scored.responses, scored.scores, strict=True):
        if text.strip():
            distinct.setdefault(text, score)
    return sorted(distinct.items(), key=lambda item: -item[1])


def _differ(better: Sequence[Any], worse: Sequence[Any], min_gap: float) -> bool:
    gap: float = better[1] - worse[1]
    return gap > 0 and gap >= min_gap


def _plain(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.extra}

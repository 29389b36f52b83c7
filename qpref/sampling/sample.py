"""Sample, score and rank: a file of preferences over a model's own responses."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qpref import fsio
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError
from qpref.evaluation.generate import prompt_ids, text_of_answer
from qpref.evaluation.subjects import Subject
from qpref.locks import in_turn
from qpref.policy.kept_base import KeptBase
from qpref.records import SampledResponse, UnpairedExample
from qpref.sampling.batches import drawn_batches, load_sampler
from qpref.sampling.decode import Draws
from qpref.sampling.journal import Entry, Journal
from qpref.sampling.preferences import Form, ScoredResponses, preference_rows

log = logging.getLogger("qpref")

Score = Callable[[Sequence[SampledResponse]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Outcome of sampling.

    Attributes:
        prompts: number of prompts.
        rows: number of rows in the output; prompts whose responses don't differ enough have none.
        reward: mean of all responses' scores.
        best: mean over prompts of the best response's score.
        ended: share of the responses that ended by themselves.
        tokens: mean number of tokens of those that this call drew; NaN where it drew none.
    """

    prompts: int
    rows: int
    reward: float
    best: float
    ended: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts, draws and the form of the preferences that are made of them.

    Attributes:
        batch_size: responses that are drawn together, at least k; halved where memory runs out.
        reward: name and options of the reward, to tell whether interrupted sampling can go on.
        kept: a base that stays in memory for later models of the process.
    """

    subject: Subject
    prompts: Sequence[UnpairedExample]
    draws: Draws
    form: Form
    min_gap: float
    batch_size: int
    reward: Mapping[str, Any]
    kept: KeptBase | None = None


def sample_to(output: Path, request: Request, score: Score, overwrite: bool = False) -> Sampled:
    """Write the preferences of the prompts' sampled responses to a JSONL file, whole or not at all.

    Each batch is on the disk, in `OUTPUT.sampling`, before the next one starts; a call with the same arguments goes on
    from there.

    Raises:
        DataError: the file exists, a prompt can't be rendered, or another call's samples lie there.
        PolicyError: the model can't be loaded.
        DeviceMemoryError: not even one prompt's responses fit.
        DiskError: the output can't be written.
    """
    tokenizer = request.subject.tokenizer()
    ids = prompt_ids(tokenizer, request.prompts)
    settings = _settings(request, ids)
    with in_turn(output.with_name(f".{output.name}.lock"), f"samples to {output}", removed=True):
        if output.exists() and not overwrite:
            raise DataError(f"{output}: exists", "name another file, or add --overwrite")
        journal = Journal(output, settings, begin=overwrite)
        lengths: list[int] = []
        try:
            left = [index for index in range(len(ids)) if index not in journal.entries]
            if len(left) < len(ids):
                log.info("%d of %d prompts were sampled before", len(ids) - len(left), len(ids))
            if left:
                policy = load_sampler(request.subject, request.kept)
                for batch, drawn in drawn_batches(policy, tokenizer, ids, left, request.draws, request.batch_size):
                    journal.add(scored(request.prompts, tokenizer, batch, drawn, score))
                    lengths += [len(response) for responses in drawn for response in responses]
                    log.info("%d of %d prompts", len(journal.entries), len(ids))
        finally:
            journal.close()
        rows = _rows(request, journal)
        fsio.write_lines(output, (json.dumps(row, ensure_ascii=False) for row in rows))
        journal.remove()
    return _summary(rows, list(journal.entries.values()), lengths)


def _settings(request: Request, ids: Sequence[list[int]]) -> dict[str, Any]:
    """List what decides the responses and their scores, as JSON values."""
    subject = request.subject
    adapter = sorted(path for path in subject.adapter.rglob("*") if path.is_file()) if subject.adapter else []
    model = [*sorted(subject.base.weights.values()), *(fsio.sha256_file(path) for path in adapter)]
    return {
        "model": hashlib.sha256(json.dumps(model).encode()).hexdigest(),
        "quantization": subject.recipe.model.quantization,
        "dtype": subject.dtype,
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "reward": dict(request.reward),
        **asdict(request.draws),
    }


def scored(
    prompts: Sequence[UnpairedExample],
    tokenizer: PairTokenizer,
    batch: Sequence[int],
    drawn: Sequence[Sequence[Sequence[int]]],
    score: Score,
) -> list[Entry]:
    """Score the responses of a batch in one call."""
    answers = [[text_of_answer(tokenizer, response) for response in responses] for responses in drawn]
    flat = [
        SampledResponse(prompt=prompts[index].prompt, text=text, ended=ended)
        for index, texts in zip(batch, answers, strict=True)
        for text, ended in texts
    ]
    scores = iter(score(flat))
    return [
        Entry(
            index=index,
            responses=tuple(text for text, _ in texts),
            ended=tuple(ended for _, ended in texts),
            scores=tuple(next(scores) for _ in texts),
        )
        for index, texts in zip(batch, answers, strict=True)
    ]


def _rows(request: Request, journal: Journal) -> list[dict[str, Any]]:
    """Make the rows, in the prompts' order."""
    rows: list[dict[str, Any]] = []
    for index, prompt in enumerate(request.prompts):
        entry = journal.entries[index]
        ranked = ScoredResponses(prompt=prompt.prompt, responses=entry.responses, scores=entry.scores)
        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        rows += [row | tools for row in preference_rows(ranked, request.form, request.min_gap)]
    return rows


def _summary(rows: Sequence[object], entries: Sequence[Entry], lengths: Sequence[int]) -> Sampled:
    scores = [score for entry in entries for score in entry.scores]
    return Sampled(
        prompts=len(entries),
        rows=len(rows),
        reward=fmean(scores),
        best=fmean(max(entry.scores) for entry in entries),
        ended=fmean(done for entry in entries for done in entry.ended),
        tokens=fmean(lengths) if lengths else math.nan,
    )

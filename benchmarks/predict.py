"""Predict each contestant's steps with the formulas of `benchmarks.limit`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.adapter import RANK
from benchmarks.contestants import Contestant, Leg, Race
from benchmarks.limit import Work, forward_flops, peak_bytes, row_work, shared_work, training_flops, weight_bytes
from benchmarks.pairs import Pair, Single, as_singles, make_pairs
from benchmarks.shapes import Shape

ADAPTER_BYTES = {"qpref": 12, "trl": 6, "unsloth": 12}
"""A gradient and two moments: float32 in qpref, bf16 in TRL, which casts adapters on a quantized base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass through the model.

    Attributes:
        trains: with a backward pass.
        adapted: with the adapters on.
    """

    work: Work
    trains: bool = True
    adapted: bool = True


def predictions(race: Race, leg: Leg, contestant: Contestant, steps: Iterable[int]) -> dict[str, list[float]]:
    """Predict flops, moved_bytes (of weights), peak_bytes and useful_tokens for steps of a leg."""
    each = contestant.pairs_per_step
    pairs = make_pairs(leg.workload, (leg.warmup + leg.timed + 1) * each, race.shape.vocab_size)
    found: dict[str, list[float]] = {"flops": [], "moved_bytes": [], "peak_bytes": [], "useful_tokens": []}
    for step in steps:
        # One pair more than the step's, since the last KTO pair is mixed with the next step's first.
        rows = step_rows(contestant, pairs[step * each : (step + 1) * each + 1])
        passes = step_passes(contestant, rows)
        found["flops"].append(sum(_flops(race.shape, contestant, one) for one in passes))
        found["moved_bytes"].append(sum(_moved(race.shape, contestant, one) for one in passes))
        found["peak_bytes"].append(max(_peak(race.shape, contestant, one) for one in passes))
        found["useful_tokens"].append(sum(row.useful_tokens for row in rows))
    return found


def step_rows(contestant: Contestant, pairs: Sequence[Pair]) -> list[Pair] | list[Single]:
    """Make the rows of one optimizer step; the last of `pairs` is the next step's."""
    each = contestant.pairs_per_step
    return list(pairs[:each]) if contestant.loss == "dpo" else as_singles(pairs)[: 2 * each]


def step_passes(contestant: Contestant, rows: Sequence[Pair] | Sequence[Single]) -> list[Pass]:
    """List the passes through the model that a contestant computes for a step."""
    parts: list[Sequence[Pair] | Sequence[Single]] = [rows]
    if sum(row.useful_tokens for row in rows) > contestant.tokens_per_microbatch and contestant.side == "qpref":
        parts = [[row] for row in rows]  # type: ignore[list-item,misc]
    if contestant.pairs_per_microbatch and isinstance(rows[0], Pair):
        size = contestant.pairs_per_microbatch
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    passes = []
    for part in parts:
        branches = [_branches(row) for row in part]
        if isinstance(part[0], Single) and contestant.side == "qpref":  # the KL's rows in a second pass, unpadded
            works = [sum_of([shared_work(p, (own[index],)) for p, own in branches]) for index in (0, 1)]
        elif contestant.shares_prompts:
            works = [sum_of([shared_work(prompt, responses) for prompt, responses in branches])]
        elif isinstance(part[0], Single):  # TRL computes the KL's rows in a second pass, without gradients
            works = [row_work([(prompt, responses[index]) for prompt, responses in branches]) for index in (0, 1)]
        else:
            flat = [(prompt, response) for prompt, responses in branches for response in responses]
            works = [row_work(flat, contestant.compacts_head)]
        passes += [Pass(work=work, trains=index == 0) for index, work in enumerate(works)]
        if contestant.live_reference:
            passes += [Pass(work=work, trains=False, adapted=False) for work in works]
    return passes


def sum_of(works: Sequence[Work]) -> Work:
    return sum(works[1:], start=works[0])


def _branches(row: Pair | Single) -> tuple[int, tuple[int, int]]:
    if isinstance(row, Pair):
        return len(row.prompt), (len(row.chosen), len(row.rejected))
    return len(row.prompt), (len(row.completion), len(row.mismatched))


def _flops(shape: Shape, contestant: Contestant, one: Pass) -> float:
    if one.trains:
        return training_flops(shape, one.work, RANK, float(contestant.checkpointing), contestant.head_products)
    return forward_flops(shape, one.work, RANK if one.adapted else 0)


def _moved(shape: Shape, contestant: Contestant, one: Pass) -> float:
    return weight_bytes(shape, 2 + contestant.checkpointing if one.trains else 1)


def _peak(shape: Shape, contestant: Contestant, one: Pass) -> float:
    if not one.trains:
        return 0.0
    return peak_bytes(
        shape, one.work.tokens, RANK, float(contestant.checkpointing), adapter_bytes=ADAPTER_BYTES[contestant.side]
    )

"""Rotary positions whose frequencies depend on the length of a sequence: LongRoPE and dynamic NTK scaling.

transformers chooses them by the largest position of a whole forward pass, and dynamic NTK's by earlier passes too, so
that a response's log-probability would depend on its company. Here each token of a pass has the frequencies of its own
sequence, as if that were alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qpref.records import Group, PackedBatch
from qpref.staging import to_device

LONGROPE, DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True, slots=True)
class RopeLengths:
    """Lengths at which a model's rotary frequencies change.

    Attributes:
        switches: lengths up to which a kind of layers has its short frequencies, with one set beyond.
        growing: likewise, with frequencies of its own for each length beyond.
    """

    switches: frozenset[int]
    growing: frozenset[int]

    def class_of(self, length: int) -> tuple[int, ...]:
        """Return a key that is equal for lengths with the same frequencies."""
        beyond = [int(length > switch) for switch in sorted(self.switches)]
        return *beyond, *(length if length > start else 0 for start in sorted(self.growing))

    def choose(self, lengths: Sequence[Sequence[int]], device: torch.device) -> ChosenLengths:
        """Choose the frequencies of a pass's tokens.

        Args:
            lengths: length of the sequence that a token belongs to: [1, T] of a stream, [B, 1] of rows.
        """
        of_class: dict[tuple[int, ...], int] = {}
        for row in lengths:
            for length in row:
                kind = self.class_of(length)
                of_class[kind] = max(length, of_class.get(kind, 0))
        if len(of_class) == 1:
            return ChosenLengths(tuple(of_class.values()), None)
        numbers = {kind: number for number, kind in enumerate(of_class)}
        index = [[numbers[self.class_of(length)] for length in row] for row in lengths]
        return ChosenLengths(tuple(of_class.values()), torch.tensor(index, device=device))


@dataclass(frozen=True, slots=True)
class ChosenLengths:
    """Lengths that a pass needs frequencies for, the longest of each class.

    Attributes:
        index: [1, T] or [B, 1] int64, each token's among them; None where there is one.
    """

    lengths: tuple[int, ...]
    index: Tensor | None


_current: ContextVar[ChosenLengths | None] = ContextVar("lengths", default=None)


def current() -> ChosenLengths | None:
    """Return the lengths of the pass that is being computed; None where they are what its positions say."""
    return _current.get()


class for_lengths:
    """Context of a pass over sequences of these lengths, or of its repetition; for any number of uses."""

    def __init__(self, chosen: ChosenLengths | None) -> None:
        self._chosen = chosen
        self._tokens: list[Token[ChosenLengths | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_current.set(self._chosen))

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())


class LengthRope(nn.Module):
    """A family's rotary module that depends on the lengths of `for_lengths`, and outside of that on the pass's largest
    position, but never on an earlier pass."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **keywords: Any) -> Any:
        def turn(positions: Tensor) -> tuple[Tensor, ...]:
            self.own(x, torch.zeros_like(position_ids[..., :1]), *args, **keywords)  # back to the short frequencies
            turned = self.own(x, positions, *args, **keywords)
            return turned if isinstance(turned, tuple) else (turned,)

        def turn_for(length: int) -> tuple[Tensor, ...]:
            last = torch.full_like(position_ids[..., :1], length - 1)
            turned = turn(torch.cat([position_ids.clamp(max=length - 1), last], dim=-1))
            return tuple(each[..., :-1, :] for each in turned)

        chosen = _current.get()
        if chosen is None:
            result = turn(position_ids)
        else:
            result = turn_for(chosen.lengths[0])
            for number, length in enumerate(chosen.lengths[1:], start=1):
                assert chosen.index is not None
                here = (chosen.index == number)[..., None]
                result = tuple(torch.where(here, *both) for both in zip(turn_for(length), result, strict=True))
        return result if len(result) > 1 else result[0]


def separate_lengths(decoder: Any) -> RopeLengths | None:
    """Replace a decoder's rotary modules that depend on the length of a sequence; None where none does."""
    switches: set[int] = set()
    growing: set[int] = set()
    for name, module in list(decoder.named_modules()):
        kinds = _kinds(module)
        for layers, kind in kinds.items():
            if kind == LONGROPE:
                settings = module.config.rope_parameters
                settings = settings[layers] if layers else settings
                switches.add(int(settings["original_max_position_embeddings"]))
            elif kind == DYNAMIC:
                growing.add(int(module.original_max_seq_len))
        parent, _, last = name.rpartition(".")
        holder = decoder.get_submodule(parent)
        if {LONGROPE, DYNAMIC} & set(kinds.values()) and not isinstance(holder, LengthRope):
            setattr(holder, last, LengthRope(module))
    return RopeLengths(frozenset(switches), frozenset(growing)) if switches or growing else None


def _kinds(module: Any) -> Mapping[str, str]:
    """Kind of rotary positions by type of layers, "" for all of them; empty for another module."""
    kind = getattr(module, "rope_type", None)
    named = kind if isinstance(kind, Mapping) else {"": kind}
    return {layers: DYNAMIC if DYNAMIC in each else each for layers, each in named.items() if isinstance(each, str)}


def group_length(group: Group) -> int:
    """Return the length of a group's longest sequence, of whose class all of them are."""
    return group.prompt + max(group.branches) + 1


def stream_lengths(groups: Sequence[Group], *, prompts: bool = True) -> list[list[int]]:
    """Return the length of each token's sequence in a stream, [1, T]; of the branches' tokens alone where not
    `prompts`."""
    counts = [(group_length(group), group.prompt * prompts + sum(group.branches)) for group in groups]
    return [[length for length, count in counts for _ in range(count)]]


def split_groups(batch: PackedBatch, lengths: RopeLengths) -> PackedBatch:
    """Give each group's branches of different classes a prompt each, since its tokens are turned otherwise for them."""
    parts: dict[tuple[int, Hashable], list[int]] = {}  # (group, class) -> its branches' numbers in the group
    for number, group in enumerate(batch.groups):
        for branch, fed in enumerate(group.branches):
            parts.setdefault((number, lengths.class_of(group.prompt + fed + 1)), []).append(branch)
    if len(parts) == len(batch.groups):
        return batch
    taken: list[int] = []  # indices of the old stream
    groups: list[Group] = []
    prompt_end: dict[tuple[int, int], int] = {}
    branch_start: dict[tuple[int, int], int] = {}
    group_with: dict[tuple[int, int], int] = {}
    for (number, _), branches in parts.items():
        old, start = batch.groups[number], len(taken)
        firsts = list(accumulate(old.branches, initial=old.start + old.prompt))
        taken += range(old.start, old.start + old.prompt)
        for branch in branches:
            prompt_end[number, branch], branch_start[number, branch] = start + old.prompt - 1, len(taken)
            group_with[number, branch] = len(groups)
            taken += range(firsts[branch], firsts[branch] + old.branches[branch])
        inputs = tuple(old.branches[branch] for branch in branches)
        groups.append(Group(start=start, prompt=old.prompt, branches=inputs))
    seen = [0] * len(batch.groups)
    score_at: list[int] = []
    group_of: list[int] = []
    for example, number in enumerate(batch.group_of):
        group_of.append(group_with[number, seen[number]])
        for scored in batch.examples[example].scored:
            before, first = prompt_end[number, seen[number]], branch_start[number, seen[number]]
            score_at += [first + index - 1 if index else before for index in scored]
            seen[number] += 1
    order, at = to_device([torch.tensor(taken), torch.tensor(score_at)], batch.input_ids.device)
    return replace(
        batch,
        input_ids=batch.input_ids[order],
        position_ids=batch.position_ids[order],
        token_keys=batch.token_keys[order],
        score_at=at,
        groups=tuple(groups),
        group_of=tuple(group_of),
    )

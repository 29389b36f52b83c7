"""Scores of a whole optimizer step, or of held-out windows, from the micro-batches of all processes.

A loss that compares examples gets all of them at once, in the order that they have as one micro-batch: whatever the
micro-batches really are, and whichever process scored which, it computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qpref.data.mismatch import only_partner, without_partner
from qpref.data.pack import host_columns, longest_first
from qpref.distributed.world import World
from qpref.policy.policy import Policy
from qpref.records import EXTRAS, TokenizedExample, TokenLogProbs
from qpref.staging import to_device
from qpref.training.inputs import Mismatched
from qpref.training.scoring import Scorer, Scores

PARTNERS = ("mismatched", "mismatched_reference")
Values = dict[str, Tensor]
"""[S] values by name: policy and its EXTRAS, reference, mismatched, mismatched_reference; those that losses need."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Order and lengths of the sequences that the scores of N examples with B branches in all are of.

    Attributes:
        starts: [N + 1] index of each example's first branch, and B.
        lengths: [B] of the branches, then [N] of the prompts where these are scored too.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], prompts: bool = False) -> Sequences:
        lengths = [count for example in examples for count in example.num_scored]
        if prompts:
            lengths += [len(example.prompt) - 1 for example in examples]
        starts = accumulate((len(example.branches) for example in examples), initial=0)
        return cls(tuple(starts), tuple(lengths))

    def merge(self, parts: Sequence[Sequence[int]], pieces: Sequence[Tensor], device: torch.device) -> Tensor:
        """Merge the values of parts into [S] of all examples, 0 for those of no part.

        Args:
            parts: positions of the examples of each part.
        """
        rows: list[Tensor | None] = [None] * len(self.lengths)
        for members, values in zip(parts, pieces, strict=True):
            indices = self._indices(members)
            for index, row in zip(indices, values.split([self.lengths[index] for index in indices]), strict=True):
                rows[index] = row
        missing = torch.zeros(max(self.lengths), device=device)
        return torch.cat(
            [missing[:length] if row is None else row for row, length in zip(rows, self.lengths, strict=True)]
        )

    def select(self, values: Tensor, members: Sequence[int]) -> Tensor:
        """Select the values of some examples from [S] of all, in the order of a micro-batch of these examples."""
        if list(members) == list(range(len(self.starts) - 1)):
            return values
        rows = values.split(list(self.lengths))
        return torch.cat([rows[index] for index in self._indices(members)])

    def lengths_of(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths of the sequences of some examples."""
        return tuple(self.lengths[index] for index in self._indices(members))

    def _indices(self, members: Sequence[int]) -> list[int]:
        """Return the sequences of some examples: all their branches, then their prompts where these are scored too."""
        branches = [index for member in members for index in range(self.starts[member], self.starts[member + 1])]
        first_prompt = self.starts[-1]
        return branches + [first_prompt + member for member in members if len(self.lengths) > first_prompt]


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples in the order in which a loss gets them.

    Attributes:
        weight, margin, columns: [N] float32, as a PackedBatch has them.
    """

    examples: tuple[TokenizedExample, ...]
    weight: Tensor
    margin: Tensor
    columns: Mapping[str, Tensor]

    @classmethod
    def of(cls, examples: tuple[TokenizedExample, ...], device: torch.device) -> Rows:
        columns = host_columns(examples)
        host = [torch.tensor([each.weight for each in examples]), torch.tensor([each.margin for each in examples])]
        weight, margin, *numbers = to_device([*host, *columns.values()], device)
        return cls(examples, weight, margin, dict(zip(columns, numbers, strict=True)))

    def cut(self, window: range) -> Rows:
        """Cut out the rows of a window."""
        span = slice(window.start, window.stop)
        columns = {name: numbers[span] for name, numbers in self.columns.items()}
        return Rows(self.examples[span], self.weight[span], self.margin[span], columns)


@dataclass(frozen=True, slots=True)
class WholeBatch:
    """The examples of an optimizer step, or of held-out windows, and the layout of their scores.

    Attributes:
        positions: of the examples among the rows, by index in the step.
        layout: sequences of each kind of values that the losses need.
    """

    rows: Rows
    positions: tuple[int, ...]
    layout: dict[str, Sequences]

    @classmethod
    def of(cls, scorer: Scorer, examples: Sequence[TokenizedExample], windows: Sequence[range] = ()) -> WholeBatch:
        """Order the examples as one micro-batch of each window does.

        Args:
            windows: indices of each window's examples, in the order of the windows; one window has all by default.
        """
        order: list[int] = []
        for window in windows or [range(len(examples))]:
            members = [examples[index] for index in window]
            order += [window[index] for index in longest_first(members, scorer.policy.shares_prompts)]
        ordered = tuple(examples[index] for index in order)
        rows = Rows.of(ordered, scorer.policy.device)
        return cls(rows, tuple(sorted(range(len(order)), key=order.__getitem__)), _layout(scorer, ordered))

    def collect(self, world: World, policy: Policy, parts: Sequence[Sequence[int]], pieces: Sequence[Values]) -> Values:
        """Collect the values of all examples, without a graph, from the parts of all processes.

        Args:
            parts: indices in the step of the examples of this process's parts, of which there may be none.
            pieces: values of these parts.
        """
        return self._collect(world, policy, parts, pieces, list(self.layout))

    def collect_mismatched(
        self, world: World, policy: Policy, parts: Sequence[Sequence[int]], pieces: Sequence[Values]
    ) -> Mismatched:
        """Collect the scores of the mismatched partners alone, as `collect` does."""
        names = [name for name in self.layout if name in PARTNERS]
        values = self._collect(world, policy, parts, pieces, names)
        return _mismatched(values, self.layout["mismatched"].lengths)

    def _collect(
        self, world: World, policy: Policy, parts: Sequence[Sequence[int]], pieces: Sequence[Values], names: list[str]
    ) -> Values:
        own = [self._positions_of(members) for members in parts]
        if world.size == 1 and own == [list(range(len(self.rows.examples)))]:
            return {name: pieces[0][name] for name in names}
        merged = {
            name: self.layout[name].merge(own, [piece[name] for piece in pieces], policy.device) for name in names
        }
        policy.finish_passes()
        world.add(list(merged.values()), "the scores")
        return merged

    def select(self, name: str, values: Tensor, members: Sequence[int]) -> Tensor:
        """Select the values of some examples, by index in the step, in the order of a micro-batch of them."""
        return self.layout[name].select(values, self._positions_of(members))

    def _positions_of(self, members: Sequence[int]) -> list[int]:
        return [self.positions[index] for index in members]

    def scores(self, values: Values) -> Scores:
        """Arrange the values of all examples as a micro-batch's scores."""
        return _scores(values, {name: sequences.lengths for name, sequences in self.layout.items()})

    def window(self, values: Values, window: range) -> tuple[Rows, Scores]:
        """Cut out the rows of one window, with their scores."""
        selected = {name: self.layout[name].select(each, window) for name, each in values.items()}
        lengths = {name: self.layout[name].lengths_of(window) for name in values}
        return self.rows.cut(window), _scores(selected, lengths)


def values_of(scores: Scores) -> Values:
    """Return the values of a micro-batch's scores by name, without a graph."""
    found: dict[str, Tensor | None] = {
        "policy": scores.policy.values.detach(),
        **{name: getattr(scores.policy, name) for name in EXTRAS},
        "reference": None if scores.reference is None else scores.reference.values,
    }
    own = {name: values for name, values in found.items() if values is not None}
    return own if scores.mismatched is None else own | mismatched_values(scores.mismatched)


def mismatched_values(scores: Mismatched) -> Values:
    """Return the values of mismatched partners by name."""
    values = {"mismatched": scores.policy.values.detach()}
    return values if scores.reference is None else values | {"mismatched_reference": scores.reference.values}


def _layout(scorer: Scorer, examples: Sequence[TokenizedExample]) -> dict[str, Sequences]:
    """Lay out the values that the losses need of some examples."""
    objective = scorer.objective
    own = [without_partner(example) for example in examples] if objective.needs_mismatched else examples
    layout = {"policy": Sequences.of(own, prompts="prompt" in objective.needs)}
    layout |= {name: layout["policy"] for name in EXTRAS if name in objective.needs}
    if scorer.references is not None:
        layout["reference"] = Sequences.of(own)
    if objective.needs_mismatched:
        layout["mismatched"] = Sequences.of([only_partner(example) for example in examples])
        if scorer.references is not None:
            layout["mismatched_reference"] = layout["mismatched"]
    return layout


def _scores(values: Values, lengths: dict[str, tuple[int, ...]]) -> Scores:
    reference = values.get("reference")
    return Scores(
        TokenLogProbs(
            values=values["policy"], lengths=lengths["policy"], **{name: values.get(name) for name in EXTRAS}
        ),
        None if reference is None else TokenLogProbs(values=reference, lengths=lengths["reference"]),
        _mismatched(values, lengths["mismatched"]) if "mismatched" in values else None,
    )


def _mismatched(values: Values, lengths: tuple[int, ...]) -> Mismatched:
    reference = values.get("mismatched_reference")
    return Mismatched(
        TokenLogProbs(values=values["mismatched"], lengths=lengths),
        None if reference is None else TokenLogProbs(values=reference, lengths=lengths),
    )

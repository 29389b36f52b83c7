"""Score examples under policy and reference, and lay the scores out as a loss's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qpref.data.mismatch import only_partner, without_partner
from qpref.data.pack import pack
from qpref.distributed.world import World
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.records import PackedBatch, TokenizedExample, TokenLogProbs
from qpref.training.inputs import Inputs, Labelled, Mismatched
from qpref.training.objective import Objective


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a micro-batch: the policy's, the reference's (None for losses without one) and the partners'."""

    policy: TokenLogProbs
    reference: TokenLogProbs | None
    mismatched: Mismatched | None


@dataclass(frozen=True, slots=True)
class Scorer:
    """Policy, losses and reference of one optimizer step.

    Attributes:
        references: scores of the reference; None for losses without one.
    """

    policy: Policy
    objective: Objective
    references: ReferenceStore | None

    def inputs(self, examples: Sequence[TokenizedExample]) -> tuple[PackedBatch, Inputs]:
        """Pack and score a micro-batch."""
        batch = self.pack(examples)
        return batch, self.lay_out(batch, self.scores(examples, batch))

    def scores(self, examples: Sequence[TokenizedExample], batch: PackedBatch) -> Scores:
        """Score examples, packed as `batch`, and their mismatched partners where the losses need them.

        The reference is scored before the policy: its pass leaves no graph behind.
        """
        if not self.objective.needs_mismatched:
            reference = self.reference(batch)
            return Scores(self.policy_scores(batch), reference, None)
        partners = pack([only_partner(example) for example in examples], self.policy.device)
        reference, other_reference = self._references_with_partners(batch, partners)
        own, others = logprobs_with_partners(self.policy, batch, partners, extras=self.objective.needs)
        return Scores(own, reference, Mismatched(others, other_reference))

    def lay_out(self, batch: Labelled, scores: Scores) -> Inputs:
        """Lay out a batch's scores as the losses' inputs."""
        return self.objective.inputs(batch, scores.policy, scores.reference, scores.mismatched)

    def pack(self, examples: Sequence[TokenizedExample]) -> PackedBatch:
        """Pack the examples into one stream, without their mismatched partners."""
        if self.objective.needs_mismatched:
            examples = [without_partner(example) for example in examples]
        return pack(examples, self.policy.device)

    def policy_scores(self, batch: PackedBatch) -> TokenLogProbs:
        return self.objective.score(self.policy, batch)

    def reference(self, batch: PackedBatch) -> TokenLogProbs | None:
        """Score a batch under the reference; None for losses without one."""
        return None if self.references is None else self.references.logprobs(self.policy, batch)

    def mismatched(self, examples: Sequence[TokenizedExample]) -> Mismatched:
        """Score the examples' mismatched partners alone, without a graph."""
        batch = pack([only_partner(example) for example in examples], self.policy.device)
        with torch.no_grad():
            return Mismatched(completion_logprobs(self.policy, batch), self.reference(batch))

    def without_partners(self, examples: Sequence[TokenizedExample]) -> tuple[PackedBatch, Scores]:
        """Pack and score a micro-batch without its mismatched partners, whose scores are known."""
        batch = self.pack(examples)
        reference = self.reference(batch)
        return batch, Scores(self.policy_scores(batch), reference, None)

    @contextmanager
    def sharing_references(self, world: World, examples: Sequence[TokenizedExample]) -> Iterator[None]:
        """Give all processes the reference scores of the examples that only some of them compute inside."""
        if self.references is None or world.size == 1:
            yield
            return
        missing = self.references.missing(examples)
        yield
        self.references.share(world, missing)

    def _references_with_partners(
        self, batch: PackedBatch, partners: PackedBatch
    ) -> tuple[TokenLogProbs, TokenLogProbs] | tuple[None, None]:
        """Score examples and their partners under the reference; None for losses without one."""
        if self.references is None:
            return None, None
        return self.references.logprobs_with_partners(self.policy, batch, partners)

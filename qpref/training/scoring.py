"""Score examples under policy and reference, and lay the scores out as a loss's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qpref.data.mismatch import only_partner, without_partner
from qpref.data.pack import pack
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.records import PackedBatch, TokenizedExample, TokenLogProbs
from qpref.training.inputs import Inputs, Mismatched
from qpref.training.objective import Objective


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
        """Pack and score a micro-batch.

        The reference is scored before the policy: its pass leaves no graph behind.
        """
        batch, mismatched = self.pack(examples), self.mismatched(examples)
        reference = self.reference(batch)
        return batch, self.objective.inputs(batch, self.policy_scores(batch), reference, mismatched)

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

    def mismatched(self, examples: Sequence[TokenizedExample]) -> Mismatched | None:
        """Score the examples' mismatched partners without a graph; None for losses that don't need them."""
        if not self.objective.needs_mismatched:
            return None
        batch = pack([only_partner(example) for example in examples], self.policy.device)
        with torch.no_grad():
            return Mismatched(self.policy_scores(batch), self.reference(batch))

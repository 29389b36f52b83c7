"""The state of training that changes from step to step, beside the weights and the optimizer's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from qpref.hooks.loss_state import State
from qpref.records import MetricRow
from qpref.training.best import Best
from qpref.training.heldout_scores import HeldoutScores
from qpref.training.metrics import Averages


@dataclass(slots=True)
class TrainingState:
    """Counters and running averages, all of which go into checkpoints.

    Attributes:
        step: optimizer steps done.
        tokens: tokens fed for training.
        seconds: wall time of training.
        nonfinite: consecutive steps that were skipped for a non-finite gradient.
        budget: current tokens per micro-batch; a step that runs out of memory lowers it.
        averages: metrics of the examples since the last training row.
        best: the best held-out row so far, where the recipe sets `best_by`.
        of_losses: numbers that the losses keep from step to step, as `qpref.hooks.loss_state.joined`.
        first_scores, last_scores: of the first evaluation of the held-out examples, and of the last one.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    budget: int = 0
    averages: Averages = field(default_factory=Averages)
    best: Best | None = None
    of_losses: State = field(default_factory=dict)
    first_scores: HeldoutScores | None = None
    last_scores: HeldoutScores | None = None

    def row(self, split: Literal["train", "eval"], values: Mapping[str, float]) -> MetricRow:
        """Make a metric row of the values as of the current step."""
        return MetricRow(step=self.step, split=split, values=dict(values), tokens=self.tokens, seconds=self.seconds)

    def note_heldout(self, chosen: Tensor, rejected: Tensor) -> None:
        """Keep [N] log-probabilities of the held-out examples' responses as of the current step."""
        self.last_scores = HeldoutScores(step=self.step, chosen=chosen, rejected=rejected)
        self.first_scores = self.first_scores or self.last_scores

    @property
    def is_best(self) -> bool:
        """True where the current step has the best held-out row so far."""
        return self.best is not None and self.best.step == self.step

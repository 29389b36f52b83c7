"""The training objective: the loss plugins that a recipe chose, called and checked against their contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qpref.errors import RecipeError
from qpref.hooks.loss_state import (
    State,
    joined,
    of_loss,
    refuse_other_state,
)
from qpref.hooks.types import ListLoss, UnpairedLoss
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.recipe.choices import LossChoice, joint_needs
from qpref.recipe.loss_columns import joint_columns
from qpref.recipe.schedule import Schedule
from qpref.records import LossOutput, PackedBatch, TokenLogProbs
from qpref.training.inputs import (
    Inputs,
    Labelled,
    Mismatched,
    list_inputs,
    paired_inputs,
    tensors_of,
    unpaired_inputs,
    with_tokens,
)
from qpref.training.loss_caller import LossCaller, broken, guarded


@dataclass(frozen=True, slots=True)
class Objective:
    """One loss, or a weighted sum of several.

    Attributes:
        choices: the losses, with options that may change over the run.
        callers: the same losses, built with the options of one step.
        weights: their factors in the sum at that step.
        class_counts: desirable and undesirable training examples.
        state: of the losses after the last step, as `qpref.hooks.loss_state.joined`; empty before the first.
    """

    choices: tuple[LossChoice, ...]
    callers: tuple[LossCaller, ...]
    weights: tuple[float, ...]
    class_counts: tuple[int, int] = (0, 0)
    state: State = field(default_factory=dict)

    @classmethod
    def of(cls, choices: tuple[LossChoice, ...], class_counts: tuple[int, int] = (0, 0)) -> Objective:
        callers = tuple(LossCaller.of(choice.at(0.0)) for choice in choices)
        return cls(choices, callers, tuple(choice.weight_at(0.0) for choice in choices), class_counts)

    def at(self, progress: float) -> Objective:
        """Return the objective at `progress` of the run, 0 to 1; itself where nothing is on a schedule."""
        if not any(choice.is_scheduled for choice in self.choices):
            return self
        callers = tuple(LossCaller.of(choice.at(progress)) for choice in self.choices)
        return replace(self, callers=callers, weights=tuple(choice.weight_at(progress) for choice in self.choices))

    @property
    def is_paired(self) -> bool:
        """True where the losses take pairs, or lists of them, not single completions."""
        return not isinstance(self.choices[0].plugin.record, UnpairedLoss)

    @property
    def is_listed(self) -> bool:
        """True where the losses take ranked lists."""
        return isinstance(self.choices[0].plugin.record, ListLoss)

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that some loss needs, as `qpref.recipe.choices.joint_needs`."""
        return joint_needs(caller.choice for caller in self.callers)

    @property
    def columns(self) -> tuple[str, ...]:
        """Numeric columns of the rows that the losses read."""
        return joint_columns(caller.choice for caller in self.callers)

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.needs

    @property
    def ignores_margins(self) -> bool:
        """True where every loss declares that it has no use for the rows' margins."""
        ignored = []
        for caller in self.callers:
            with guarded(caller.choice, "ignores"):
                ignored.append(caller.choice.plugin.record.ignores_of(caller.choice.options))
        return all("margin" in each for each in ignored)

    @property
    def needs_mismatched(self) -> bool:
        """True where examples have a mismatched partner, scored apart: no gradient flows through it."""
        return "mismatched" in self.needs

    @property
    def _part_names(self) -> list[str]:
        """Metric names of the losses' own values; losses of one name are numbered by their position."""
        names = [caller.choice.plugin.record.name for caller in self.callers]
        return [
            f"loss/{name}" if names.count(name) == 1 else f"loss/{name}.{position}"
            for position, name in enumerate(names)
        ]

    def starts_at(self) -> float | None:
        """Return the loss of an example on which policy and reference agree; None where that is no constant.

        That of a list depends on its length.
        """
        if self.is_listed:
            return None
        starts = [caller.starts_at() for caller in self.callers]
        if any(start is None for start in starts):
            return None
        return sum(weight * (start or 0.0) for weight, start in zip(self.weights, starts, strict=True))

    def scheduled_options(self) -> dict[str, float]:
        """Return the values of the options and weights that follow a schedule, by metric name: `option/beta`; of one
        of several losses `option/dpo.beta`."""
        parts = [name.removeprefix("loss/") + "." if len(self.choices) > 1 else "" for name in self._part_names]
        found: dict[str, float] = {}
        for choice, caller, weight, part in zip(self.choices, self.callers, self.weights, parts, strict=True):
            options = caller.choice.options
            found |= {f"option/{part}{name}": float(getattr(options, name)) for name in choice.options.schedules}
            if isinstance(choice.weight, Schedule):
                found[f"option/{part}weight"] = weight
        return found

    def refuse_bad_schedule(self, total_steps: int) -> None:
        """Build every loss for every step, so that no option leaves its range in the middle of a run.

        Raises:
            RecipeError: an option does, or a loss's needs or columns change over its schedule.
        """
        for step in range(total_steps):
            ahead = self.at(progress(step, total_steps))
            if ahead is self:
                return
            if ahead.needs != self.needs:
                raise RecipeError(f"[loss] the loss's needs change at step {step + 1} of its schedule")
            if ahead.columns != self.columns:
                raise RecipeError(f"[loss] the loss's columns change at step {step + 1} of its schedule")

    @property
    def sees_whole_steps(self) -> bool:
        """True where some loss has to see all examples of an optimizer step at once.

        So too where one takes the mismatched completions of the whole step and another its own examples'.
        """
        scopes = self._scopes
        of_examples = any("mismatched" in needs for needs, scope in scopes if scope == "example")
        return any(scope == "step" for _, scope in scopes) or (self.sees_steps_mismatched and of_examples)

    @property
    def sees_steps_mismatched(self) -> bool:
        """True where some loss takes the mismatched completions of the whole optimizer step."""
        return any(scope == "mismatched" for _, scope in self._scopes)

    @property
    def _scopes(self) -> list[tuple[frozenset[str], str]]:
        """Needs and scope of each loss."""
        chosen = [(caller.choice.plugin.record, caller.choice.options) for caller in self.callers]
        return [(record.needs_of(options), record.scope_of(options)) for record, options in chosen]

    def __call__(self, inputs: Inputs) -> LossOutput:
        """Sum the weighted losses of each example. The metrics are the first loss's, and each loss's own value.

        The output's state is that of all losses after the step, for `state`.
        """
        outputs = [caller(inputs, of_loss(self.state, position)) for position, caller in enumerate(self.callers)]
        state = joined([output.state for output in outputs])
        if self.weights == (1.0,) and not isinstance(self.choices[0].weight, Schedule):
            return replace(outputs[0], state=state)
        weighted = zip(self.weights, outputs, strict=True)
        losses = torch.stack([weight * output.losses for weight, output in weighted]).sum(0)
        parts = {name: output.losses.detach() for name, output in zip(self._part_names, outputs, strict=True)}
        return LossOutput(losses=losses, metrics={**outputs[0].metrics, **parts}, state=state)

    def not_finite(self, inputs: Inputs, output: LossOutput) -> Tensor:
        """Find the losses that made a non-finite value of finite log-probabilities.

        Returns:
            [losses] bool.
        """
        is_good = torch.stack([values.detach().isfinite().all() for values in tensors_of(inputs)]).all()
        made = [
            [output.metrics.get(name, output.losses).detach(), *of_loss(output.state, position).values()]
            for position, name in enumerate(self._part_names)
        ]
        return torch.stack([is_good & ~torch.stack([each.isfinite().all() for each in own]).all() for own in made])

    def refuse_not_finite(self, faults: Sequence[float], step: int) -> None:
        """Stop where `not_finite` found a loss.

        Args:
            faults: a number for each loss, 0 for a good one.
            step: for the message, from 1.

        Raises:
            PluginError: names the loss.
        """
        for caller, bad in zip(self.callers, faults, strict=True):
            if bad:
                raise broken(
                    caller.choice, f"returned a value that is not finite at step {step}, of log-probabilities that are"
                )

    def refuse_other_state(self, saved: State, step: int) -> None:
        """Refuse a checkpoint's state of other losses, as `qpref.hooks.loss_state.refuse_other_state`."""
        refuse_other_state(saved, [caller.initial for caller in self.callers], step)

    def score(self, policy: Policy, batch: PackedBatch) -> TokenLogProbs:
        """Score a batch under the policy, with the extras that the losses need."""
        needs = self.needs
        return completion_logprobs(policy, batch, prompts="prompt" in needs, extras=needs)

    def inputs(
        self,
        batch: Labelled,
        scores: TokenLogProbs,
        reference: TokenLogProbs | None,
        mismatched: Mismatched | None = None,
    ) -> Inputs:
        """Lay out a batch's scores as the losses' inputs."""
        if "tokens" in self.needs:
            num_branches = None if self.is_paired else 1
            scores = with_tokens(scores, batch.examples, num_branches, prompts="prompt" in self.needs)
        if self.is_listed:
            return list_inputs(batch, scores, reference, needs_scores="scores" in self.needs)
        if self.is_paired:
            return paired_inputs(batch, scores, reference, prompts="prompt" in self.needs)
        return unpaired_inputs(batch, scores, reference, self.class_counts, mismatched)


def progress(step: int, total_steps: int) -> float:
    """Return the position of optimizer step `step` (from 0) in the run: 0 for the first, 1 for the last."""
    return step / max(1, total_steps - 1)

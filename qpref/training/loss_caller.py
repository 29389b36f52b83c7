"""One loss plugin: built, called, and held to its contract at each call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from qpref.attention.determinism import needs_nondeterminism
from qpref.errors import PluginError
from qpref.hooks import border
from qpref.hooks.loss_state import Initial, State, initial_problem, state_of, written_problem
from qpref.hooks.metric_names import MAX_METRICS, name_problem
from qpref.hooks.types import Scope
from qpref.policy.out_of_memory import is_out_of_memory
from qpref.recipe.choices import Choice
from qpref.records import ListInputs, LossOutput, PairedInputs
from qpref.training.inputs import Inputs


@dataclass(frozen=True, slots=True)
class LossCaller:
    """Calls a loss plugin and checks it against its contract.

    Attributes:
        choice: the plugin and its options, for messages.
        function: what its `build` returned.
        initial: first values of the state that it keeps between steps.
    """

    choice: Choice
    function: Any
    initial: Initial = field(default_factory=dict)

    @classmethod
    def of(cls, choice: Choice) -> LossCaller:
        record = choice.plugin.record
        with guarded(choice, "build"):
            unknown = record.needs_of(choice.options) - record.may_need
            scope = record.scope_of(choice.options)
            function = record.build(choice.options)
            initial = record.state_of(choice.options)
        if scope not in get_args(Scope):
            raise broken(choice, f"has the scope {scope!r}, not one of {', '.join(map(repr, get_args(Scope)))}")
        if problem := initial_problem(initial):
            raise broken(choice, problem)
        if initial and scope != "step":
            raise broken(choice, f"has a state and the scope {scope!r}; only a loss of scope 'step' may have one")
        if unknown:
            raise PluginError(
                f"{choice.plugin.offer} needs {', '.join(sorted(unknown))}, which this qpref doesn't have for "
                f"{record.unit}"
            )
        return cls(choice, function, initial)

    def starts_at(self) -> float | None:
        """Return the loss of an example on which policy and reference agree; None where that is no constant.

        Raises:
            PluginError: the plugin raised.
        """
        starts_at = self.choice.plugin.record.starts_at
        with guarded(self.choice, "starts_at"):
            value = None if starts_at is None else starts_at(self.choice.options)
            return None if value is None else float(value)

    def __call__(self, inputs: Inputs, known: State = MappingProxyType({})) -> LossOutput:
        """Compute the loss of each example.

        Args:
            known: its state after the last step; without one it has its first values.

        Raises:
            PluginError: the loss raised, or returned something other than one value an example.
        """
        num_examples = _num_examples(inputs)
        own = inputs.policy.chosen if isinstance(inputs, PairedInputs) else inputs.policy
        if self.initial:
            inputs = replace(inputs, state=state_of(self.initial, known, own.values))
        with guarded(self.choice, "", random=True):
            output: LossOutput = self.function(inputs)
        self._check_output(output, num_examples)
        if problem := written_problem(inputs.state, output.state):
            raise broken(self.choice, problem)
        return replace(output, state={**inputs.state, **output.state}) if self.initial else output

    def _check_output(self, output: Any, num_examples: int) -> None:
        if not isinstance(output, LossOutput):
            raise broken(self.choice, f"returned {type(output).__name__}, not LossOutput")
        if not isinstance(output.losses, Tensor) or output.losses.shape != (num_examples,):
            shape = tuple(output.losses.shape) if isinstance(output.losses, Tensor) else type(output.losses).__name__
            raise broken(
                self.choice,
                f"returned losses of shape {shape} for {num_examples} examples; it has to be ({num_examples},)",
            )
        if torch.is_grad_enabled() and not output.losses.requires_grad:
            raise broken(self.choice, "returned losses without a gradient")
        if not isinstance(output.metrics, Mapping):
            raise broken(self.choice, f"returned metrics as {type(output.metrics).__name__}, not by name")
        if len(output.metrics) > MAX_METRICS:
            raise broken(self.choice, f"returned {len(output.metrics):,} metrics; at most {MAX_METRICS} are allowed")
        for name, value in output.metrics.items():
            if problem := name_problem(name):
                raise broken(self.choice, f"returned a metric that {problem}")
            if not isinstance(value, Tensor) or value.shape != (num_examples,) or value.requires_grad:
                raise broken(self.choice, f"returned the metric {name} not as one detached value an example")


def _num_examples(inputs: Inputs) -> int:
    if isinstance(inputs, ListInputs):
        return len(inputs.sizes)
    return len(inputs.policy.chosen.lengths if isinstance(inputs, PairedInputs) else inputs.policy.lengths)


def guarded(choice: Choice, call: str, *, random: bool = False) -> AbstractContextManager[None]:
    """Guard a call of a loss, or of another function of its record; memory that runs out is the caller's to handle."""
    what = f"{call} " if call else ""
    return border.guarded(
        f"{what and f'{call} of '}loss '{choice.plugin.record.name}' ({choice.plugin.offer})",
        lambda error: broken(choice, f"{what}raised {error}"),
        lambda change: broken(choice, f"{what}{change}"),
        passes=lambda error: is_out_of_memory(error) or needs_nondeterminism(error),
        random=random,
    )


def broken(choice: Choice, what: str) -> PluginError:
    """Make the error that names a loss."""
    name = choice.plugin.record.name
    return PluginError(f"loss '{name}' ({choice.plugin.offer}) {what}", "report it to the plugin's author")

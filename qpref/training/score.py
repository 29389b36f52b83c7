"""One micro-batch from tokens to loss values: the policy's scores, the reference's, the loss plugin's verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.errors import PluginError
from qpref.hooks.types import LossFunction
from qpref.plan import Choice
from qpref.policy.load import Policy
from qpref.policy.logprobs import completion_logprobs, pair_logprobs
from qpref.policy.reference import ReferenceMemory
from qpref.records import LossOutput, PackedBatch, PairedInputs


@dataclass(frozen=True, slots=True)
class LossCaller:
    """Calls a loss plugin and holds it to its contract.

    Attributes:
        choice: the plugin and its options, for messages.
        function: what its `build` returned.
    """

    choice: Choice
    function: LossFunction

    @classmethod
    def of(cls, choice: Choice) -> LossCaller:
        unknown = choice.plugin.record.needs - {"reference"}
        if unknown:
            raise PluginError(
                f"{choice.plugin.offer} needs {', '.join(sorted(unknown))}, which this qpref doesn't have"
            )
        try:
            return cls(choice, choice.plugin.record.build(choice.options))
        except (Exception, SystemExit) as error:
            raise _broken(choice, f"build raised {type(error).__name__}: {error}") from error

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.choice.plugin.record.needs

    def starts_at(self) -> float | None:
        """The loss of a pair on which policy and reference are the same; None where that is no constant.

        Raises:
            PluginError: the plugin raised instead of saying so.
        """
        starts_at = self.choice.plugin.record.starts_at
        try:
            return None if starts_at is None else float(starts_at(self.choice.options))
        except (Exception, SystemExit) as error:
            raise _broken(self.choice, f"starts_at raised {type(error).__name__}: {error}") from error

    def __call__(self, inputs: PairedInputs) -> LossOutput:
        """The loss of each pair.

        Raises:
            PluginError: the loss raised, or returned something other than one value a pair.
        """
        num_pairs = len(inputs.policy.chosen.lengths)
        try:
            output = self.function(inputs)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise _broken(self.choice, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(output, LossOutput):
            raise _broken(self.choice, f"returned {type(output).__name__}, not LossOutput")
        if not isinstance(output.losses, Tensor) or output.losses.shape != (num_pairs,):
            shape = tuple(output.losses.shape) if isinstance(output.losses, Tensor) else type(output.losses).__name__
            raise _broken(
                self.choice, f"returned losses of shape {shape} for {num_pairs} pairs; it has to be ({num_pairs},)"
            )
        if torch.is_grad_enabled() and not output.losses.requires_grad:
            raise _broken(self.choice, "returned losses without a gradient")
        if not isinstance(output.metrics, Mapping):
            raise _broken(self.choice, f"returned metrics as {type(output.metrics).__name__}, not by name")
        for name, value in output.metrics.items():
            if not isinstance(value, Tensor) or value.shape != (num_pairs,) or value.requires_grad:
                raise _broken(self.choice, f"returned the metric {name} not as one detached value a pair")
        return output


def _broken(choice: Choice, what: str) -> PluginError:
    name = choice.plugin.record.name
    return PluginError(f"loss '{name}' ({choice.plugin.offer}) {what}", "report it to the plugin's author")


def score_pairs(policy: Policy, batch: PackedBatch, memory: ReferenceMemory | None) -> PairedInputs:
    """What a loss sees of a batch of pairs. The reference goes first: its pass leaves no graph behind.

    Args:
        policy: in training mode with gradient, or frozen, as the caller has set it.
        batch: pairs.
        memory: where reference scores are kept; None for a loss that needs none.
    """
    reference = pair_logprobs(memory.logprobs(policy, batch)) if memory is not None else None
    scores = pair_logprobs(completion_logprobs(policy, batch))
    return PairedInputs(policy=scores, reference=reference, margin=batch.margin)


def pair_metrics(inputs: PairedInputs, output: LossOutput) -> Mapping[str, Tensor]:
    """[N] metrics of a batch: the loss's own, and what the core knows of any loss."""
    chosen, rejected = inputs.policy.chosen.total.detach(), inputs.policy.rejected.total.detach()
    return {"loss": output.losses.detach(), **output.metrics, "logps/chosen": chosen, "logps/rejected": rejected}

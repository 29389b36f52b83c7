"""Advice on a loss that breaks a rule, a sentence for each."""

from __future__ import annotations

from collections.abc import Mapping

from qpref.testing.results import Result

ADVICE: Mapping[str, str] = {
    "record": "correct the record that the hook yields",
    "needs": "list in `needs` every input that the function reads",
    "used needs": "use the input, or leave it out of `needs` or `columns`: a need costs time in every step, and a "
    "column refuses rows without it",
    "one value per example": "return losses of shape [N], one for each example, computed from the policy's "
    "log-probabilities without .detach(), .item() or a mean: the loop divides",
    "dtype": "leave out .float(), .double() and .half(), and make constants with the inputs' dtype",
    "gradient": "leave out .detach(), .data, .item() and torch.no_grad() around what has to be learned, or declare "
    "`detaches`",
    "finite": "use logsigmoid, logaddexp, expm1 or clamp in place of log, exp and division, and guard a division by a "
    "deviation that can be 0",
    "independence": "compute each example's loss from that example alone: no mean, sum, sort or padding over the "
    'batch; or declare scope = "step"',
    "scale": "take means over the step, not sums, and don't divide by the number of examples: the loop does",
    "no state": "keep nothing between calls, draw no random numbers, change no input in place (add_, mul_) and compute "
    "the same values in an evaluation",
    "state": 'declare scope = "step", and return each value of `state` in LossOutput.state, computed from all examples '
    "alike and finite at the extremes",
    "start": "correct `starts_at`, or leave it out where the loss starts at no constant",
    "direction": "look for a flipped sign, exchanged responses or a label that isn't used; a loss that means it "
    "declares is_monotone = False",
    "reference": "subtract the reference's log-probabilities of the same response, in the same measure: total from "
    "total, or mean from mean",
    "reward": "report beta times (policy less reference) of each side under its own name: "
    "reward_metrics(chosen, rejected)",
    "margin": 'subtract inputs.margin from the reward margin, or declare ignores = {"margin"}',
    "every token": "use .total, .mean or .sum(...), which take all tokens of a response, also the one that ends it",
    "device": "make tensors by x.new_full(...), torch.zeros_like(x) or device=x.device, with x from the inputs, inside "
    "the loss function; move constants by .to(x.device)",
    "log ratios": "let policy and reference enter only as policy less reference, or leave log_ratios_only out",
    "swap": "treat both sides' rewards alike: the same factor and the same reference",
    "lists": "take each list by inputs.by_list(...), compare only responses of different inputs.ranks, and return the "
    "metrics of list_reward_metrics(rewards, inputs)",
    "metrics": "return the metrics of reward_metrics(...), and your own as detached [N] tensors under their own names",
}
"""Rule -> what to change."""


def advice_on(result: Result) -> str:
    """Return what to change in a loss for this result; empty where the rule isn't broken."""
    return ADVICE[result.rule] if result.status == "broken" else ""

"""Inputs and output of a loss, and a line of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

EXTRAS = ("log_sum_squares", "entropy")
"""Fields of `TokenLogProbs` that are computed with the values where a loss needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogProbs:
    """Log-probabilities of the response tokens of N sequences, concatenated.

    Lengths are host integers, not a tensor: `split` needs no device-to-host copy, and each sequence is summed in the
    same order whatever it is packed with.

    Attributes:
        values: [S] nats; float32 in a run, float64 under the conformance checks.
        lengths: tokens of each sequence, S in total; at least 1 for a response, 0 for a prompt of one token.
        log_sum_squares: [S] detached, log of the sum of squared probabilities over the vocabulary at each position;
            None unless a loss needs it.
        entropy: [S] detached, entropy over the vocabulary at each position in nats; None unless a loss needs it.
        tokens: [S] int64, ids of the tokens; None unless a loss needs them.
        mask: [S] bool, True for tokens that count; None unless a loss needs `tokens`. Tokens that the row's masks
            exclude are here only under `[data] mask = "loss"`.
    """

    values: Tensor
    lengths: tuple[int, ...]
    log_sum_squares: Tensor | None = None
    entropy: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def by_token(self) -> dict[str, Tensor]:
        """Return everything that has one number for each token, by field."""
        names = ("values", *EXTRAS, "tokens", "mask")
        found = {name: getattr(self, name) for name in names}
        return {name: values for name, values in found.items() if values is not None}

    def sum(self, values: Tensor) -> Tensor:
        """[N] sum over each sequence of what has one number for each token, added in the order of `total`.

        Args:
            values: [S], such as weighted log-probabilities.
        """
        import torch

        return torch.stack([piece.sum() for piece in values.split(list(self.lengths))])

    @property
    def total(self) -> Tensor:
        """[N] summed log-probability of each sequence."""
        return self.sum(self.values)

    @property
    def count(self) -> Tensor:
        """[N] number of tokens of each sequence, in the dtype of `values`."""
        import torch

        device = self.values.device
        host = torch.tensor(self.lengths, dtype=self.values.dtype, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    @property
    def mean(self) -> Tensor:
        """[N] log-probability per token of each sequence."""
        return self.total / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogProbs:
    """Log-probabilities of the chosen and the rejected responses of N pairs.

    Attributes:
        prompt: log-probabilities of the prompts, without each first token; None unless a loss needs them, and always
            None for a reference.
    """

    chosen: TokenLogProbs
    rejected: TokenLogProbs
    prompt: TokenLogProbs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedInputs:
    """Inputs of a paired loss.

    Attributes:
        policy: with gradient.
        reference: without gradient; None where the loss doesn't need it.
        margin: [N] margin of each row, 0 by default.
        columns: name -> [N] numbers of the rows, for the columns that the loss's record names; in the dtype and on the
            device of the log-probabilities.
        state: name -> what the loss has kept since the steps before, for the names in its record's `state`.
    """

    policy: PairLogProbs
    reference: PairLogProbs | None
    margin: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedInputs:
    """Inputs of an unpaired loss.

    Attributes:
        policy: the N completions, with gradient.
        reference: the N completions, without gradient; None where the loss doesn't need it.
        mismatched_policy, mismatched_reference: another example's completion after each prompt, without gradient;
            None where the loss doesn't need them. Of the N examples; in scope "mismatched" of the whole optimizer
            step, M >= N of them in no particular order.
        desirable: [N] bool.
        class_counts: number of desirable and undesirable examples in the whole training set.
        columns, state: as in `PairedInputs`.
    """

    policy: TokenLogProbs
    reference: TokenLogProbs | None
    mismatched_policy: TokenLogProbs | None = None
    mismatched_reference: TokenLogProbs | None = None
    desirable: Tensor
    class_counts: tuple[int, int]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListInputs:
    """Inputs of a list loss: N lists with R responses in all, list after list, the best response of each first.

    Attributes:
        policy: the R responses, with gradient.
        reference: the R responses, without gradient; None where the loss doesn't need it.
        sizes: responses of each list, at least 2; host integers, so that `split` needs no device-to-host copy.
        ranks: [R] int64, rank of each response in its list, from 1; equal for a tie, as in 1, 2, 2, 4.
        scores: [R] scores of the row, higher is better; None unless a loss needs them.
        margin: [N] margin of each row, 0 by default.
        columns, state: as in `PairedInputs`; columns are numbers of whole rows, [N].
    """

    policy: TokenLogProbs
    reference: TokenLogProbs | None
    sizes: tuple[int, ...]
    ranks: Tensor
    scores: Tensor | None = None
    margin: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def by_list(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split [R] values of the responses into one tensor [K] for each list."""
        pieces: tuple[Tensor, ...] = values.split(list(self.sizes))
        return pieces

    def is_better(self) -> tuple[Tensor, ...]:
        """Return [K, K] bool for each list: True at i, j where response i ranks above response j."""
        return tuple(ranks[:, None] < ranks[None, :] for ranks in self.by_list(self.ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Output of a loss: one value per example, never a mean (the loop divides, once, by the step's examples).

    Attributes:
        losses: [N] with gradient.
        metrics: name -> [N], detached, NaN where undefined for an example. The usual names: rewards/chosen,
            rewards/rejected, rewards/margins, rewards/accuracies.
        state: name -> value to keep for the next step, detached; names that are left out stay as they are. It counts
            only where the optimizer takes the step, never in an evaluation.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """A line of metrics.jsonl.

    Attributes:
        step: number of optimizer steps done.
        split: "train" or "eval".
        values: metric name -> value; NaN where undefined. Held-out names start with eval_.
        tokens: input tokens of the policy in training since the start of the run, prompts once per pair.
        seconds: wall-clock seconds of training since the start of the run, including those before a resume.
    """

    step: int
    split: Literal["train", "eval"]
    values: Mapping[str, float]
    tokens: int
    seconds: float

"""Every frozen record that crosses a layer.

Shapes are given with N = pairs or examples, T = tokens of a packed stream, S = scored tokens (those of all responses).
Importing this module does not import torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a row came from; `line` counts from 1 (in a JSON array or a table: the row), and 0 is all of the source."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as a reader found it: column names to JSON values."""

    values: Mapping[str, object]
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or suspect, with one row, or with a whole source. An error refuses the row; a warning
    does not, and what is said of a whole source is a warning."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        extra: further keys that chat templates read: name, tool_calls, tool_call_id. Their texts are checked like
            `content`.
    """

    role: str
    content: str
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt with the response that was preferred and the one that was not.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this pair's loss (the loop applies it, a loss never sees it).
        margin: how much better `chosen` has to be, in units of the implicit reward (nats times beta).
        number: which pair of its row this is; a row of k ranked responses makes k (k - 1) / 2.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    number: int = 0
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedExample:
    """A prompt with one response and whether it is desirable.

    Attributes:
        label: whether the response is desirable.
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this example's loss (the loop applies it, a loss never sees it).
        number: which pair of its row it was taken from.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    number: int = 0
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """One prompt and its branches as token ids: chosen, then rejected; or one completion, with its mismatched partner
    after it where the loss asks for one.

    Arrays of C ints rather than lists: a list of Python ints takes nine times the memory.

    Attributes:
        truncated: for each branch, whether its end, and so its stop token, was cut off.
        prompt_cut: whether earlier turns, or the beginning of the last, were cut off.
        label: whether the completion is desirable; None for a pair.
        number: which pair of its row it is, or was taken from.
    """

    prompt: array[int]
    branches: tuple[array[int], ...]
    truncated: tuple[bool, ...]
    prompt_cut: bool = False
    weight: float
    margin: float
    label: bool | None = None
    number: int = 0
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Where one example stands in the stream.

    Attributes:
        start: index of the prompt's first token.
        prompt: tokens of the prompt, at least 1.
        branches: tokens fed of each branch: its length less one, so 0 for a response of one token.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch as one stream of T tokens; S scored tokens, K branches per example, N examples.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, counted from each prompt's start.
        groups: one for each example, in the examples' order.
        score_at: [S] int64, the stream index whose hidden state predicts the token.
        score_token: [S] int64, the token that is predicted.
        lengths: scored tokens of each branch; branch k of example i is number i * K + k, in the order of `score_at`.
        weight, margin: [N] float32.
        examples: what was packed.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: tuple[Group, ...]
    score_at: Tensor
    score_token: Tensor
    lengths: tuple[int, ...]
    weight: Tensor
    margin: Tensor
    examples: tuple[TokenizedExample, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogProbs:
    """Log-probabilities of the response tokens of N sequences, one sequence after the other.

    The lengths are host integers, not a tensor: sums run over `split` pieces, so each sequence is summed in the same
    order whatever it is packed with, and no device-to-host copy is needed.

    Attributes:
        values: [S] nats; float32 in a run, float64 under the conformance checks.
        lengths: tokens of each sequence, adding up to S; at least 1 for a response, 0 for a prompt of one token.
        log_sum_squares: [S] detached, log of the sum over the vocabulary of squared probabilities at each position;
            None unless a loss needs it.
    """

    values: Tensor
    lengths: tuple[int, ...]
    log_sum_squares: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """[N] summed log-probability of each sequence."""
        import torch

        return torch.stack([piece.sum() for piece in self.values.split(list(self.lengths))])

    @property
    def count(self) -> Tensor:
        """[N] number of tokens of each sequence, in the dtype of `values`."""
        return self.values.new_tensor(self.lengths)

    @property
    def mean(self) -> Tensor:
        """[N] log-probability per token of each sequence."""
        return self.total / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogProbs:
    """Log-probabilities of the chosen and of the rejected responses of the same N pairs.

    Attributes:
        prompt: of the prompts' tokens, each but the first; None unless a loss needs it, and for a reference always.
    """

    chosen: TokenLogProbs
    rejected: TokenLogProbs
    prompt: TokenLogProbs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedInputs:
    """What a paired loss sees.

    Attributes:
        policy: with gradient.
        reference: without gradient; None where the loss doesn't need it.
        margin: [N] the rows' margins, 0 where a row has none.
    """

    policy: PairLogProbs
    reference: PairLogProbs | None
    margin: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedInputs:
    """What an unpaired loss sees.

    Attributes:
        policy: of the N completions, with gradient.
        reference: of the same, without gradient; None where the loss doesn't need it.
        mismatched_policy, mismatched_reference: of another example's completion after each prompt, without gradient;
            None where the loss doesn't need them.
        desirable: [N] bool.
        class_counts: desirable and undesirable examples of the whole training set.
    """

    policy: TokenLogProbs
    reference: TokenLogProbs | None
    mismatched_policy: TokenLogProbs | None = None
    mismatched_reference: TokenLogProbs | None = None
    desirable: Tensor
    class_counts: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a loss returns: one value per example, never a mean (the loop divides, once, by the step's examples).

    Attributes:
        losses: [N] with gradient.
        metrics: name -> [N], detached, NaN where undefined for an example. The field's names: rewards/chosen,
            rewards/rejected, rewards/margins, rewards/accuracies.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of metrics.jsonl.

    Attributes:
        step: optimizer steps done.
        split: "train" or "eval".
        values: metric name -> value; NaN where undefined. Held-out names start with eval_.
        tokens: tokens fed to the policy for training since the run began, prompts once per pair.
        seconds: wall seconds of training since the run began, those before a resume included.
    """

    step: int
    split: Literal["train", "eval"]
    values: Mapping[str, float]
    tokens: int
    seconds: float

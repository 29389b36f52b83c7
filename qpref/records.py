"""Frozen records that layers pass to each other.

Tensor shapes: N pairs or examples, T tokens of a packed stream, S scored tokens (the tokens of all responses).
Importing this module does not import torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Spans = tuple[tuple[int, int], ...]
"""Parts of a text: the first character of each, from 0, and the first one after it."""
EXTRAS = ("log_sum_squares", "entropy")
"""Fields of `TokenLogProbs` that are computed with the values where a loss needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Location of a row: path and line, from 1. In a JSON array or a table, the row number; 0 is the whole source."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as its reader parsed it: column names to JSON values."""

    values: Mapping[str, object]
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem of one row or of a whole source (line 0). An error refuses the row, or all rows of the source."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A turn of a conversation.

    Attributes:
        extra: other keys that chat templates read: name, tool_calls, tool_call_id, reasoning_content. Their texts are
            checked like `content`, and tool calls have one form: `{"type": "function", "function": {"name": ...,
            "arguments": {...}}}`, arguments that are no object as the text that they are.
        masked: parts of `content` that don't count where it is a response; a prompt never counts. They make no
            difference to whether two messages are the same text.
    """

    role: str
    content: str
    extra: Mapping[str, object] = field(default_factory=dict)
    masked: Spans = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt with its preferred and its rejected response.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this pair's loss (applied by the training loop, a loss never sees it).
        margin: how much better `chosen` has to be, in units of the implicit reward (nats times beta).
        number: index of the pair within its row; k ranked responses make up to k (k - 1) / 2 pairs.
        positions: of chosen and rejected in the row's lists of responses; 0 where a column holds one response.
        columns: numbers of the row that the losses read, by column.
        scores: the row's scores of chosen and rejected, higher is better; None for a row without scores.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    number: int = 0
    positions: tuple[int, int] = field(default=(0, 0), compare=False)
    columns: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float, float] | None = field(default=None, compare=False)
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedList:
    """A prompt with at least two ranked responses, the best first.

    Attributes:
        ranks: of each response, from 1; equal for a tie, as in 1, 2, 2, 4. At least two differ.
        scores: of each response, higher is better; empty for a row without scores.
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this list's loss (applied by the training loop, a loss never sees it).
        margin: how much better a response has to be than a worse one, as in `PreferencePair`.
        number: index of the list within its row.
        columns: numbers of the row that the losses read, by column; none of a list loss.
    """

    prompt: tuple[Message, ...]
    responses: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] = ()
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedExample:
    """A prompt with one labelled response.

    Attributes:
        label: True for a desirable response.
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this example's loss (applied by the training loop, a loss never sees it).
        number: index within its row; the two halves of a pair have the same number.
        columns: numbers of the row that the losses read, by column.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """Token ids of a prompt and its branches: chosen and rejected, a list's responses best first, or one completion.

    A completion has its mismatched partner as second branch where the loss needs one. The ids are arrays of C ints: a
    list of Python ints takes nine times the memory.

    Attributes:
        truncated: for each branch, True if its end, and so its stop token, was cut off.
        prompt_cut: True if earlier turns, or the start of the last one, were cut off.
        masks: for each branch one byte a token, 1 for a token that counts and 0 for one that the row or the recipe
            masks; empty where all tokens count.
        scores_masked: True if masked tokens are scored all the same, for a loss that reads the mask.
        label: True for a desirable completion; None for a pair or a list.
        ranks, scores: of each branch of a list, as in `RankedList`; empty for others.
        number: index within its row, as in `PreferencePair` and `UnpairedExample`.
        columns: numbers of the row that the losses read, by column.
    """

    prompt: array[int]
    branches: tuple[array[int], ...]
    truncated: tuple[bool, ...]
    prompt_cut: bool = False
    masks: tuple[bytes, ...] = ()
    scores_masked: bool = False
    weight: float
    margin: float
    label: bool | None = None
    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source

    @property
    def scored(self) -> tuple[Sequence[int], ...]:
        """Indices of the tokens of each branch that have a log-probability: all, or those that count."""
        if not self.masks or self.scores_masked:
            return tuple(range(len(branch)) for branch in self.branches)
        return tuple([index for index, counts in enumerate(mask) if counts] for mask in self.masks)

    @property
    def num_scored(self) -> tuple[int, ...]:
        """Numbers of scored tokens of each branch."""
        return tuple(map(len, self.scored))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Position of one prompt and its branches in a packed stream.

    Attributes:
        start: stream index of the prompt's first token.
        prompt: number of prompt tokens, at least 1.
        branches: number of input tokens of each branch: its length minus 1, so 0 for a response of one token.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch packed into one stream: N examples with B branches in all, T input tokens, S scored tokens.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, from 0 at each prompt's start.
        token_keys: [T] int64, a hash of each token's text and position, on which dropout depends.
        groups: position of each distinct prompt, in the order of its first example; its branches are those of all
            examples with that prompt, in their order.
        group_of: [N] index of each example's group.
        score_at: [S] int64, stream index of the hidden state that predicts the token; in the order of `examples`.
        score_token: [S] int64, the predicted token.
        lengths: [B] scored tokens of each branch, in the order of `score_at`: all branches of the first example, then
            those of the second.
        weight, margin: [N] float32.
        columns: [N] float32, numbers of the rows that the losses read, by column.
        examples: the packed examples.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_keys: Tensor
    groups: tuple[Group, ...]
    group_of: tuple[int, ...]
    score_at: Tensor
    score_token: Tensor
    lengths: tuple[int, ...]
    weight: Tensor
    margin: Tensor
    columns: Mapping[str, Tensor]
    examples: tuple[TokenizedExample, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


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
class SampledResponse:
    """A response that was sampled from a model, for a reward to score.

    Attributes:
        ended: True where the model ended it, False where it was cut off at its most tokens.
    """

    prompt: tuple[Message, ...]
    text: str
    ended: bool


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
        state: name -> what the loss has kept since the steps before, for the names in its record's `state`.
    """

    policy: TokenLogProbs
    reference: TokenLogProbs | None
    sizes: tuple[int, ...]
    ranks: Tensor
    scores: Tensor | None = None
    margin: Tensor
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

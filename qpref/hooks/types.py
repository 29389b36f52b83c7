"""The records that hooks yield. A record says what a plugin offers; the core calls it as a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from qpref.records import Finding, LossOutput, MetricRow, PreferencePair, Row, UnpairedExample

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["reference", "prompt", "log_sum_squares", "mismatched"]
"""What may be computed for a loss beside the policy's log-probabilities of the responses:

reference: the reference's log-probabilities of the same responses.
prompt: the policy's log-probabilities of the prompt's tokens (`PairLogProbs.prompt`); paired losses.
log_sum_squares: log of the sum of squared probabilities at each of the policy's response tokens.
mismatched: log-probabilities of another example's completion after each prompt; unpaired losses.
"""
Scope = Literal["example", "step"]
NEEDS: frozenset[str] = frozenset(get_args(Need))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlCase:
    """A configuration of a TRL trainer that computes a loss, for `qpref losses check NAME --against trl`.

    Attributes:
        trainer: class name of the trainer.
        config: options of its config class.
        options: options of the loss that correspond to `config`.
        reason: why the two differ on purpose, in one line; empty where they have to agree.
        same_as: options under which the loss is what TRL computes instead, on each of TRL's micro-batches by itself;
            the comparison checks that as well. None where no options give it.
        num_examples: examples of each random batch.
        micro_batch: examples that TRL gets at once; None for the whole batch.
        dtype: "float32" where TRL casts to it.
    """

    trainer: Literal["DPOTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer"]
    config: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    same_as: Mapping[str, object] | None = None
    num_examples: int = 4
    micro_batch: int | None = None
    dtype: Literal["float64", "float32"] = "float64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What every loss says of itself.

    Attributes:
        name: as in the recipe's `[loss] name`, and in the entry point's name after `loss-`.
        summary: one line for listings.
        formula: the per-example loss in one line of plain text.
        paper: where it comes from: authors, year, title, equation.
        options: the model of the other keys of `[loss]`.
        build: options -> the loss function, which takes the inputs and returns one value per example. It holds no
            state: it is built anew whenever a scheduled option changes.
        needs: what is computed for the loss beside the policy's log-probabilities, or a function of the options that
            says so; see `Need`.
        scope: "example" where an example's loss depends on that example alone; "step" where the function has to see all
            examples of an optimizer step at once, or a function of the options that says so. It gets them at once,
            whatever the micro-batches.
        starts_at: options -> the loss of every example while policy and reference are the same and the margin is 0;
            checked on the first batch of every run. None, or a function that returns None, where it isn't a constant.
        log_ratios_only: whether the loss depends on policy and reference through their differences alone, so that the
            same shift of both changes nothing; the conformance checks hold it to that.
        detaches: options -> whether the loss detaches something that depends on the policy, such as a weight or a
            baseline, so that its gradient is not the derivative of its value; the conformance checks then hold that
            still in their finite differences. None where it never does.
        variants: further options to check the loss with, each a table as in a recipe.
        trl_cases: TRL's ways to compute the loss. Where there is none, a loss is compared with the TRL loss type of
            its name.
    """

    may_need: ClassVar[frozenset[str]] = NEEDS

    name: str
    summary: str
    formula: str = ""
    paper: str = ""
    options: type[Any]
    build: Callable[[Any], Callable[[Any], LossOutput]]
    needs: frozenset[str] | Callable[[Any], frozenset[str]] = frozenset({"reference"})
    scope: Scope | Callable[[Any], Scope] = "example"
    starts_at: Callable[[Any], float | None] | None = None
    log_ratios_only: bool = False
    detaches: Callable[[Any], bool] | None = None
    variants: Sequence[Mapping[str, object]] = ()
    trl_cases: Sequence[TrlCase] = ()

    def needs_of(self, options: Any) -> frozenset[str]:
        """What this loss needs with these options."""
        return self.needs(options) if callable(self.needs) else frozenset(self.needs)

    def scope_of(self, options: Any) -> Scope:
        """What this loss has to see at once with these options."""
        return self.scope(options) if callable(self.scope) else self.scope


class PairedLoss(Loss):
    """A loss on preference pairs: `build(options)` takes `PairedInputs`."""

    __slots__ = ()
    may_need: ClassVar[frozenset[str]] = NEEDS - {"mismatched"}


class UnpairedLoss(Loss):
    """A loss on single completions, each desirable or undesirable: `build(options)` takes `UnpairedInputs`.

    `starts_at` is the value of a desirable example, and of an undesirable one, while the classes are balanced.
    """

    __slots__ = ()
    may_need: ClassVar[frozenset[str]] = NEEDS - {"prompt"}


Split = Literal["train", "heldout"]


class RowCheck(Protocol):
    """Looks at the data, example by example, before any model loads; texts must not be kept, a file may hold millions.

    It sees each example once: all held-out ones, then all training ones, in the order of their files.
    """

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        """What is wrong with this example."""

    def finish(self) -> Iterable[Finding]:
        """What is told once all have been seen: of rows seen before, or of whole sources (line 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """A check of the preference data; `start` makes what looks at one recipe's data."""

    name: str
    summary: str
    options: type[Any]
    start: Callable[[Any], RowCheck]


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkContext:
    """The run that a sink is opened for. `first_step` is 0, or the step that a resumed run goes on from."""

    run_folder: Path
    first_step: int
    total_steps: int


class SinkWriter(Protocol):
    """Takes the rows of one run, in order, on a thread of its own."""

    def write(self, row: MetricRow) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSink:
    """A place that metrics go to, beside the metrics.jsonl that the core writes."""

    name: str
    summary: str
    options: type[Any]
    open: Callable[[Any, SinkContext], SinkWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A file format, or another place that rows come from.

    A file is read by the reader whose name is its suffix (`csv` reads `x.csv`, `jsonl.gz` reads `x.jsonl.gz`), unless
    the recipe names one. `read` yields a row, or, where a line cannot be one, a finding that says why, and goes on with
    the next line. It is called more than once, and must give the same rows each time.

    Attributes:
        takes: what `read` gets: a file; a folder, or a file; or, for "name", what follows the reader's name and a
            colon, as in `hf:org/name`.
    """

    name: str
    summary: str
    read: Callable[[Path], Iterator[Row | Finding]]
    takes: Literal["file", "folder", "name"] = "file"


def unpaired_reward_metrics(rewards: Tensor, desirable: Tensor) -> dict[str, Tensor]:
    """The field's reward metrics of single completions, detached: a desirable one counts as chosen.

    Args:
        rewards: [N] implicit rewards (nats times beta).
        desirable: [N] bool.
    """
    rewards = rewards.detach()
    undefined = rewards.new_full(rewards.shape, math.nan)
    return {
        "rewards/chosen": rewards.where(desirable, undefined),
        "rewards/rejected": rewards.where(~desirable, undefined),
    }


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The field's four reward metrics, detached. A tie counts as half right.

    Args:
        chosen: [N] implicit rewards of the chosen responses (nats times beta).
        rejected: [N] implicit rewards of the rejected responses.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected),
    }

"""The records that hooks yield: a plugin's name, its options, and the function that the core calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from qpref.records import Finding, LossOutput, MetricRow, PreferencePair, UnpairedExample

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["reference", "prompt", "log_sum_squares", "entropy", "tokens", "mismatched", "scores"]
"""Inputs that a loss can request beyond the policy's log-probabilities of the responses:

reference: the reference's log-probabilities of the same responses.
prompt: the policy's log-probabilities of the prompt's tokens (`PairLogProbs.prompt`), for paired losses.
log_sum_squares: log of the sum of squared probabilities at each of the policy's response tokens.
entropy: the policy's entropy over the vocabulary at each of its response tokens.
tokens: ids of the response tokens, and the mask of those that count.
mismatched: log-probabilities of another example's completion after each prompt, for unpaired losses.
scores: the rows' scores of the responses, for list losses; rows without scores are refused.
"""
Scope = Literal["example", "mismatched", "step"]
IGNORABLE = frozenset({"margin", "chosen", "rejected"})
NEEDS: frozenset[str] = frozenset(get_args(Need))
InitialState = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlCase:
    """A configuration of a TRL trainer that computes a loss, for `qpref losses check NAME --against trl`.

    Attributes:
        trainer: class name of the trainer.
        config: options of its config class.
        options: options of the loss that correspond to `config`.
        reason: why the two differ on purpose, in one line; empty where they have to agree.
        same_as: options under which the loss equals what TRL computes instead, on each of TRL's micro-batches; the
            comparison verifies it. None where there are no such options.
        num_examples: examples per random batch.
        micro_batch: examples per call of TRL; None for the whole batch.
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
    """A loss: its name, its options, and how the core has to call it.

    Attributes:
        name: as in the recipe's `[loss] name`, and in the entry point's name after `loss-`.
        summary: one line for listings.
        formula: the per-example loss in one line of plain text.
        paper: authors, year, title and equation.
        options: the model of the other keys of `[loss]`.
        build: options -> the loss function, which takes the inputs and returns one value per example. The function
            keeps nothing itself: the core rebuilds it whenever a scheduled option changes, and has `state` for that.
        needs: the inputs that the loss requires beyond the policy's log-probabilities, see `Need`; or a function that
            returns them for given options.
        scope: "example" where an example's loss depends on that example alone; "mismatched" where it depends on the
            mismatched completions of the whole optimizer step too, which the function then gets in every call; "step"
            where the function gets all examples of an optimizer step in one call, whatever the micro-batches; or a
            function of the options that returns one of them.
        starts_at: options -> the loss of every example while policy and reference agree and the margin is 0; checked
            on the first batch of every run. None, or a function that returns None, where it isn't a constant.
        log_ratios_only: True where policy and reference enter only through their difference, so that shifting both by
            the same amount changes nothing; the conformance checks test it.
        detaches: options -> True where the loss detaches something that depends on the policy, such as a weight or a
            baseline, so that its gradient is not the derivative of its value; the conformance checks then keep
            detached values fixed in their finite differences. None where it never does.
        is_monotone: False where the loss may rise with the reward margin though policy and reference are the same, on
            purpose; the conformance checks then don't look at the direction of its gradient.
        columns: names of numeric columns of the rows that the loss reads as `inputs.columns`; or a function that
            returns them for given options. A row without one of them is refused.
        state: name -> first value, a number or a list of numbers, of what the loss keeps between optimizer steps: it
            reads `inputs.state` and returns new values in `LossOutput.state`. For losses of scope "step". Or a function
            that returns it for given options.
        ignores: what the loss leaves out on purpose, or a function of the options that returns it: "margin" for the
            margins of rows (a run on data with margins then says so once), "chosen" or "rejected" for a side.
        variants: further options to check the loss with, each a table as in a recipe.
        trl_cases: TRL configurations that compute the same loss. Without any, the loss is compared with the TRL loss
            type of the same name.
    """

    may_need: ClassVar[frozenset[str]] = NEEDS
    unit: ClassVar[str] = "examples"
    """Noun of what the loss gets one value of, for messages."""

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
    is_monotone: bool = True
    columns: Sequence[str] | Callable[[Any], Sequence[str]] = ()
    state: InitialState | Callable[[Any], InitialState] = field(default_factory=dict)
    ignores: frozenset[str] | Callable[[Any], frozenset[str]] = frozenset()
    variants: Sequence[Mapping[str, object]] = ()
    trl_cases: Sequence[TrlCase] = ()

    def needs_of(self, options: Any) -> frozenset[str]:
        """Return the needs under these options."""
        return self.needs(options) if callable(self.needs) else frozenset(self.needs)

    def ignores_of(self, options: Any) -> frozenset[str]:
        """Return what the loss ignores under these options."""
        return self.ignores(options) if callable(self.ignores) else frozenset(self.ignores)

    def scope_of(self, options: Any) -> Scope:
        """Return the scope under these options."""
        return self.scope(options) if callable(self.scope) else self.scope

    def columns_of(self, options: Any) -> Sequence[str]:
        """Return the columns of the rows that it reads under these options."""
        return self.columns(options) if callable(self.columns) else self.columns

    def state_of(self, options: Any) -> InitialState:
        """Return the first values of what it keeps between steps under these options."""
        return self.state(options) if callable(self.state) else self.state


class PairedLoss(Loss):
    """A loss on preference pairs: `build(options)` takes `PairedInputs`."""

    __slots__ = ()
    may_need: ClassVar[frozenset[str]] = NEEDS - {"mismatched", "scores"}
    unit: ClassVar[str] = "pairs"


class ListLoss(Loss):
    """A loss on lists of ranked responses to one prompt: `build(options)` takes `ListInputs`.

    It returns one value per list. A row with one pair is a list of two. `starts_at` applies to lists of two.
    """

    __slots__ = ()
    may_need: ClassVar[frozenset[str]] = NEEDS - {"mismatched", "prompt"}
    unit: ClassVar[str] = "lists"


class UnpairedLoss(Loss):
    """A loss on single completions, each desirable or undesirable: `build(options)` takes `UnpairedInputs`.

    `starts_at` applies to both classes, and assumes that they are balanced.
    """

    __slots__ = ()
    may_need: ClassVar[frozenset[str]] = NEEDS - {"prompt", "scores"}
    unit: ClassVar[str] = "single completions"


Split = Literal["train", "heldout"]
Printing = Literal["text", "json", "nothing"]


class RowCheck(Protocol):
    """Inspects the data, example by example, before any model loads. It must not keep texts: files are large.

    It sees each example once: all held-out ones, then all training ones, in the order of their files.
    """

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        """Yield findings about this example."""

    def finish(self) -> Iterable[Finding]:
        """Yield findings after the last example, about rows seen before or about whole sources (line 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """A check of the preference data; `start` makes the `RowCheck` for one recipe's data.

    Attributes:
        skips_refused: sees only rows that no other check refuses, for statistics of the rows that training uses. It is
            started a second time where checks with a severity "error" refuse rows at the end.
    """

    name: str
    summary: str
    options: type[Any]
    start: Callable[[Any], RowCheck]
    skips_refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under named columns, for sinks that show tables.

    Attributes:
        rows: each as long as `columns`.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str | float | int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkContext:
    """The run that a sink is opened for.

    Attributes:
        first_step: 0, or the step from which a run resumes.
        printing: the form of standard output, for a sink that prints: text, JSON objects, one a line, or nothing.
        planned_bytes: peak memory that the run's plan predicts; 0 where that is unknown.
        limit_bytes: memory that the run may fill; 0 where that is unknown.
        peak_bytes: measures the peak memory so far: of a GPU what torch has reserved, of a CPU the process's. It can
            be called from any thread.
        recipe: the resolved recipe, as in recipe.lock.toml. It has no passwords or tokens: one with them is refused.
        samples: number of rows -> the first held-out examples as text, with their chat template. Texts leave the
            machine only where a sink's option says so.
    """

    run_folder: Path
    first_step: int
    total_steps: int
    printing: Printing = "text"
    planned_bytes: int = 0
    limit_bytes: int = 0
    peak_bytes: Callable[[], int] = lambda: 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    samples: Callable[[int], Table] = lambda count: Table()

    def make_folder(self) -> Path:
        """Create `sinks` in the run folder, and return it: the place for a sink's files.

        It goes with the run when that is overwritten; a file that stands elsewhere in the run folder stops that.
        """
        folder = self.run_folder / "sinks"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


class SinkWriter(Protocol):
    """Receives the rows of one run, in order, on a thread of its own."""

    def write(self, row: MetricRow) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class SummaryWriter(SinkWriter, Protocol):
    """A writer that takes the result of a run, too."""

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Take what result.json says of a finished run, its verdict included; called once, before `close`.

        A run that was stopped or failed closes without it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSink:
    """A destination for metrics, in addition to the metrics.jsonl that the core writes.

    Attributes:
        requires: requirements beyond those of qpref, such as "wandb>=0.19"; a recipe whose sink lacks one is refused
            before anything else happens, with the extra of the sink's distribution that installs it.
        close_seconds: time that it has to finish at the end of a run, for those that upload then.
    """

    name: str
    summary: str
    options: type[Any]
    open: Callable[[Any, SinkContext], SinkWriter]
    requires: Sequence[str] = ()
    close_seconds: float = 5.0


def unpaired_reward_metrics(rewards: Tensor, desirable: Tensor) -> dict[str, Tensor]:
    """Compute the usual reward metrics of single completions, detached: desirable ones count as chosen.

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
    """Compute the four usual reward metrics, detached. A tie counts as half right.

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

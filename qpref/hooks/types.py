"""The records that hooks yield. A record says what a plugin offers; the core calls it as a plain function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qpref.records import Finding, LossOutput, MetricRow, PairedInputs, PreferencePair, Row

if TYPE_CHECKING:
    from torch import Tensor

LossFunction = Callable[[PairedInputs], LossOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedLoss:
    """A loss on preference pairs.

    Attributes:
        name: as in the recipe's `[loss] name`, and in the entry point's name after `loss-`.
        summary: one line for listings.
        options: the model of the other keys of `[loss]`.
        build: options -> the loss function. Built once, before training; called for every micro-batch.
        needs: what is computed for the loss beside the policy's log-probabilities; "reference" is all there is.
        starts_at: options -> the loss of every pair while policy and reference are the same and the margin is 0;
            checked on the first batch of every run. None where it isn't a constant.
    """

    name: str
    summary: str
    options: type[Any]
    build: Callable[[Any], LossFunction]
    needs: frozenset[str] = frozenset({"reference"})
    starts_at: Callable[[Any], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """A check of the preference data. `check` sees every pair once, in file order, before any model loads."""

    name: str
    summary: str
    options: type[Any]
    check: Callable[[Any, Iterable[PreferencePair]], Iterable[Finding]]


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
    """A file format. A file is read by the reader whose name is its suffix, unless the recipe names one.

    `read` yields a row, or, where a line cannot be one, a finding that says why, and goes on with the next line.
    """

    name: str
    summary: str
    read: Callable[[Path], Iterator[Row | Finding]]


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

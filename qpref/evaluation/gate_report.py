"""The result of the forgetting gate, as JSON, and its warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qpref.evaluation.comparison import finite
from qpref.evaluation.forgetting import Change, Forgetting
from qpref.evaluation.heldout_pairs import text_of
from qpref.evaluation.statistics import Estimate, Floats
from qpref.records import PreferencePair

TO_TRY = (
    "To try: a lower learning_rate, a larger beta, fewer epochs, a loss that also raises the chosen responses' "
    "likelihood, or general data mixed in; read answers of both with qpref generate"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LostItem:
    """An item that the base gets right and the trained model wrong.

    Attributes:
        base, trained: log-odds of the right answer, nats, without the base's liking for either answer.
    """

    category: str
    prompt: str
    right: str
    wrong: str
    base: float
    trained: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedModel:
    """One model beside its base.

    Attributes:
        base: name of the model whose base it is compared with.
        lost: the largest change first.
    """

    name: str
    kind: str
    base: str
    changes: Forgetting
    lost: Sequence[LostItem]

    @property
    def forgets(self) -> bool:
        """True where the loss is significant, over all items or in a category."""
        return any(change.is_loss for change in self.changes.changes().values())

    def warnings(self) -> Iterator[str]:
        """Yield one warning where the model forgets, and one where its base is too weak to tell."""
        changes = self.changes.changes()
        if self.forgets:
            lost = [_in_words(name, change) for name, change in changes.items() if change.is_loss]
            yield f"{self.name} has forgotten: {'; '.join(lost)}. {TO_TRY}"
        if self.changes.overall.at_chance:
            yield f"{self.name}: its base answers these items no better than chance, so a loss would hardly be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The result of `qpref eval --gate`.

    Attributes:
        items: location of the items, or "built-in".
        read: number of items.
        left_out: number of items that some model can't be scored on, and the reason for the first.
        dtype: compute dtype of all models; None where each used its own.
    """

    items: str
    read: int
    left_out: tuple[int, str]
    seed: int
    samples: int
    dtype: str | None
    models: Sequence[GatedModel]

    @property
    def forgets(self) -> bool:
        """True where some model's loss is significant."""
        return any(model.forgets for model in self.models)

    def warnings(self) -> list[str]:
        """List the losses, and what hides a loss."""
        warnings = [text for model in self.models for text in model.warnings()]
        count, reason = self.left_out
        if count:
            warnings.append(f"{count} of {self.read} items are left out for all models; the first: {reason}")
        return warnings

    def as_json(self) -> dict[str, Any]:
        """Convert the report to JSON values; an undefined number is null."""
        return {
            "items": self.items,
            "read": self.read,
            "left_out": self.left_out[0],
            "bootstrap": {"samples": self.samples, "seed": self.seed, "level": 0.95},
            "dtype": self.dtype,
            "forgets": self.forgets,
            "models": [_model_json(model) for model in self.models],
            "warnings": self.warnings(),
        }


def lost_item(pair: PreferencePair, category: str, log_odds: Floats) -> LostItem:
    """Describe a lost item by its pair, and the base's and the trained model's log-odds."""
    right, wrong = ("\n".join(turn.content for turn in response) for response in (pair.chosen, pair.rejected))
    base, trained = log_odds.tolist()
    return LostItem(
        category=category, prompt=text_of(pair.prompt), right=right, wrong=wrong, base=base, trained=trained
    )


def _in_words(name: str, change: Change) -> str:
    points = 100 * change.difference.value
    between = f"{100 * change.difference.low:+z.0f} to {100 * change.difference.high:+z.0f}"
    return f"{name} {points:+z.1f} points ({between}), {change.lost} of {change.items} items lost"


def _model_json(model: GatedModel) -> dict[str, Any]:
    return {
        "model": model.name,
        "kind": model.kind,
        "base": model.base,
        "forgets": model.forgets,
        "overall": _change_json(model.changes.overall),
        "categories": {name: _change_json(change) for name, change in model.changes.categories.items()},
        "lost": [asdict(item) for item in model.lost],
    }


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "items": change.items,
        "base": _estimate_json(change.base),
        "trained": _estimate_json(change.trained),
        "difference": _estimate_json(change.difference),
        "lost": change.lost,
        "gained": change.gained,
        "p_value": change.p_value,
        "is_loss": change.is_loss,
        "base_at_chance": change.at_chance,
    }


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    return {"value": finite(estimate.value), "low": finite(estimate.low), "high": finite(estimate.high)}

"""Goals that a user may have, and the loss for each: TRL's name for it leads to the installed one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qpref.aliases.loss_names import TrlLoss
from qpref.errors import RecipeError
from qpref.hooks.manager import PluginHost
from qpref.recipe.trl_losses import find_loss

SINGLES = TrlLoss("KTOTrainer", "kto")
DPO = TrlLoss("DPOTrainer", "sigmoid")


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal.

    Attributes:
        summary: for whom it is.
        loss: for pairs; single completions have one loss whatever the goal.
        options: of the loss.
        why: the comment above the loss.
    """

    summary: str
    loss: TrlLoss
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


GOALS = {
    "align": Goal(
        "a chat model that shall prefer the chosen answers", DPO, "The default, and the best understood loss for pairs."
    ),
    "base": Goal(
        "a base model without instruction tuning: tuning and preferences in one run",
        TrlLoss("ORPOTrainer", "orpo"),
        "For base models: it imitates the chosen answers too, and needs no reference.",
    ),
    "noisy": Goal(
        "labels that are often wrong",
        DPO,
        "Conservative: the share of labels that are taken to be swapped.",
        {"label_smoothing": 0.1},
    ),
    "short": Goal(
        "answers that shall not get longer",
        DPO,
        "Tokens of the longer answer beyond the shorter one's length count less (LD-DPO).",
        {"ld_alpha": 0.5},
    ),
}
WHY_SINGLES = "For single completions with labels; both classes are balanced by their counts."


def loss_table(goal: str, is_paired: bool) -> tuple[dict[str, Any], str]:
    """Return the `[loss]` table of a goal, and the comment above it.

    Raises:
        RecipeError: the goal needs pairs, or its loss isn't installed.
    """
    chosen = GOALS[goal]
    if not is_paired and goal != "align":
        raise RecipeError(
            f"--goal {goal} needs pairs, and these are single completions", "--goal align has a loss for them"
        )
    wanted = chosen.loss if is_paired else SINGLES
    found = find_loss(PluginHost(), wanted)
    if found is None:
        raise RecipeError(f"no loss is installed that is TRL's {wanted.loss_type}", "see `qpref losses`")
    beta = found.record.options.model_fields["beta"].default
    return {"name": found.offer.name, "beta": beta, **chosen.options}, chosen.why if is_paired else WHY_SINGLES

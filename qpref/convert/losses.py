"""Losses: a tool's name becomes TRL's trainer and loss type, and the installed losses say which of them that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qpref.aliases.alias import TOOLS
from qpref.aliases.loss_names import DEFAULT_LOSS_TYPES, LOSS_NAMES, TrlLoss
from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, anything, flag, number, word, words
from qpref.errors import RecipeError
from qpref.hooks.manager import PluginHost
from qpref.recipe.trl_losses import find_loss

SFT = TrlLoss("DPOTrainer", "sft")
BCO = TrlLoss("DPOTrainer", "bco_pair")
AXOLOTL = {
    "dpo": TrlLoss("DPOTrainer", "sigmoid"),
    "ipo": TrlLoss("DPOTrainer", "ipo"),
    "kto": TrlLoss("KTOTrainer", "kto"),
    "orpo": TrlLoss("ORPOTrainer", "orpo"),
    "simpo": TrlLoss("CPOTrainer", "simpo"),
}
LLAMA_FACTORY = {
    "sigmoid": TrlLoss("DPOTrainer", "sigmoid"),
    "hinge": TrlLoss("DPOTrainer", "hinge"),
    "ipo": TrlLoss("DPOTrainer", "ipo"),
    "orpo": TrlLoss("ORPOTrainer", "orpo"),
    "simpo": TrlLoss("CPOTrainer", "simpo"),
}
OPTIONS = {
    "beta": number,
    "label_smoothing": number,
    "gamma": number,
    "desirable_weight": number,
    "undesirable_weight": number,
    "wpo": flag,
    "ld_alpha": number,
    "tau": number,
}
"""Options of losses that have the same values in all tools."""
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha", "forward_kl": "forward_kl"}
METHODS = "DPO and its relatives, KTO, ORPO, CPO and SimPO"


@dataclass(frozen=True, slots=True)
class Part:
    """One loss of the sum that a file describes."""

    loss: TrlLoss
    origin: str
    weight: float = 1.0


def convert_losses(settings: Settings, draft: Draft, trainer: str | None = None) -> None:
    """Convert the loss with its options, or several as a mixture.

    Args:
        trainer: TRL's trainer, which its files don't name.

    Raises:
        RecipeError: the file is for another kind of training, or no installed loss equals its loss.
    """
    host = PluginHost()
    parts = {"trl": _trl, "axolotl": _axolotl, "llamafactory": _llama_factory}[settings.tool](settings, draft, trainer)
    for part in parts:
        older = LOSS_NAMES.get(part.loss.loss_type)
        found = find_loss(host, part.loss) or (find_loss(host, older) if older else None)
        if found is None:
            raise RecipeError(f"no installed loss equals {part.origin} ({part.loss.trainer})", "see `qpref losses`")
        table: dict[str, tuple[Any, str]] = {"name": (found.offer.name, part.origin)}
        if len(parts) > 1 and part.weight != 1:
            table["weight"] = (part.weight, "")
        fields = set(found.record.options.model_fields)
        draft.losses.append(table | _options(settings, draft, part, fields))


def _trl(settings: Settings, draft: Draft, trainer: str | None) -> list[Part]:
    assert trainer is not None
    default = DEFAULT_LOSS_TYPES[trainer]
    types = settings.get("loss_type", words) or [default]
    weights = settings.get("loss_weights", anything) or [1.0] * len(types)
    origin = settings.origin("loss_type")
    parts = [
        Part(TrlLoss(trainer, name), f"loss_type {name}" if "loss_type" in settings.given else origin, float(weight))
        for name, weight in zip(types, weights, strict=False)
    ]
    return [*parts, *_with_nll(settings, "rpo_alpha")]


def _axolotl(settings: Settings, draft: Draft, _: str | None) -> list[Part]:
    name = settings.get("rl", word)
    types = settings.get("dpo_loss_type", words)
    if name not in AXOLOTL:
        raise RecipeError(f"rl: {name or 'missing'}: qpref trains {METHODS}", "supervised and online training: TRL")
    if name == "dpo" and types:
        return [Part(TrlLoss("DPOTrainer", one), f"dpo_loss_type {one}") for one in types]
    return [Part(AXOLOTL[name], f"rl: {name}"), *_with_nll(settings, "rpo_alpha")]


def _llama_factory(settings: Settings, draft: Draft, _: str | None) -> list[Part]:
    stage, name = settings.get("stage", word), settings.get("pref_loss", word) or "sigmoid"
    if stage == "kto" or (stage == "dpo" and name == "kto_pair"):
        return [Part(TrlLoss("KTOTrainer", "kto"), "stage: kto" if stage == "kto" else "pref_loss: kto_pair")]
    if stage != "dpo" or name not in LLAMA_FACTORY:
        raise RecipeError(
            f"stage: {stage or 'sft'}, pref_loss: {name}: qpref trains {METHODS}",
            "supervised and online training: TRL",
        )
    bco = settings.get("pref_bco_weight", number) or 0.0
    origin = f"stage: dpo, pref_loss: {name}"
    parts = [Part(LLAMA_FACTORY[name], origin, round(1 / (1 + bco), 6))]
    if bco:
        parts.append(Part(BCO, "pref_bco_weight", round(bco / (1 + bco), 6)))
        draft.differs.append("pref_bco_weight: LLaMA-Factory shifts rewards by a running mean over the run")
    return [*parts, *_with_nll(settings, "pref_ftx")]


def _with_nll(settings: Settings, key: str) -> list[Part]:
    """Return the NLL of the chosen response as a part of its own, where the file adds it."""
    weight = settings.get(key, number)
    return [Part(SFT, f"{key} {weight:g}", weight)] if weight else []


def _is_in_mixture(part: Part) -> bool:
    return part.loss in (SFT, BCO)


def _options(settings: Settings, draft: Draft, part: Part, fields: set[str]) -> dict[str, tuple[Any, str]]:
    """Return the options of one loss; keys for options that it doesn't have are without effect in TRL, too."""
    table: dict[str, tuple[Any, str]] = {}
    for name, kind in OPTIONS.items():
        found = settings.first(f"loss.{name}", kind)
        if found is None or found[0] is False:
            continue
        value, origin = found
        if name in fields:
            table[name] = (value, origin)
        elif origin in settings.given and value and not _is_in_mixture(part):
            draft.no_equal[origin] = f"the loss {part.loss.loss_type} has no such option"
    trainer, loss_type = part.loss
    smoothing = table.get("label_smoothing", (0.0, ""))
    if settings.tool == "trl" and loss_type == "sigmoid" and trainer == "DPOTrainer" and "label_smoothing" in table:
        del table["label_smoothing"]
        if smoothing[0]:
            draft.differs.append(
                f"label_smoothing: TRL ignores it under loss_type sigmoid; here {smoothing[0]:g} would be conservative "
                "DPO. Set it if that was meant"
            )
    alpha = _alpha(settings, part.loss)
    if "alpha" in fields and alpha is not None:
        table["alpha"] = alpha
    divergence = DIVERGENCES.get(settings.get("f_divergence_type", word) or "")
    if "divergence" in fields and divergence:
        table["divergence"] = (divergence, "f_divergence_type")
    if settings.tool == "llamafactory" and "nll" in fields and trainer == "ORPOTrainer":
        table["nll"] = ("response", f"as in {TOOLS[settings.tool]}; TRL takes the prompt too")
    _warn_of_beta(table, draft, loss_type)
    return table


def _alpha(settings: Settings, loss: TrlLoss) -> tuple[float, str] | None:
    """Return the option `alpha`, which is another key of TRL for each loss that has it."""
    keys = {
        ("CPOTrainer", "sigmoid"): "cpo_alpha",
        ("CPOTrainer", "simpo"): "cpo_alpha",
        ("CPOTrainer", "alphapo"): "alpha",
    }
    settings.used.update(("f_alpha_divergence_coef", "alpha", "cpo_alpha"))
    is_divergence = settings.get("f_divergence_type", word) == "alpha_divergence"
    key = "f_alpha_divergence_coef" if is_divergence else keys.get(loss)
    value = settings.get(key, number) if key else None
    return None if key is None or value is None else (value, settings.origin(key))


def _warn_of_beta(table: dict[str, tuple[Any, str]], draft: Draft, loss_type: str) -> None:
    beta, origin = table.get("beta", (None, ""))
    if loss_type == "simpo" and beta is not None and beta < 1:
        draft.differs.append(
            f"beta = {beta:g} ({origin}): SimPO's rewards are means over tokens, its paper has beta 2 to 10"
        )
    if loss_type == "simpo" and table.get("alpha", (0, ""))[0]:
        alpha, origin = table["alpha"]
        draft.differs.append(f"alpha = {alpha:g} ({origin}): an NLL beside SimPO (CPO-SimPO); the paper has alpha 0")

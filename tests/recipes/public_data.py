"""Tiny data sets with the names, splits and columns of the public ones that shipped recipes train on.

The texts are made here; each row is in its data set's own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conftest import preference_rows

Row = dict[str, Any]


def _messages(*turns: str) -> list[dict[str, str]]:
    """User and assistant in alternation."""
    return [{"content": text, "role": ("user", "assistant")[index % 2]} for index, text in enumerate(turns)]


def _trl_ultrafeedback(row: Row) -> Row:
    sides = {side: _messages(row["prompt"], row[side]) for side in ("chosen", "rejected")}
    return {**sides, "score_chosen": 8.0, "score_rejected": 3.5}


def _zephyr_ultrafeedback(row: Row) -> Row:
    chosen = _messages(row["prompt"], row["chosen"])
    return {"prompt": row["prompt"], "prompt_id": "0" * 64, "messages": chosen, **_trl_ultrafeedback(row)}


def _hh(row: Row) -> Row:
    start = f"\n\nHuman: Count with me.\n\nAssistant: Gladly.\n\nHuman: {row['prompt']}\n\nAssistant: "
    return {"chosen": start + row["chosen"], "rejected": start + row["rejected"]}


def _truthy(row: Row) -> Row:
    texts = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    return {"id": "0" * 32, "source": "truthy_dpo", "system": "You are an unbiased, honest assistant.", **texts}


def _ultrafeedback(row: Row) -> Row:
    """Three answers, of which two have one score: two pairs."""
    answers = ((row["chosen"], 8.5), (row["rejected"], 2.0), (row["rejected"] + " STOP ASKING!", 2.0))
    completions = [
        {"model": "m", "principle": "honesty", "response": text, "overall_score": score} for text, score in answers
    ]
    return {"source": "flan", "instruction": row["prompt"], "models": ["m"] * 3, "completions": completions}


def _helpsteer3(row: Row) -> Row:
    """The second response is the better one in every other row."""
    swapped = int(row["prompt"].split()[1].rstrip(":")) % 2 == 1
    responses = (row["rejected"], row["chosen"]) if swapped else (row["chosen"], row["rejected"])
    return {"domain": "general", "language": "english", "context": _messages(row["prompt"]), "response1": responses[0],
            "response2": responses[1], "overall_preference": 2 if swapped else -3}  # fmt: skip


def _preference_collection(row: Row) -> Row:
    """Beside the comparison, the prompt and the output of a judge, which aren't to be trained on."""
    judge = {"instruction": "###Task Description: compare two responses.", "output": "Feedback: ... [RESULT] A"}
    return {"orig_instruction": row["prompt"], "orig_response_A": row["rejected"], "orig_response_B": row["chosen"],
            "orig_preference": "B", **judge}  # fmt: skip


def _kto_mix(row: Row) -> Row:
    desirable = int(row["prompt"].split()[1].rstrip(":")) % 2 == 0
    completion = [{"content": row["chosen" if desirable else "rejected"], "role": "assistant"}]
    return {"prompt": _messages(row["prompt"]), "completion": completion, "label": desirable}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicData:
    """A public data set.

    Attributes:
        layout: makes its row of one with prompt, chosen and rejected.
        splits: its splits, the one to train on first.
        config: its config.
        examples: pairs, or single completions, that a row becomes.
    """

    layout: Callable[[Row], Row]
    splits: tuple[str, ...] = ("train",)
    config: str = "default"
    examples: int = 1

    def rows(self, count: int) -> dict[str, list[Row]]:
        """`count` rows to train on, and a quarter of that in any other split."""
        first, *others = self.splits
        held_out = preference_rows(count // 4, start=1000)
        return {first: [self.layout(row) for row in preference_rows(count)]} | {
            name: [self.layout(row) for row in held_out] for name in others
        }


DATA = {
    "trl-lib/ultrafeedback_binarized": PublicData(layout=_trl_ultrafeedback, splits=("train", "test")),
    "HuggingFaceH4/ultrafeedback_binarized": PublicData(
        layout=_zephyr_ultrafeedback, splits=("train_prefs", "test_prefs")
    ),
    "Anthropic/hh-rlhf": PublicData(layout=_hh, splits=("train", "test")),
    "jondurbin/truthy-dpo-v0.1": PublicData(layout=_truthy),
    "openbmb/UltraFeedback": PublicData(layout=_ultrafeedback, examples=2),
    "nvidia/HelpSteer3": PublicData(layout=_helpsteer3, splits=("train", "validation"), config="preference"),
    "prometheus-eval/Preference-Collection": PublicData(layout=_preference_collection),
    "trl-lib/kto-mix-14k": PublicData(layout=_kto_mix, splits=("train", "test")),
}

"""Row formats of public comparison data: the `[data.contest]` table that each would have, and the path of its prompt.

A format with columns of its own is recognized by them. The others have columns that several datasets share, with
verdicts of different meaning, so that a recipe has to name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache

from qpref.recipe.contest_section import ContestSection
from qpref.rows.contest import Contest, Values
from qpref.rows.values import BadRowError, json_value


def _exchanges(values: Values) -> Values:
    """Cut both conversations after the exchange that was judged: MT-Bench has two, and `turn` says which."""
    turn = values.get("turn")
    if isinstance(turn, bool) or not isinstance(turn, int):
        return values
    return {**values} | {side: _cut(values[side], turn) for side in ("chosen", "rejected")}


def _cut(side: object, num_answers: int) -> object:
    turns = json_value(side) if isinstance(side, str) else side
    if not isinstance(turns, list):
        return side
    roles = [turn.get("role", turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
    answers = [number for number, role in enumerate(roles, start=1) if role == "assistant"]
    return turns[: answers[num_answers - 1]] if 0 < num_answers < len(answers) else side


def _conversations(values: Values) -> Values:
    """Join the columns of a competition's file into conversations: each is the list of its turns' texts, as JSON."""
    lists = {name: _listed(values.get(name)) for name in ("prompt", "chosen", "rejected")}
    if any(texts is None for texts in lists.values()):
        return values
    questions, *answers = (texts or [] for texts in lists.values())
    if {len(questions)} != set(map(len, answers)):
        counts = ", ".join(f"{name} {len(texts or [])}" for name, texts in lists.items())
        raise BadRowError("not_a_message", f"the conversation's columns have lists of different lengths: {counts}")
    sides = {side: _joined(questions, texts) for side, texts in zip(("chosen", "rejected"), answers, strict=True)}
    return {**values} | sides | {"prompt": None}


def _joined(questions: Sequence[object], answers: Sequence[object]) -> list[dict[str, object]]:
    turns: list[dict[str, object]] = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _listed(value: object) -> Sequence[object] | None:
    value = json_value(value) if isinstance(value, str) and value.startswith("[") else value
    return value if isinstance(value, list) and value and not isinstance(value[0], dict) else None


_STRENGTH = {  # from the first response being much better to the second
    "first_wins": [{"min": -3, "max": -1}],
    "second_wins": [{"min": 1, "max": 3}],
    "tie": [0],
}


def _section(first: str, second: str, **keys: object) -> ContestSection:
    return ContestSection.model_validate({"first": first, "second": second, **keys})


CONTESTS: Mapping[str, Contest] = {
    "shp": Contest(
        _section("human_ref_A", "human_ref_B", winner="labels", first_wins=[1], second_wins=[0]), prompts=("history",)
    ),
    "saferlhf": Contest(
        _section("response_0", "response_1", winner="better_response_id", first_wins=[0], second_wins=[1])
    ),
    "arena": Contest(
        _section(
            "conversation_a",
            "conversation_b",
            winner="winner",
            first_wins=["model_a"],
            second_wins=["model_b"],
            tie=["tie", "tie (bothbad)", "tie (inconsistent)", "bothbad", "both_bad"],
        ),
        finish=_exchanges,
    ),
    "lmsys": Contest(
        _section(
            "response_a",
            "response_b",
            winner={"first": "winner_model_a", "second": "winner_model_b", "tie": "winner_tie"},
        ),
        finish=_conversations,
    ),
    "helpsteer2": Contest(_section("response_1", "response_2", winner="preference_strength", **_STRENGTH)),
    "helpsteer3": Contest(_section("response1", "response2", winner="overall_preference", **_STRENGTH)),
    "webgpt": Contest(
        _section("answer_0", "answer_1", scores={"first": "score_0", "second": "score_1", "better": "higher"}),
        prompts=("question.full_text",),
    ),
    "summarize": Contest(
        _section("summaries.0.text", "summaries.1.text", winner="choice", first_wins=[0], second_wins=[1]),
        prompts=("info.post", "info.article"),
    ),
    "alpaca_eval": Contest(
        _section(  # weighted annotators give the expected choice, between 1 and 2
            "output_1",
            "output_2",
            winner="preference",
            first_wins=[{"min": 1, "below": 1.5}],
            second_wins=[{"above": 1.5, "max": 2}],
            tie=[0, 1.5],
        )
    ),
    "label_studio": Contest(
        _section("answer1", "answer2", winner="comparison", first_wins=["left"], second_wins=["right"])
    ),
    "llmbar": Contest(_section("output_1", "output_2", winner="label", first_wins=[1], second_wins=[2])),
    "autoj": Contest(_section("response 1", "response 2", winner="label", first_wins=[0], second_wins=[1], tie=[2])),
    "judgebench": Contest(
        _section("response_A", "response_B", winner="label", first_wins=["A>B"], second_wins=["B>A"], tie=["A=B"])
    ),
    "gold_label": Contest(
        _section("response_a", "response_b", winner="gold_label", first_wins=["A"], second_wins=["B"], tie=["tie"])
    ),
}
"""Format name -> how its rows tell the winner."""

_OWN = {
    "shp": ("human_ref_A", "human_ref_B"),
    "saferlhf": ("response_0", "response_1", "better_response_id"),
    "arena": ("conversation_a", "conversation_b"),
    "lmsys": ("response_a", "response_b", "winner_model_a", "winner_model_b"),
    "helpsteer2": ("response_1", "response_2", "preference_strength"),
    "helpsteer3": ("response1", "response2", "overall_preference"),
    "webgpt": ("answer_0", "answer_1", "score_0", "score_1"),
    "summarize": ("summaries", "choice"),
    "alpaca_eval": ("output_1", "output_2", "preference"),
    "label_studio": ("answer1", "answer2", "comparison"),
}
"""Columns by which a format is recognized, whether or not they are null."""
BY_NAME = frozenset(CONTESTS.keys() - _OWN.keys())
"""Formats that are read only where a recipe names them."""
CONTEST_COLUMNS = frozenset(
    path.split(".")[0]
    for contest in CONTESTS.values()
    for path in (contest.section.first, contest.section.second, *contest.section.verdict_columns, *contest.prompts)
)
"""Every column that one of these formats reads."""


@lru_cache(maxsize=512)
def may_compare(columns: tuple[str, ...]) -> bool:
    """Return whether rows with these columns may be in one of the recognized formats."""
    return any(set(own).issubset(columns) for own in _OWN.values())


def contest_format(values: Mapping[str, object], has: Set[str]) -> str | None:
    """Return the format whose own columns a row has; the responses must not be null.

    Args:
        has: names of the row's columns that aren't null.
    """
    for name, columns in _OWN.items():
        if columns[0] in has and all(column in values for column in columns):
            return name
    return None

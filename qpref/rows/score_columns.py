"""Columns that score the responses of a row, or rank them: found by their names, and read as numbers.

Only scores of the preference itself count: `score`, `rating`, `reward` and the like, with words such as `avg` or
`overall`. `safety_score_chosen` answers another question, and the preferred response may well have the lower one.
Higher is better, except for ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

from qpref.recipe.contest_section import number_of
from qpref.rows.column_hints import words
from qpref.rows.ranked import RANKED_COLUMNS, responses_in, text_of_ranked
from qpref.rows.values import BadRowError, json_value

SCORE_WORDS = frozenset({"score", "scores", "rating", "ratings", "reward", "rewards", "grade", "rank", "ranking"})
LOWER_IS_BETTER = frozenset({"rank", "ranking"})
NEUTRAL_WORDS = frozenset(
    {"avg", "average", "mean", "overall", "total", "final", "model", "rm", "human", "preference", "annotator", "raw"}
    | {"response", "answer", "output", "completion", "generation", "conversation", "text", "metadata", "meta", "info"}
)
"""Words beside the score in a column's name that leave its meaning as it is."""
DIFFERENCE_WORDS = frozenset({"margin", "difference", "diff", "gap", "delta"})
MAX_KEYS = 32
"""Most keys of an object in which scores are looked for."""
SCORE_KEYS = ("overall_score", "overall", "score", "rating", "reward")
"""Keys of an object that hold its score."""

Values = Mapping[str, object]
Scored = tuple[str, float, float]
"""Text that names the columns, and two numbers: of the preferred response and of the other; the better is higher."""


def side_scores(values: Values, better: str, worse: str, exclude: Collection[str] = ()) -> Iterator[Scored]:
    """Yield each pair of scores of a row's two sides.

    Args:
        better, worse: columns of the preferred response and of the other.
        exclude: columns that the preference comes from.
    """
    flat = _flat(values, (better, worse))
    for one, other in _pairs_of_columns(tuple(flat), better, worse):
        if one not in exclude and other not in exclude:
            names = " and ".join(name for name in flat if name in (one, other))
            yield from _scored(names, words(one), flat[one], flat[other])
    sides = _last(values.get(better)), _last(values.get(worse))
    if isinstance(sides[0], dict) and isinstance(sides[1], dict):
        for key in [key for key in (*SCORE_KEYS, "rank") if key in sides[0] and key in sides[1]][:1]:
            yield from _scored(f"{key} within the two responses", (key,), sides[0][key], sides[1][key])
    yield from _scores_of_generations(values, sides)


@lru_cache(maxsize=512)
def has_scores(columns: tuple[str, ...], better: str, worse: str) -> bool:
    """Return whether columns with these names hold scores of a row's responses, or their difference."""
    is_ranked = not set(RANKED_COLUMNS).isdisjoint(columns)
    return is_ranked or bool(_pairs_of_columns(columns, better, worse) or _difference_columns(columns))


def _flat(values: Values, sides: Collection[str]) -> Values:
    """Add what small objects hold, under `scores.chosen`; the sides themselves stay whole."""
    nested = {
        f"{name}.{key}": inner
        for name, value in values.items()
        if isinstance(value, dict) and name not in sides and len(value) <= MAX_KEYS
        for key, inner in value.items()
    }
    return {**values, **nested} if nested else values


def _scored(names: str, name_words: Sequence[str], better: object, worse: object) -> Iterator[Scored]:
    """Yield two scores, unless one is no number; a rank counts as minus itself."""
    numbers = _number(better), _number(worse)
    if numbers[0] is not None and numbers[1] is not None:
        sign = -1.0 if LOWER_IS_BETTER.intersection(name_words) else 1.0
        yield names, sign * numbers[0], sign * numbers[1]


def _scores_of_generations(values: Values, sides: tuple[object, object]) -> Iterator[Scored]:
    """Find both responses among a row's generations, as distilabel lists them, and yield their scores."""
    orders = orders_of(values)
    if not orders:
        return
    texts = [_text(_last(text_of_ranked(response))) for response in responses_in(values)[1]]
    found = [texts.index(text) for side in sides if (text := _text(side)) is not None and text in texts]
    if len(found) == 2:
        for name, scores in orders.items():
            yield name, scores[found[0]], scores[found[1]]


def differences(values: Values) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each column that has the difference of the two sides' scores."""
    for name in _difference_columns(tuple(values)):
        number = _number(values[name])
        if number is not None:
            yield name, number


def orders_of(values: Values) -> dict[str, list[float]]:
    """Return every order of a row's ranked responses by its column, the one that decides first; higher is better."""
    if all(values.get(name) is None for name in RANKED_COLUMNS):
        return {}
    try:
        name, responses = responses_in(values)
    except BadRowError:
        return {}
    found: dict[str, list[float | None]] = {}
    if name == "ranked":
        found["ranked"] = [float(-index) for index in range(len(responses))]
    for column in ("ranks", "scores", "ratings", "rating"):
        listed = values.get(column)
        listed = json_value(listed) if isinstance(listed, str) else listed
        if isinstance(listed, list) and len(listed) == len(responses):
            sign = -1.0 if column == "ranks" else 1.0
            found[column] = [None if (number := number_of(one)) is None else sign * number for one in listed]
    for key in ("rank", "overall_score", "score", "rating"):
        within = [number_of(one.get(key)) if isinstance(one, dict) else None for one in responses]
        sign = -1.0 if key == "rank" else 1.0
        found[f"{key} of each response"] = [None if number is None else sign * number for number in within]
    return {
        name: [number for number in numbers if number is not None]
        for name, numbers in found.items()
        if None not in numbers
    }


@lru_cache(maxsize=512)
def _pairs_of_columns(columns: tuple[str, ...], better: str, worse: str) -> tuple[tuple[str, str], ...]:
    """Return the score columns of the two sides: their names differ as those of the sides do."""
    by_words = {words(name): name for name in columns}
    pairs: dict[tuple[str, str], None] = {}
    for mark, counterpart, rest in _marks(words(better), words(worse)):
        allowed = SCORE_WORDS | NEUTRAL_WORDS | rest | {mark}
        for found, name in by_words.items():
            if found.count(mark) == 1 and SCORE_WORDS.intersection(found) and allowed.issuperset(found):
                other = by_words.get(tuple(counterpart if word == mark else word for word in found))
                if other is not None and name not in (better, worse):
                    pairs[name, other] = None
    return tuple(pairs)


def _marks(better: tuple[str, ...], worse: tuple[str, ...]) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield the words in which names of the two sides differ, and the words that they share."""
    if len(better) == len(worse):
        differing = [(one, other) for one, other in zip(better, worse, strict=True) if one != other]
        if len(differing) == 1:
            yield *differing[0], frozenset(better).intersection(worse)
            if differing[0] == ("rejected", "chosen"):
                return
    yield "chosen", "rejected", frozenset()


@lru_cache(maxsize=512)
def _difference_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    allowed = SCORE_WORDS | NEUTRAL_WORDS | DIFFERENCE_WORDS
    return tuple(name for name in columns if DIFFERENCE_WORDS.intersection(words(name)) and allowed >= {*words(name)})


def _number(value: object) -> float | None:
    """Return a score: a number, its text, or an object that holds one."""
    if isinstance(value, dict):
        value = next((value[key] for key in SCORE_KEYS if key in value), None)
    return number_of(value)


def _last(value: object) -> object:
    return value[-1] if isinstance(value, list) and value else value


def _text(value: object) -> str | None:
    value = value.get("content", value.get("value")) if isinstance(value, dict) else value
    return value if isinstance(value, str) else None

"""Responses to one prompt in their order: how good each is, wherever the row says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpref.data.columns import finite
from qpref.data.messages import BadRowError, json_value, kind_of

MAX_RESPONSES = 64
"""Ranked responses of one row; they make up to 2,016 pairs."""
RANKED_COLUMNS = ("responses", "completions", "answers", "ranked")
TEXTS = ("response", "answer", "text", "completion", "output", "content")
"""Keys of a ranked response, in an object, under which its text stands."""
SCORES = ("overall_score", "score", "rating")


def responses_in(values: Mapping[str, object]) -> tuple[str, list[object]]:
    """The column that holds the responses, and its list of them."""
    name = next((name for name in RANKED_COLUMNS if values.get(name) is not None), None)
    if name is None:
        raise BadRowError("not_a_pair", f"no ranked responses: none of {', '.join(RANKED_COLUMNS)}")
    value = values[name]
    responses = json_value(value) if isinstance(value, str) else value
    if not isinstance(responses, list) or not 2 <= len(responses) <= MAX_RESPONSES:
        found = f"{len(responses)} of them" if isinstance(responses, list) else kind_of(value)
        raise BadRowError("not_a_pair", f"{name}: expected a list of 2 to {MAX_RESPONSES} responses, found {found}")
    return name, responses


def response_of(one: object) -> object:
    if isinstance(one, dict) and "role" not in one and "from" not in one:
        return next((one[key] for key in TEXTS if one.get(key) is not None), one)
    return one


def score_of(values: Mapping[str, object], responses: Sequence[object]) -> list[float]:
    """How good each response is, more being better: ranks (1 is the best) before scores."""
    for name, sign in (("ranks", -1.0), ("scores", 1.0)):
        if values.get(name) is not None:
            listed = values[name]
            listed = json_value(listed) if isinstance(listed, str) else listed
            if not isinstance(listed, list) or len(listed) != len(responses):
                found = f"{len(listed)} of them" if isinstance(listed, list) else kind_of(listed)
                message = f"{name}: expected a number for each of the {len(responses)} responses, found {found}"
                raise BadRowError("bad_number", message)
            return [sign * finite(value, name) for value in listed]
    worth = []
    for one in responses:
        said = one if isinstance(one, dict) else {}
        told = next((key for key in ("rank", *SCORES) if said.get(key) is not None), None)
        if told is None:
            raise BadRowError("bad_number", "a response has neither a rank nor a score")
        worth.append(-finite(said[told], told) if told == "rank" else finite(said[told], told))
    return worth

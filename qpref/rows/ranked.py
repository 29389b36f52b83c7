"""Ranked responses to one prompt: the column that holds them, and the score of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpref.rows.columns import finite
from qpref.rows.values import BadRowError, json_value, kind_of

MAX_RESPONSES = 64
"""Most ranked responses of one row: 64 make up to 2,016 pairs."""
RANKED_COLUMNS = ("responses", "completions", "answers", "generations", "ranked")
TEXTS = ("response", "answer", "text", "completion", "output", "content")
"""Keys that may hold the text of a ranked response that is an object."""
SCORES = ("overall_score", "score", "rating")


def responses_in(values: Mapping[str, object]) -> tuple[str, list[object]]:
    """Find the column that holds the responses; returns its name and the list."""
    name = next((name for name in RANKED_COLUMNS if values.get(name) is not None), None)
    if name is None:
        raise BadRowError("not_a_pair", f"no ranked responses: none of {', '.join(RANKED_COLUMNS)}")
    value = values[name]
    responses = json_value(value) if isinstance(value, str) else value
    if not isinstance(responses, list) or not 2 <= len(responses) <= MAX_RESPONSES:
        found = f"{len(responses)} of them" if isinstance(responses, list) else kind_of(value)
        raise BadRowError("not_a_pair", f"{name}: expected a list of 2 to {MAX_RESPONSES} responses, found {found}")
    return name, responses


def text_of_ranked(response: object) -> object:
    """Return the text inside a ranked response that is an object; messages and plain texts pass unchanged."""
    if isinstance(response, dict) and "role" not in response and "from" not in response:
        return next((response[key] for key in TEXTS if response.get(key) is not None), response)
    return response


def scores_in(values: Mapping[str, object], responses: Sequence[object]) -> tuple[list[float], bool]:
    """Return the score of each response, higher is better; a rank (1 is the best) counts as minus itself.

    The second value is True where all of them are scores, not ranks.

    Sources in order: the columns `ranks`, `scores` and `ratings`, then a rank or score inside each response.
    """
    for name, sign in (("ranks", -1.0), ("scores", 1.0), ("ratings", 1.0)):
        if values.get(name) is not None:
            listed = values[name]
            listed = json_value(listed) if isinstance(listed, str) else listed
            if not isinstance(listed, list) or len(listed) != len(responses):
                found = f"{len(listed)} of them" if isinstance(listed, list) else kind_of(listed)
                message = f"{name}: expected a number for each of the {len(responses)} responses, found {found}"
                raise BadRowError("bad_number", message)
            return [sign * finite(value, name) for value in listed], sign > 0
    within = [_score_within(response) for response in responses]
    return [score for score, _ in within], all(is_score for _, is_score in within)


def _score_within(response: object) -> tuple[float, bool]:
    fields = response if isinstance(response, dict) else {}
    key = next((key for key in ("rank", *SCORES) if fields.get(key) is not None), None)
    if key is None:
        raise BadRowError(
            "bad_number",
            "a response has neither a rank nor a score; add them, or name a list from best to worst ranked",
        )
    value = finite(fields[key], key)
    return (-value, False) if key == "rank" else (value, True)

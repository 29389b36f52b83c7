"""Row -> records, for every supported row format, whichever reader the row came from.

`docs/data.md` shows an example of each. A row with the columns of several formats is read in the first one that
`format_of` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from itertools import combinations

from qpref.records import Finding, PreferencePair, Row, UnpairedExample
from qpref.rows.column_hints import advice, response_columns
from qpref.rows.columns import (
    LABEL_COLUMNS,
    PROMPT_COLUMNS,
    QUESTION_COLUMNS,
    SYSTEM_COLUMNS,
    any_prompt,
    label_in,
    number_in,
    tools_in,
)
from qpref.rows.contest_formats import CONTEST_COLUMNS, CONTESTS, contest_format
from qpref.rows.json_columns import with_decoded_messages
from qpref.rows.known_names import NAMES, with_known_names
from qpref.rows.masked_text import MASK_COLUMNS, PREFIX_COLUMN, marked, refuse_shared_mask
from qpref.rows.messages import check_prompt, check_response, turns_of
from qpref.rows.pair_formats import PAIR_FORMATS, has_candidates, pair_format
from qpref.rows.pair_records import build_pair
from qpref.rows.ranked import RANKED_COLUMNS, responses_in, scores_in, text_of_ranked
from qpref.rows.values import BadRowError, named

Records = Sequence[PreferencePair | UnpairedExample]

COMPLETIONS = ("completion", "output", "response")
"""Columns that hold a labelled completion."""
COLUMNS = frozenset(
    {
        *PROMPT_COLUMNS,
        *QUESTION_COLUMNS,
        *SYSTEM_COLUMNS,
        *NAMES,
        *("chosen", "rejected", "tools", "functions", "weight", "margin", "history"),
        *(*RANKED_COLUMNS, "ranks", "scores", "ratings"),
        *COMPLETIONS,
        *LABEL_COLUMNS,
        *("preferred_output", "non_preferred_output"),
        *CONTEST_COLUMNS,
        *(*MASK_COLUMNS, PREFIX_COLUMN),
    }
)
"""Every column that some format reads."""
NUMBERS = ("weight", "margin")
"""Columns in which an empty list is a wrong type."""
NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")
"""Columns on which an answer may depend, and which no text stands for."""


def records_of_row(row: Row, row_format: str = "auto") -> Records | Finding:
    """Convert a row to its records, or to the finding that refuses it.

    A refused row is read again without its empty texts and lists, with which tables fill columns that a row lacks.

    Args:
        row_format: a name of ROW_FORMATS; "auto" recognizes the format by the row's columns.
    """
    found = _records(row, row_format)
    if not isinstance(found, Finding):
        return found
    filled = {name: value for name, value in row.values.items() if name in NUMBERS or value not in ("", [])}
    again = _records(Row(values=filled, source=row.source), row_format) if len(filled) < len(row.values) else found
    return found if isinstance(again, Finding) else again


def _records(row: Row, row_format: str) -> Records | Finding:
    if media := [name for name in NOT_TEXT if row.values.get(name)]:
        message = f"the row has {media[0]}; qpref trains on text alone, so drop the row"
        return Finding(code="not_text", severity="error", message=message, source=row.source)
    row = with_decoded_messages(with_known_names(row), COLUMNS)
    name = format_of(row.values) if row_format == "auto" else row_format
    if name is None:
        message = f"no known row format; {advice(row.values)}"
        return Finding(code="unknown_format", severity="error", message=message, source=row.source)
    return ROW_FORMATS[name](row)


def format_of(values: Mapping[str, object]) -> str | None:
    """Return the first format, in the order of docs/data.md, whose columns a row has; null columns don't count."""
    has = {NAMES.get(name, name) for name, value in values.items() if value is not None and name in COLUMNS}
    if has & {"chosen", "rejected"}:
        return pair_format(values, has)
    if has & {"preferred_output", "non_preferred_output"}:
        return "openai"
    if has_candidates(values):
        return "nova"
    if "instruction" in has and isinstance(values.get("output"), list):
        return "alpaca"
    if has.intersection(RANKED_COLUMNS):
        return "ranked"
    if contest := contest_format(values, has):
        return contest
    if has & {"completion", "label", "kto_tag"} and not _is_verdict(values, has):
        return "unpaired"
    return "pair" if "prompt" in has else None


def _is_verdict(values: Mapping[str, object], has: set[str]) -> bool:
    """Return whether the row's label is about several responses, which no format knows, and not about a completion."""
    return not has & {*COMPLETIONS, "conversations", "messages"} and bool(response_columns(values))


def with_columns(row: Row, columns: Mapping[str, str]) -> Row | Finding:
    """Rename a row's columns, or report those that it lacks.

    Args:
        columns: qpref's name -> the row's.
    """
    missing = [f"'{theirs}' (for {name})" for name, theirs in columns.items() if theirs not in row.values]
    if missing:
        found = named(row.values) or "none"
        message = f"no column {' and no column '.join(missing)}; it has {found}"
        return Finding(code="missing_column", severity="error", message=message, source=row.source)
    renamed = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in renamed}
    return Row(values=values | {name: row.values[theirs] for name, theirs in columns.items()}, source=row.source)


def _ranked(row: Row) -> Records:
    """Make a pair of every two responses whose scores differ, the better one chosen."""
    name, responses = responses_in(row.values)
    is_sorted = name == "ranked"
    positions = [float(-index) for index in range(len(responses))]
    scores, are_scores = (positions, False) if is_sorted else scores_in(row.values, responses)
    prompt = any_prompt(row.values)
    turns = [turns_of(text_of_ranked(one), f"{name}, number {at}", "assistant") for at, one in enumerate(responses, 1)]
    best_first = sorted(range(len(turns)), key=lambda index: -scores[index])
    pairs = [pair for pair in combinations(best_first, 2) if scores[pair[0]] > scores[pair[1]]]
    if not pairs:
        raise BadRowError("tied", f"all {len(turns)} responses have the same score, so none is preferred")
    return [
        replace(
            build_pair(row, prompt, turns[better], turns[worse]),
            number=number,
            positions=(better, worse),
            scores=(scores[better], scores[worse]) if are_scores else None,
        )
        for number, (better, worse) in enumerate(pairs)
    ]


def _contest(name: str) -> Callable[[Row], Records | Finding]:
    """Return the function that reads rows of one comparison format."""
    contest = CONTESTS[name]
    return lambda row: records_of_row(contest.judge(row))


def _unpaired(row: Row) -> Records:
    values = row.values
    label = label_in(values)
    name = next((name for name in COMPLETIONS if values.get(name) is not None), None)
    if name is not None:
        prompt, response = any_prompt(values), turns_of(values[name], name, "assistant")
    else:
        whole = any_prompt(values)
        prompt, response = whole[:-1], whole[-1:]
        if len(whole) == 1 or response[0].role != "assistant":
            message = f"not a labelled completion: no completion; {advice(values, ['completion'])}"
            raise BadRowError("not_an_example", message)
    check_prompt(prompt)
    check_response(response, "completion")
    weight, tools = number_in(values, "weight", 1.0, at_least=0.0), tools_in(values)
    example = UnpairedExample(
        prompt=prompt,
        completion=(marked(values, response[0], "completion"),),
        label=label,
        tools=tools,
        weight=weight,
        source=row.source,
    )
    return [example]


def _refusing(read: Callable[[Row], Records | Finding]) -> Callable[[Row], Records | Finding]:
    """Wrap `read` so that a row it refuses becomes a finding at the row's location."""

    @wraps(read)
    def records(row: Row) -> Records | Finding:
        try:
            found = read(row)
            refuse_shared_mask(row.values, len(found) if isinstance(found, Sequence) else 1)
            return found
        except BadRowError as error:
            return Finding(code=error.code, severity="error", message=str(error), source=row.source)

    return records


_READ: Mapping[str, Callable[[Row], Records | Finding]] = {
    **PAIR_FORMATS,
    "ranked": _ranked,
    **{name: _contest(name) for name in CONTESTS},
    "unpaired": _unpaired,
}
ROW_FORMATS: Mapping[str, Callable[[Row], Records | Finding]] = {name: _refusing(read) for name, read in _READ.items()}
"""Format name -> function from a row to its records, or to the finding that it isn't in this format."""

"""Row -> records. Each shape that a row may have is written here once, whatever the row came from.

`docs/data.md` shows an example of each. A row that has the columns of several shapes is taken for the first of these
in `shape_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from itertools import combinations

from qpref.data.columns import (
    HUMAN,
    Turns,
    any_prompt,
    instruction,
    label_in,
    need,
    number_in,
    prompt_column,
    text_in,
    tools_in,
    with_system,
)
from qpref.data.messages import (
    BadRowError,
    check_prompt,
    check_response,
    dialogue_of,
    kind_of,
    named,
    shown,
    turns_of,
)
from qpref.data.ranked import RANKED_COLUMNS, response_of, responses_in, score_of
from qpref.records import Finding, PreferencePair, Row, UnpairedExample

Records = list[PreferencePair | UnpairedExample]

COLUMNS = frozenset(
    {
        *("prompt", "chosen", "rejected", "system", "tools", "weight", "margin", "conversations", "messages"),
        *("instruction", "input", "output", "history", *RANKED_COLUMNS, "ranks", "scores"),
        *("completion", "label", "kto_tag", "preferred_output", "non_preferred_output"),
        *("human_ref_A", "human_ref_B", "labels", "response_0", "response_1", "better_response_id"),
        *("conversation_a", "conversation_b", "winner"),
    }
)
"""Every column that some shape reads."""


def records_of_row(row: Row, shape: str = "auto") -> Sequence[PreferencePair | UnpairedExample] | Finding:
    """The records that a row holds, or why it holds none; `shape` is a name of SHAPES, or found by the columns."""
    found = shape_of(row.values) if shape == "auto" else shape
    if found is None:
        columns = named(row.values) or "no column"
        message = f"no known shape of a preference row; it has {columns}; [data] columns names what stands for what"
        return Finding(code="no_shape", severity="error", message=message, source=row.source)
    return SHAPES[found](row)


def shape_of(values: Mapping[str, object]) -> str | None:
    """The first shape, in the order of docs/data.md, whose columns a row has; a column that is null is not there."""
    has = {name for name in COLUMNS.intersection(values) if values[name] is not None}
    if has & {"chosen", "rejected"}:
        return _pair_shape(values, has)
    if has & {"preferred_output", "non_preferred_output"}:
        return "openai"
    if "instruction" in has and isinstance(values.get("output"), list):
        return "alpaca"
    if has.intersection(RANKED_COLUMNS):
        return "ranked"
    for name, columns in _CONTESTS.items():
        if columns[0] in has and columns[1] in has:
            return name
    if has & {"completion", "label", "kto_tag"}:
        return "unpaired"
    return "pair" if "prompt" in has else None


def _pair_shape(values: Mapping[str, object], has: set[str]) -> str:
    sides = values.get("chosen"), values.get("rejected")
    if all(isinstance(side, str) and side.startswith(HUMAN) for side in sides):
        return "hh"
    if "prompt" in has:
        return "pair"
    if "conversations" in has:
        return "sharegpt"
    if "instruction" in has:
        return "alpaca"
    return (
        "whole"
        if all(isinstance(side, list) or (isinstance(side, str) and side[:1] == "[") for side in sides)
        else "pair"
    )


def with_columns(row: Row, columns: Mapping[str, str]) -> Row | Finding:
    """The row with columns renamed, our name -> theirs, or which of theirs it lacks."""
    missing = [f"'{theirs}' (for {ours})" for ours, theirs in columns.items() if theirs not in row.values]
    if missing:
        found = named(row.values) or "none"
        message = f"no column {' and no column '.join(missing)}; it has {found}"
        return Finding(code="missing_column", severity="error", message=message, source=row.source)
    renamed = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in renamed}
    return Row(values=values | {ours: row.values[theirs] for ours, theirs in columns.items()}, source=row.source)


def _pair(row: Row) -> Records:
    need(row.values, "prompt", "chosen", "rejected")
    return _of_sides(row, prompt_column(row.values))


def _whole(row: Row) -> Records:
    need(row.values, "chosen", "rejected")
    return _of_sides(row, None)


def _sharegpt(row: Row) -> Records:
    need(row.values, "conversations", "chosen", "rejected")
    return _of_sides(row, with_system(row.values, turns_of(row.values["conversations"], "conversations", "user")))


def _alpaca(row: Row) -> Records:
    prompt, output = instruction(row.values), row.values.get("output")
    if row.values.get("chosen") is not None or row.values.get("rejected") is not None:
        need(row.values, "chosen", "rejected")
        return _of_sides(row, prompt)
    if not isinstance(output, list) or len(output) != 2:
        found = f"{len(output)} of them" if isinstance(output, list) else kind_of(output)
        raise BadRowError("not_a_pair", f"output: expected two responses, the better one first, found {found}")
    return [_record(row, prompt, output[0], output[1])]


def _hh(row: Row) -> Records:
    need(row.values, "chosen", "rejected")
    sides = [text_in(row.values, side) for side in ("chosen", "rejected")]
    chosen, rejected = (dialogue_of(text, side) for text, side in zip(sides, ("chosen", "rejected"), strict=True))
    prompt = None if row.values.get("prompt") is None else prompt_column(row.values)
    return [_parted(row, chosen, rejected, prompt)]


def _openai(row: Row) -> Records:
    need(row.values, "input", "preferred_output", "non_preferred_output")
    asked = row.values["input"]
    if not isinstance(asked, dict):
        raise BadRowError("not_a_pair", f"input: expected an object with messages, found {kind_of(asked)}")
    prompt = turns_of(asked.get("messages"), "input.messages", "user")
    inner = Row(values={"tools": asked.get("tools")} | dict(row.values), source=row.source)
    return [_record(inner, prompt, row.values["preferred_output"], row.values["non_preferred_output"])]


def _ranked(row: Row) -> Records:
    name, responses = responses_in(row.values)
    ordered = name == "ranked"
    worth = [float(-place) for place in range(len(responses))] if ordered else score_of(row.values, responses)
    prompt = any_prompt(row.values)
    turns = [turns_of(response_of(one), f"{name}, number {at}", "assistant") for at, one in enumerate(responses, 1)]
    best_first = sorted(range(len(turns)), key=lambda place: -worth[place])
    pairs = [pair for pair in combinations(best_first, 2) if worth[pair[0]] > worth[pair[1]]]
    if not pairs:
        raise BadRowError("tied", f"all {len(turns)} responses are worth the same, so none is preferred")
    return [
        replace(_built(row, prompt, turns[better], turns[worse]), number=number)
        for number, (better, worse) in enumerate(pairs)
    ]


def _contest(name: str) -> Callable[[Row], Records]:
    """Two responses and a column that says which is better."""
    first, second, verdict, winners = _CONTESTS[name]

    def read(row: Row) -> Records:
        need(row.values, first, second, verdict)
        found = row.values[verdict]
        key = shown(found).strip("'").lower()
        if key not in winners:
            if key.startswith("tie"):
                raise BadRowError("tied", f"{verdict}: a tie, so none is preferred")
            raise BadRowError("bad_label", f"{verdict}: expected {' or '.join(winners)}, found {shown(found)}")
        better, worse = (first, second) if winners[key] == 0 else (second, first)
        values = dict(row.values) | {"chosen": row.values[better], "rejected": row.values[worse]}
        contested = Row(values=values, source=row.source)
        prompt = row.values.get("history" if name == "shp" else "prompt")
        return _of_sides(contested, None if prompt is None else prompt_column(values | {"prompt": prompt}))

    return read


_CONTESTS: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "shp": ("human_ref_A", "human_ref_B", "labels", {"1": 0, "0": 1}),
    "saferlhf": ("response_0", "response_1", "better_response_id", {"0": 0, "1": 1}),
    "arena": ("conversation_a", "conversation_b", "winner", {"model_a": 0, "model_b": 1}),
}


def _unpaired(row: Row) -> Records:
    values = row.values
    label = label_in(values)
    completion = next((values[name] for name in ("completion", "output") if values.get(name) is not None), None)
    if completion is not None:
        prompt, response = any_prompt(values), turns_of(completion, "completion", "assistant")
    else:
        whole = any_prompt(values)
        prompt, response = whole[:-1], whole[-1:]
        if len(whole) == 1 or response[0].role != "assistant":
            raise BadRowError("not_an_example", "not a labelled completion: no completion")
    check_prompt(prompt)
    check_response(response, "completion")
    weight, tools = number_in(values, "weight", 1.0, at_least=0.0), tools_in(values)
    example = UnpairedExample(
        prompt=prompt, completion=response, label=label, tools=tools, weight=weight, source=row.source
    )
    return [example]


def singles_of(records: Sequence[PreferencePair | UnpairedExample]) -> Iterator[UnpairedExample]:
    """A row as single completions. Of ranked responses those that are always or never preferred, once each: one that
    beats some and loses to others is neither desirable nor undesirable."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    lost, won = ({repr(getattr(pair, side)) for pair in pairs} for side in ("rejected", "chosen"))
    seen: set[str] = set()
    numbers = {True: 0, False: 0}
    for record in records:
        for single in unpair(record) if isinstance(record, PreferencePair) else (record,):
            text = repr(single.completion)
            if len(pairs) > 1 and (text in seen or text in (lost if single.label else won)):
                continue
            seen.add(text)
            yield replace(single, number=numbers[single.label])
            numbers[single.label] += 1


def unpair(pair: PreferencePair) -> tuple[UnpairedExample, UnpairedExample]:
    """A pair as two completions, the desirable one first; its margin has no meaning then."""
    good, bad = (
        UnpairedExample(
            prompt=pair.prompt,
            completion=completion,
            label=label,
            tools=pair.tools,
            weight=pair.weight,
            number=pair.number,
            source=pair.source,
        )
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    )
    return good, bad


def _of_sides(row: Row, prompt: Turns | None) -> Records:
    """The pair of `chosen` and `rejected`: responses to the prompt, or whole conversations, that begin with it."""
    chosen = turns_of(row.values["chosen"], "chosen", "assistant")
    rejected = turns_of(row.values["rejected"], "rejected", "assistant")
    if prompt is None or (chosen[0].role != "assistant" and rejected[0].role != "assistant"):
        return [_parted(row, chosen, rejected, prompt)]
    return [_built(row, prompt, chosen, rejected)]


def _parted(row: Row, chosen: Turns, rejected: Turns, told: Turns | None) -> PreferencePair:
    """Two whole conversations as a pair: the turns that they share are the prompt, and `told`, if any, stands in it."""
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        what = "share no first turn" if most else "are no whole conversations, and there is no prompt"
        raise BadRowError("different_prompts", f"chosen and rejected {what}")
    if any(turns[shared].role != "assistant" for turns in (chosen, rejected)):
        message = f"chosen and rejected part at turn {shared + 1}, before the assistant's turn"
        raise BadRowError("different_prompts", f"{message}; the prompt has to be the same")
    prompt = chosen[:shared]
    if told is not None and not _stands_in(told, prompt):
        raise BadRowError("different_prompts", "chosen and rejected are conversations that don't begin with the prompt")
    prompt = prompt if prompt[0].role == "system" else with_system(row.values, prompt)
    return _built(row, prompt, chosen[shared:], rejected[shared:])


def _stands_in(told: Turns, prompt: Turns) -> bool:
    """Whether a prompt column is how the conversation begins, or the text of its first or last question."""
    if told == prompt[: len(told)]:
        return True
    asked = [message.content.strip() for message in prompt if message.role == "user"]
    return bool(asked) and told[-1].content.strip() in (asked[0], asked[-1]) and len(told) <= 2


def _record(row: Row, prompt: Turns, chosen: object, rejected: object) -> PreferencePair:
    return _built(row, prompt, turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant"))


def _built(row: Row, prompt: Turns, chosen: Turns, rejected: Turns) -> PreferencePair:
    check_prompt(prompt)
    check_response(chosen, "chosen")
    check_response(rejected, "rejected")
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=tools_in(row.values),
        weight=number_in(row.values, "weight", 1.0, at_least=0.0),
        margin=number_in(row.values, "margin", 0.0, at_least=-math.inf),
        source=row.source,
    )


def _refusing(read: Callable[[Row], Records]) -> Callable[[Row], Records | Finding]:
    """`read`, with what it refuses as a finding at the row's place."""

    @wraps(read)
    def records(row: Row) -> Records | Finding:
        try:
            return read(row)
        except BadRowError as error:
            return Finding(code=error.code, severity="error", message=str(error), source=row.source)

    return records


SHAPES: Mapping[str, Callable[[Row], Records | Finding]] = {
    name: _refusing(read)
    for name, read in {
        "pair": _pair,
        "whole": _whole,
        "hh": _hh,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "openai": _openai,
        "ranked": _ranked,
        "shp": _contest("shp"),
        "saferlhf": _contest("saferlhf"),
        "arena": _contest("arena"),
        "unpaired": _unpaired,
    }.items()
}
"""Shape name -> row -> its records, or why it has not that shape."""

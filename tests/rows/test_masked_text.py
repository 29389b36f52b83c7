"""Marks of parts that don't count, in messages and in columns: read as spans of the response, or refused by name."""

from __future__ import annotations

import pytest

from qpref.records import Finding, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import records_of_row


def read(**values: object) -> PreferencePair | UnpairedExample | Finding:
    found = records_of_row(Row(values={"prompt": "2+2?", **values}, source=Source(path="made", line=3)))
    return found if isinstance(found, Finding) else found[0]


def reply(content: object, **marks: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **marks}


def masked_texts(pair: PreferencePair, side: str = "chosen") -> list[str]:
    (message,) = getattr(pair, side)
    return [message.content[start:end] for start, end in message.masked]


def refusal(**values: object) -> str:
    found = read(**values)
    assert isinstance(found, Finding)
    assert (found.severity, str(found.source)) == ("error", "made:3")
    return f"{found.code}: {found.message}"


def test_parts_with_train_false_are_masked():
    parts = [
        {"type": "text", "text": "Let me see. ", "train": False},
        "It is ",
        {"type": "text", "text": "4", "train": True},
        {"text": "!!", "train": False},
    ]
    pair = read(chosen=reply(parts), rejected="5")
    assert pair.chosen[0].content == "Let me see. It is 4!!"
    assert masked_texts(pair) == ["Let me see. ", "!!"]
    assert masked_texts(pair, "rejected") == []


def test_spans_of_a_message_and_of_a_column_are_characters():
    pair = read(chosen=reply("née 🙂 so: 4", masked=[[0, 3], [6, 8]]), rejected="so: 5", rejected_masked=[[0, 3]])
    assert masked_texts(pair) == ["née", "so"]
    assert masked_texts(pair, "rejected") == ["so:"]


def test_spans_in_a_csv_file_are_json():
    assert masked_texts(read(chosen="so: 4", rejected="5", chosen_masked="[[0, 3]]")) == ["so:"]


def test_spans_are_joined_where_they_touch():
    pair = read(chosen=reply("so: 4", masked=[[2, 3], [0, 2]]), rejected="5", chosen_masked=[[1, 3]])
    assert pair.chosen[0].masked == ((0, 3),)


def test_details_are_axolotls_with_the_last_character_in_and_the_rest_masked():
    text = "I'm doing very well, thank you!"  # the example of Axolotl's manual
    details = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 19, "end_offset": 30, "train": False},
    ]
    for given in (details, details[1:2]):
        assert masked_texts(read(chosen=reply(text, train_detail=given), rejected="no")) == [text[:9], text[19:]]


def test_a_single_completion_has_a_mask_too():
    example = read(completion="so: 4", label=True, completion_masked=[[0, 3]])
    assert example.completion[0].masked == ((0, 3),)


def test_the_prefix_of_both_responses_is_a_part_of_them_that_does_not_count():
    pair = read(response_prefix="Step 1. ", chosen="It is 4", rejected="It is 5", chosen_masked=[[0, 2]])
    assert [pair.chosen[0].content, pair.rejected[0].content] == ["Step 1. It is 4", "Step 1. It is 5"]
    assert masked_texts(pair) == ["Step 1. It"]
    assert masked_texts(pair, "rejected") == ["Step 1. "]


def test_the_data_of_step_dpo_are_read_as_they_are_published():
    pair = read(
        dataset="gsm8k",
        initial_reason_steps="Let's think step by step.\nStep 1:",
        chosen=" 2+2 is 4.",
        rejected=" 2+2 is 5.",
        full_chosen=" 2+2 is 4.\nStep 2: So 4.",
        full_rejected=" 2+2 is 5.\nStep 2: So 5.",
        answer="4",
    )
    assert pair.chosen[0].content == "Let's think step by step.\nStep 1: 2+2 is 4."
    assert masked_texts(pair) == masked_texts(pair, "rejected") == ["Let's think step by step.\nStep 1:"]


def test_an_empty_prefix_changes_nothing():
    assert read(initial_reason_steps="", chosen="4", rejected="5") == read(chosen="4", rejected="5")


def test_marks_of_the_prompt_make_no_difference():
    marked = [
        {"role": "user", "content": "Hi", "train": True},
        reply("Hello", train=False),
        {"role": "user", "content": "?"},
    ]
    plain = [{name: each[name] for name in ("role", "content")} for each in marked]
    assert read(prompt=marked, chosen="4", rejected="5") == read(prompt=plain, chosen="4", rejected="5")


def test_whole_conversations_share_turns_whatever_their_marks():
    chosen = [{"role": "user", "content": "Hi", "train": False}, reply("one: 4", masked=[[0, 4]])]
    rejected = [{"role": "user", "content": "Hi"}, reply("5")]
    found = records_of_row(Row(values={"chosen": chosen, "rejected": rejected}, source=Source(path="made", line=1)))
    assert masked_texts(found[0]) == ["one:"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (reply("4", train=False), "masked: chosen: the whole response is masked, so that nothing of it counts"),
        (reply("4 ", masked=[[0, 1]]), "masked: chosen: the whole response"),
        (reply("four", masked=[[0, 5]]), "bad_mask: {at}, masked: [0, 5] is no span of a text of 4 characters"),
        (reply("four", masked=[[2, 2]]), "bad_mask: {at}, masked: [2, 2] is no span"),
        (reply("four", masked=[[-1, 2]]), "bad_mask: {at}, masked: [-1, 2] is no span"),
        (
            reply("four", masked=[0, 0, 1]),
            "bad_mask: {at}, masked: expected [start, end] in characters, found 0: a mask of tokens fits one tokenizer",
        ),
        (reply("four", masked="x"), "bad_mask: {at}, masked: expected [[start, end], ...], found a text"),
        (reply("four", train="no"), "bad_mask: {at}: train is true or false, found 'no'"),
        (reply([{"text": "four", "train": 0}]), "bad_mask: {at}, part 1: train is true or false, found 0"),
        (
            reply([{"type": "thinking", "thinking": "hm", "train": False}, "4"]),
            "bad_mask: {at}, part 1: reasoning is masked by [data] mask_patterns",
        ),
        (
            reply("four", train_detail=[{"begin_offset": 0, "end_offset": 4, "train": True}]),
            "bad_mask: {at}, train_detail: 0 to 4 aren't characters of a text of 4; the first is 0",
        ),
        (reply("four", train_detail=[{"begin_offset": 0}]), "bad_mask: {at}, train_detail: a detail has"),
    ],
)
def test_a_bad_mask_refuses_its_row_and_says_why(chosen, message):
    assert refusal(chosen=chosen, rejected="5").startswith(message.format(at="chosen, turn 1"))


def test_a_column_of_several_responses_is_refused():
    message = refusal(chosen=["four", "44"], rejected="5", chosen_masked=[[0, 1]])
    assert message.startswith("bad_mask: chosen_masked: the row has several responses")
    assert refusal(chosen="4", rejected="5", response_prefix=3).startswith("bad_mask: response_prefix: expected a text")


def test_calls_count_where_only_the_text_beside_them_is_masked():
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}
    pair = read(chosen=reply("hm", masked=[[0, 2]], tool_calls=[call]), rejected="5")
    assert pair.chosen[0].masked == ((0, 2),)
    assert "whole response" in refusal(chosen=reply("hm", train=False, tool_calls=[call]), rejected="5")

"""The built-in regression set: its size and couples, no item twice, and no wrong key."""

from __future__ import annotations

import operator
import re
from collections import Counter

import pytest

from qpref.errors import DataError
from qpref.evaluation.gate import items_of, read_items
from qpref.evaluation.heldout_pairs import normalize

PAIRS = read_items(None)
ITEMS = items_of(PAIRS)
TEXTS = [(pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content) for pair in PAIRS]
OPERATORS = {"+": operator.add, "-": operator.sub, "times": operator.mul, "divided by": operator.truediv}


def test_there_are_over_200_items_in_six_categories():
    counts = Counter(ITEMS.categories)
    assert set(counts) == {"arithmetic", "facts", "format", "languages", "reading", "refusals"}
    assert sum(counts.values()) >= 240
    assert min(counts.values()) >= 28


def test_every_item_has_its_counterpart_next_to_it():
    assert ITEMS.partner.tolist() == [index ^ 1 for index in range(len(PAIRS))]


def test_no_prompt_is_there_twice():
    assert [prompt for prompt, count in Counter(normalize(text) for text, _, _ in TEXTS).items() if count > 1] == []


def test_an_answer_is_not_the_other_answer_in_other_words():
    """Up to spaces; capitals may be the point."""
    assert [(right, wrong) for _, right, wrong in TEXTS if right.strip().split() == wrong.strip().split()
            and "\n" not in right + wrong] == []  # fmt: skip
    assert all(text == text.strip() and text for item in TEXTS for text in item)


def right_number(prompt):
    """Work out an arithmetic item from its words."""
    numbers = [int(digits) for digits in re.findall(r"\d+", prompt)]
    first, second = numbers if len(numbers) == 2 else (numbers[0], 0)
    for word, work in {"larger": max, "smaller": min, "more": operator.add, "loses": operator.sub}.items():
        if re.search(rf"\b{word}\b", prompt):
            return work(first, second)
    for word, step in {"after": 1, "before": -1}.items():
        if f"right {word}" in prompt:
            return first + step
    (found,) = re.findall(r"\d (\+|-|times|divided by) \d", prompt)
    return OPERATORS[found](first, second)


ARITHMETIC = [item for item, name in zip(TEXTS, ITEMS.categories, strict=True) if name == "arithmetic"]


def test_the_key_of_each_arithmetic_item_is_right():
    wrong_keys = [item for item in ARITHMETIC if float(item[1]) != right_number(item[0])]
    assert wrong_keys == []
    assert [item for item in ARITHMETIC if float(item[2]) == right_number(item[0])] == []


def test_copies_are_in_their_prompts():
    """A prompt that asks for its own words holds the right answer, and not the wrong one."""
    asked = [item for item in TEXTS if re.match(r"(Repeat|Copy) this", item[0])]
    assert len(asked) >= 6
    assert [item for item in asked if item[1] not in item[0] or item[2] in item[0]] == []


def test_answers_of_an_item_are_of_similar_length():
    """So that no model is right on a couple's one item by length alone; the copy of a sentence is the longest."""
    assert [item for item in TEXTS if abs(len(item[1]) - len(item[2])) > 20] == []


def test_an_item_without_a_wrong_answer_is_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "1 + 1?", "chosen": "2", "rejected": "2"}\n')
    with pytest.raises(DataError, match=r"own\.jsonl:1: chosen and rejected are the same text"):
        read_items(str(path))

"""Held-out prompts are on one side alone, and sources are mixed as their weights say, whatever the order of rows."""

import itertools
from array import array
from collections import Counter
from dataclasses import replace

import pytest

from qpref.data.split import HeldOutShare, resample
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample


def pair(prompt, line=1, chosen="Yes."):
    turns = {"prompt": prompt, "chosen": chosen, "rejected": "No."}
    return PreferencePair(
        **{side: (Message(role="user", content=text),) for side, text in turns.items()},
        source=Source(path="pairs.x", line=line),
    )


def example(path, line):
    return TokenizedExample(
        prompt=array("i", [1]),
        branches=(array("i", [2]), array("i", [3])),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=Source(path=path, line=line),
    )


PROMPTS = [f"Question {number}?" for number in range(2000)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_about_the_share_of_the_prompts_is_held_out(share):
    split = HeldOutShare(share, seed=3)
    held_out = sum(split.split_of([pair(prompt)]) == "heldout" for prompt in PROMPTS)
    assert held_out / len(PROMPTS) == pytest.approx(share, abs=0.03)  # 2.7 standard deviations at a half


def test_rows_of_one_prompt_are_on_one_side_whatever_their_answers_and_lines():
    split = HeldOutShare(0.5, seed=0)
    for prompt in PROMPTS[:50]:
        sides = {split.split_of([pair(prompt, line, chosen)]) for line, chosen in enumerate(["A.", "B.", "C."])}
        assert len(sides) == 1


def test_case_and_white_space_make_no_other_prompt():
    split = HeldOutShare(0.5, seed=0)
    for prompt in PROMPTS[:50]:
        assert split.split_of([pair(prompt)]) == split.split_of([pair(f"  {prompt.upper()} \n")])


def test_punctuation_and_the_system_turn_make_no_other_prompt():
    split = HeldOutShare(0.5, seed=0)
    for prompt in PROMPTS[:50]:
        bare = split.split_of([pair(prompt)])
        assert split.split_of([pair(prompt.replace("?", " ..."))]) == bare
        asked = pair(prompt)
        with_system = (Message(role="system", content="Be brief."), *asked.prompt)
        assert split.split_of([replace(asked, prompt=with_system)]) == bare


def test_prompts_without_a_letter_are_distinguished():
    split = HeldOutShare(0.5, seed=0)
    assert {split.split_of([pair("?" * number)]) for number in range(1, 30)} == {"train", "heldout"}


def test_which_rows_a_fraction_takes_does_not_hang_on_where_the_file_lies():
    here, there = (
        [one.source.line for one in resample([example(path, line) for line in range(1, 200)], {path: 0.5}, seed=0)]
        for path in ("here/x", "there/x")
    )
    assert here == there


def test_another_seed_holds_out_other_prompts():
    sides = [[HeldOutShare(0.5, seed).split_of([pair(prompt)]) for prompt in PROMPTS[:100]] for seed in (0, 1)]
    assert sides[0] != sides[1]


def test_a_row_that_is_none_counts_to_the_training_data():
    finding = Finding(code="bad", severity="error", message="", source=Source(path="pairs.x", line=1))
    assert HeldOutShare(1.0, 0).split_of(finding) == "train"


@pytest.mark.parametrize(("weight", "least", "most"), [(1, 1, 1), (2, 2, 2), (0.25, 0, 1), (2.5, 2, 3)])
def test_rows_come_as_often_as_their_source_weighs(weight, least, most):
    examples = [example("heavy", line) for line in range(1000)] + [example("other", line) for line in range(10)]
    found = Counter(str(one.source) for one in resample(examples, {"heavy": weight}, seed=5))
    times = [found[f"heavy:{line}" if line else "heavy"] for line in range(1000)]
    assert (min(times), max(times)) == (least, most)
    assert sum(times) / 1000 == pytest.approx(weight, abs=0.05)
    assert sum(count for source, count in found.items() if source.startswith("other")) == 10


def test_the_same_rows_are_taken_in_whatever_order_they_come():
    examples = [example("half", line) for line in range(1, 100)]
    there, back = (
        sorted(one.source.line for one in resample(order, {"half": 0.5}, seed=0))
        for order in (examples, examples[::-1])
    )
    assert there == back


def test_copies_of_a_row_follow_each_other():
    examples = [example("twice", line) for line in (1, 2, 3)]
    lines = [one.source.line for one in resample(examples, {"twice": 2.0}, seed=0)]
    assert lines == list(itertools.chain.from_iterable((line, line) for line in (1, 2, 3)))

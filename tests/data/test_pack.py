"""The packed stream against a slow oracle that walks each row by itself, and the dealing of micro-batches."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpref.data.pack import num_fed_tokens, pack, split_by_tokens
from qpref.records import Group, PackedBatch, Source, TokenizedExample

CPU = torch.device("cpu")


def make_example(prompt: list[int], *branches: list[int], line: int = 1) -> TokenizedExample:
    return TokenizedExample(
        prompt=array("i", prompt),
        branches=tuple(array("i", branch) for branch in branches),
        truncated=(False,) * len(branches),
        weight=1.0 + line,
        margin=-float(line),
        source=Source(path="made", line=line),
    )


@st.composite
def example_lists(draw: st.DrawFn, max_size: int = 6) -> list[TokenizedExample]:
    """Examples with as many branches each, of 1 to 6 tokens; few different ids, so that chance matches are common."""
    tokens = st.lists(st.integers(0, 9), min_size=1, max_size=6)
    num_branches = draw(st.integers(1, 3))
    rows = draw(st.lists(st.tuples(*[tokens] * (1 + num_branches)), min_size=1, max_size=max_size))
    return [make_example(*row, line=line) for line, row in enumerate(rows)]


def walk(batch: PackedBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (row, positions) that each scored token is predicted from, by the layout that the attention follows.

    A row is what its last token sees: the group's prompt, and its own branch up to and with itself.
    """
    ids, positions = batch.input_ids.tolist(), batch.position_ids.tolist()
    seen: dict[int, list[int]] = {}
    for group in batch.groups:
        prompt = list(range(group.start, group.start + group.prompt))
        seen |= {place: prompt[: number + 1] for number, place in enumerate(prompt)}
        start = group.start + group.prompt
        for length in group.branches:
            branch = list(range(start, start + length))
            seen |= {place: prompt + branch[: number + 1] for number, place in enumerate(branch)}
            start += length
    rows = [seen[place] for place in batch.score_at.tolist()]
    return [(tuple(ids[place] for place in row), tuple(positions[place] for place in row)) for row in rows]


@given(example_lists())
@settings(deadline=None)
def test_each_token_is_predicted_from_its_own_row_up_to_the_token_before(examples):
    wanted = [
        (*example.prompt, *branch[:number]) for example in examples for branch in example.branches
        for number in range(len(branch))
    ]  # fmt: skip
    assert [row for row, _ in walk(pack(examples, CPU))] == wanted


@given(example_lists())
@settings(deadline=None)
def test_positions_count_each_row_from_its_prompts_start(examples):
    assert all(positions == tuple(range(len(row))) for row, positions in walk(pack(examples, CPU)))


@given(example_lists())
@settings(deadline=None)
def test_every_response_token_is_scored_once_in_order(examples):
    batch = pack(examples, CPU)
    branches = [branch.tolist() for example in examples for branch in example.branches]
    assert batch.score_token.tolist() == [token for branch in branches for token in branch]
    assert batch.lengths == tuple(map(len, branches))


@given(example_lists())
@settings(deadline=None)
def test_the_stream_has_no_padding_each_prompt_once_and_feeds_no_last_token(examples):
    batch = pack(examples, CPU)
    prompts = sum(map(len, {tuple(example.prompt) for example in examples}))
    fed = prompts + sum(len(branch) - 1 for example in examples for branch in example.branches)
    assert batch.num_tokens == len(batch.position_ids) == fed <= sum(map(num_fed_tokens, examples))
    ends = [group.start + group.prompt + sum(group.branches) for group in batch.groups]
    assert [group.start for group in batch.groups] == [0, *ends[:-1]]  # groups lie end to end
    assert ends[-1] == fed


def test_a_stream_by_hand():
    first, second = make_example([5, 6, 7], [8, 9], [4], line=1), make_example([1], [2], [3, 3, 3], line=2)
    batch = pack([first, second], CPU)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 3, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.groups == (Group(start=0, prompt=3, branches=(1, 0)), Group(start=4, prompt=1, branches=(0, 2)))
    assert batch.score_at.tolist() == [2, 3, 2, 4, 4, 5, 6]
    assert batch.score_token.tolist() == [8, 9, 4, 2, 3, 3, 3]
    assert batch.lengths == (2, 1, 1, 3)
    assert (batch.weight.tolist(), batch.margin.tolist()) == ([2.0, 3.0], [-1.0, -2.0])


def test_examples_of_one_prompt_are_one_group_and_keep_their_order():
    first, other, again = (
        make_example([5, 6], [8, 9], line=1), make_example([1], [2], line=2), make_example([5, 6], [3, 4, 4], line=3)
    )  # fmt: skip
    batch = pack([first, other, again], CPU)
    assert batch.input_ids.tolist() == [5, 6, 8, 3, 4, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 0]
    assert batch.groups == (Group(start=0, prompt=2, branches=(1, 2)), Group(start=5, prompt=1, branches=(0,)))
    assert batch.group_of == (0, 1, 0)
    assert batch.score_at.tolist() == [1, 2, 5, 1, 3, 4]
    assert batch.score_token.tolist() == [8, 9, 2, 3, 4, 4]
    assert batch.lengths == (2, 1, 3)
    assert batch.weight.tolist() == [2.0, 3.0, 4.0]


def test_examples_of_one_prompt_are_dealt_one_after_the_other():
    """So that they come into one micro-batch where it has space for them, and share the prompt there."""
    rows = [([1, 2], [3] * 9), ([4, 5], [3] * 8), ([1, 2], [3] * 2), ([4, 5], [3] * 2)]
    dealt = split_by_tokens([make_example(*row, line=line) for line, row in enumerate(rows)], 14)
    assert [[example.source.line for example in members] for members in dealt] == [[0, 2], [1, 3]]


def test_types_are_what_the_model_takes():
    batch = pack([make_example([1], [2], [3])], CPU)
    integers = (batch.input_ids, batch.position_ids, batch.score_at, batch.score_token)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.weight.dtype == batch.margin.dtype == torch.float32


def test_a_stop_token_that_is_also_the_padding_token_is_scored():
    padding = 0
    batch = pack([make_example([1, padding, 2], [3, padding], [padding])], CPU)
    assert batch.score_token.tolist() == [3, padding, padding]


@pytest.mark.parametrize(("shared", "wanted"), [(True, 3 + 1 + 4), (False, 2 * 3 + 1 + 4)], ids=["shared", "rows"])
def test_a_prompt_costs_once_or_once_a_branch(shared, wanted):
    assert num_fed_tokens(make_example([1, 2, 3], [4, 5], [6, 7, 8, 9, 9]), shared) == wanted


budgets = st.integers(1, 40)


@given(example_lists(max_size=12), budgets, st.booleans())
@settings(deadline=None)
def test_every_example_is_dealt_exactly_once(examples, budget, shared):
    dealt = [example.source.line for members in split_by_tokens(examples, budget, shared) for example in members]
    assert sorted(dealt) == [example.source.line for example in examples]


@given(example_lists(max_size=12), budgets, st.booleans())
@settings(deadline=None)
def test_no_micro_batch_is_over_the_budget_but_a_lone_example(examples, budget, shared):
    for members in split_by_tokens(examples, budget, shared):
        assert len(members) == 1 or sum(num_fed_tokens(example, shared) for example in members) <= budget


@given(example_lists(max_size=12), budgets, st.booleans())
@settings(deadline=None)
def test_no_two_micro_batches_would_go_into_one(examples, budget, shared):
    costs = [sum(num_fed_tokens(e, shared) for e in members) for members in split_by_tokens(examples, budget, shared)]
    assert all(one + other > budget for place, one in enumerate(costs) for other in costs[:place])


@given(example_lists(max_size=12), budgets)
@settings(deadline=None)
def test_dealing_depends_on_nothing_but_lengths_equal_prompts_order_and_budget(examples, budget):
    def lines(dealt: list[list[TokenizedExample]]) -> list[list[int]]:
        return [[example.source.line for example in members] for members in dealt]

    others = [
        replace(example, prompt=array("i", [9 - token for token in example.prompt]), weight=0.0, margin=0.0)
        for example in examples
    ]
    assert lines(split_by_tokens(examples, budget)) == lines(split_by_tokens(others, budget))

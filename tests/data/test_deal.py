"""Examples are dealt to processes once each, alike in all of them, prompts together and tokens in equal shares."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import make_example

from qpref.data.deal import WHOLE, deal
from qpref.data.pack import num_fed_tokens, split_indices
from qpref.records import TokenizedExample


@st.composite
def steps(draw: st.DrawFn) -> list[TokenizedExample]:
    """Examples of 2 to 80 tokens, of which several may have one prompt."""
    prompts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rows = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 40)), max_size=16))
    return [
        make_example([number] * prompts[number], [7] * length, line=line) for line, (number, length) in enumerate(rows)
    ]


def num_tokens(examples: list[TokenizedExample], share: list[int], shared: bool) -> int:
    """Input tokens of a share, each of its prompts once where prompts are shared."""
    if not shared:
        return sum(num_fed_tokens(examples[index], shared) for index in share)
    prompts = {examples[index].prompt.tobytes(): len(examples[index].prompt) for index in share}
    return sum(prompts.values()) + sum(len(branch) - 1 for index in share for branch in examples[index].branches)


@given(steps(), st.integers(1, 6), st.booleans())
@settings(deadline=None)
def test_every_example_is_dealt_once(examples, size, shared):
    shares = deal(examples, size, shared)
    assert len(shares) == size
    assert sorted(index for share in shares for index in share) == list(range(len(examples)))
    assert all(share == sorted(share) for share in shares)


@given(steps(), st.integers(2, 6), st.booleans())
@settings(deadline=None)
def test_largest_share_exceeds_a_fair_one_by_less_than_a_group_of_one_prompt(examples, size, shared):
    """The bound of any greedy deal; cutting a group may only lower the largest share."""
    loads = [num_tokens(examples, share, shared) for share in deal(examples, size, shared)]
    by_prompt: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.prompt.tobytes() if shared else index, []).append(index)
    groups = [num_tokens(examples, members, shared) for members in by_prompt.values()]
    assert max(loads) <= sum(groups) / size + max(groups, default=0)


@given(steps(), st.integers(2, 4), st.booleans(), st.integers(1, 200))
@settings(deadline=None)
def test_a_budget_costs_a_sixteenth_of_balance_at_most(examples, size, shared, budget):
    plain, shares = deal(examples, size, shared), deal(examples, size, shared, budget)
    assert sorted(index for share in shares for index in share) == list(range(len(examples)))
    largest = [max(num_tokens(examples, share, shared) for share in each) for each in (plain, shares)]
    assert largest[1] <= WHOLE * largest[0]


def test_micro_batches_of_nearly_equal_size_are_dealt_whole_and_split_alike_again():
    tokens = [9, 8, 9, 8, 4, 4, 9, 8, 9, 8, 4, 4]
    examples = [make_example([line] * 5, [7] * size, line=line) for line, size in enumerate(tokens)]
    whole = split_indices(examples, 36)
    again = [
        [share[index] for index in part]
        for share in deal(examples, 2, budget=36)
        for part in split_indices([examples[index] for index in share], 36)
    ]
    assert sorted(again) == sorted(whole)
    assert {frozenset(part) for part in whole}.isdisjoint(
        frozenset(share[index] for index in part)
        for share in deal(examples, 2)
        for part in split_indices([examples[index] for index in share], 36)
    )


def test_fewer_micro_batches_than_processes_are_dealt_by_example():
    examples = [make_example([line], [7] * 9, line=line) for line in range(4)]
    assert len(split_indices(examples, 1000)) == 1
    assert [len(share) for share in deal(examples, 2, budget=1000)] == [2, 2]


def test_a_share_is_the_largest_first_to_whoever_has_the_fewest():
    examples = [make_example([line], [7] * tokens, line=line) for line, tokens in enumerate([2, 9, 4, 6, 3])]
    # 9 | 6, then 6 + 4 | 9 + 3, and the smallest to the 10 tokens.
    assert deal(examples, 2) == [[1, 4], [0, 2, 3]]


def test_pairs_of_one_prompt_stay_together():
    prompts = [[1] * 30, [2] * 30, [3] * 30, [4] * 30]
    examples = [make_example(prompts[line % 4], [7] * 3, line=line) for line in range(12)]
    assert deal(examples, 2) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert deal(examples, 4) == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_a_group_that_would_keep_the_others_waiting_is_cut():
    examples = [make_example([1] * 10, [7] * 21, line=line) for line in range(8)]
    examples.append(make_example([2] * 10, [7] * 2, line=8))
    # 170 tokens of one prompt beside 11 of another: the halves of the first have its 10 tokens each.
    assert sorted(num_tokens(examples, share, True) for share in deal(examples, 2)) == [90, 101]


def test_rows_that_share_no_prompt_in_memory_are_dealt_one_by_one():
    examples = [make_example([1] * 30, [7] * 3, line=line) for line in range(4)]
    assert deal(examples, 4, shared=False) == [[0], [1], [2], [3]]


def test_more_processes_than_examples():
    assert deal([make_example([1], [2, 3])], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]

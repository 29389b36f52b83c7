"""Pairs that are longer than the recipe allows, over lengths below, at and above each limit."""

from __future__ import annotations

from array import array
from itertools import product

import pytest

from qpref.data.truncate import fit_length
from qpref.recipe import DataSection
from qpref.records import Finding, Source, TokenizedExample

MAX_LENGTH, MAX_PROMPT = 10, 4
STOP = 0


def limits(on_overflow: str) -> DataSection:
    return DataSection.model_validate(
        {"train": "x", "max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT, "on_overflow": on_overflow}
    )


def make_example(prompt: int, chosen: int, rejected: int) -> TokenizedExample:
    """Tokens that tell where they came from: prompt 1, 2...; chosen 101...; rejected 201...; then a stop token."""
    return TokenizedExample(
        prompt=array("i", range(1, 1 + prompt)),
        branches=(array("i", [*range(101, 100 + chosen), STOP]), array("i", [*range(201, 200 + rejected), STOP])),
        truncated=(False, False),
        weight=2.0,
        margin=0.5,
        source=Source(path="made", line=7),
    )


# Prompts below, at and above their limit of 4; responses about the 6 that such a prompt leaves of 10, and the shortest.
LENGTHS = list(product((1, 4, 5), (1, 6, 7, 12), (1, 6, 7, 12)))
FITTING = [lengths for lengths in LENGTHS if lengths[0] <= MAX_PROMPT and lengths[0] + max(lengths[1:]) <= MAX_LENGTH]
OVERLONG = [lengths for lengths in LENGTHS if lengths not in FITTING]
CUT_APART = [lengths for lengths in OVERLONG if lengths[1:] != (1, 1)]  # two answers of a stop token alone are the same


@pytest.mark.parametrize("on_overflow", ["error", "drop", "truncate"])
@pytest.mark.parametrize("lengths", FITTING, ids=str)
def test_what_fits_is_left_as_it_is(lengths, on_overflow):
    example = make_example(*lengths)
    assert fit_length(example, limits(on_overflow)) is example


@pytest.mark.parametrize("lengths", OVERLONG, ids=str)
def test_drop_leaves_every_overlong_pair_out(lengths):
    assert fit_length(make_example(*lengths), limits("drop")) is None


@pytest.mark.parametrize("lengths", OVERLONG, ids=str)
def test_error_refuses_every_overlong_pair(lengths):
    found = fit_length(make_example(*lengths), limits("error"))
    assert isinstance(found, Finding)
    assert (found.code, found.severity, str(found.source)) == ("too_long", "error", "made:7")


def test_a_refusal_says_which_limit_by_how_much():
    over_prompt, over_all = make_example(5, 1, 1), make_example(4, 1, 7)
    assert fit_length(over_prompt, limits("error")).message == "the prompt has 5 tokens, over max_prompt_length 4"
    assert fit_length(over_all, limits("error")).message == "prompt and response have 11 tokens, over max_length 10"


@pytest.mark.parametrize("lengths", CUT_APART, ids=str)
def test_truncating_keeps_the_prompts_end_and_each_responses_start(lengths):
    example = make_example(*lengths)
    fitted = fit_length(example, limits("truncate"))
    kept = min(lengths[0], MAX_PROMPT)
    assert fitted.prompt.tolist() == example.prompt.tolist()[lengths[0] - kept :]
    for whole, cut in zip(example.branches, fitted.branches, strict=True):
        assert cut.tolist() == whole.tolist()[: MAX_LENGTH - kept]


@pytest.mark.parametrize("lengths", CUT_APART, ids=str)
def test_truncating_never_empties_a_part_and_keeps_every_limit(lengths):
    fitted = fit_length(make_example(*lengths), limits("truncate"))
    assert 1 <= len(fitted.prompt) <= MAX_PROMPT
    for branch in fitted.branches:
        assert 1 <= len(branch) <= MAX_LENGTH - len(fitted.prompt)


@pytest.mark.parametrize("lengths", CUT_APART, ids=str)
def test_a_response_is_marked_as_cut_where_it_lost_its_stop_token(lengths):
    fitted = fit_length(make_example(*lengths), limits("truncate"))
    assert fitted.truncated == tuple(branch[-1] != STOP for branch in fitted.branches)


def test_truncating_leaves_the_pairs_other_fields_alone():
    fitted = fit_length(make_example(20, 20, 20), limits("truncate"))
    assert (fitted.weight, fitted.margin, str(fitted.source)) == (2.0, 0.5, "made:7")


def test_a_pair_that_differs_only_beyond_the_cut_is_refused():
    example = make_example(4, 8, 8)
    same = TokenizedExample(
        prompt=example.prompt,
        branches=(array("i", [1, 2, 3, 4, 5, 6, 7, STOP]), array("i", [1, 2, 3, 4, 5, 6, 8, STOP])),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=example.source,
    )
    found = fit_length(same, limits("truncate"))
    assert isinstance(found, Finding)
    assert (found.code, found.message) == ("identical", "chosen and rejected are the same in their first 6 tokens")


def test_the_tightest_limits_leave_one_token_of_a_response():
    data = DataSection.model_validate(
        {"train": "x", "max_length": 2, "max_prompt_length": 1, "on_overflow": "truncate"}
    )
    fitted = fit_length(make_example(20, 20, 20), data)
    assert (fitted.prompt.tolist(), [branch.tolist() for branch in fitted.branches]) == ([20], [[101], [201]])

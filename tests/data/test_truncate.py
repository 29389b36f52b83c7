"""Pairs that are longer than the recipe allows, over lengths below, at and above each limit."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import product

import pytest
from families import FAMILIES, KINDS, Family, tokenizer_of
from tokenizers.processors import TemplateProcessing

from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length
from qpref.recipe.data_section import DataSection
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

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
LENGTHS = [lengths for lengths in product((1, 4, 5), (1, 6, 7, 12), (1, 6, 7, 12)) if lengths[1:] != (1, 1)]
FITTING = [lengths for lengths in LENGTHS if lengths[0] <= MAX_PROMPT and lengths[0] + max(lengths[1:]) <= MAX_LENGTH]
OVERLONG = [lengths for lengths in LENGTHS if lengths not in FITTING]
CUT_APART = [lengths for lengths in OVERLONG if lengths[0] <= MAX_PROMPT]  # the tokenizer cuts prompts


@pytest.mark.parametrize("on_overflow", ["error", "drop", "truncate"])
@pytest.mark.parametrize("lengths", FITTING, ids=str)
def test_what_fits_is_left_as_it_is(lengths, on_overflow):
    example = make_example(*lengths)
    assert fit_length(example, limits(on_overflow)) is example


@pytest.mark.parametrize("on_overflow", ["error", "drop", "truncate"])
def test_a_pair_of_the_same_tokens_is_dropped_with_a_warning_though_it_fits(on_overflow):
    found = fit_length(make_example(2, 1, 1), limits(on_overflow))
    assert (found.code, found.severity, found.message) == (
        "identical",
        "warning",
        "dropped: chosen and rejected are the same tokens",
    )


@pytest.mark.parametrize("lengths", OVERLONG, ids=str)
def test_drop_leaves_every_overlong_pair_out(lengths):
    assert fit_length(make_example(*lengths), limits("drop")) is None


@pytest.mark.parametrize("lengths", OVERLONG, ids=str)
def test_error_refuses_every_overlong_pair(lengths):
    found = fit_length(make_example(*lengths), limits("error"))
    assert isinstance(found, Finding)
    assert (found.code, found.severity, str(found.source)) == ("too_long", "error", "made:7")


def test_a_refusal_says_which_limit_by_how_much():
    over_prompt, over_all = make_example(5, 1, 2), make_example(4, 1, 7)
    assert fit_length(over_prompt, limits("error")).message == "the prompt has 5 tokens, over max_prompt_length 4"
    assert fit_length(over_all, limits("error")).message == "prompt and response have 11 tokens, over max_length 10"


@pytest.mark.parametrize("lengths", CUT_APART, ids=str)
def test_truncating_keeps_the_prompt_and_each_responses_start(lengths):
    example = make_example(*lengths)
    fitted = fit_length(example, limits("truncate"))
    assert fitted.prompt == example.prompt
    for whole, cut in zip(example.branches, fitted.branches, strict=True):
        assert cut.tolist() == whole.tolist()[: MAX_LENGTH - lengths[0]]


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
    fitted = fit_length(make_example(4, 20, 20), limits("truncate"))
    assert (fitted.weight, fitted.margin, str(fitted.source)) == (2.0, 0.5, "made:7")


def test_a_pair_that_differs_only_beyond_the_cut_is_dropped_with_a_warning():
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
    assert (found.code, found.severity) == ("identical", "warning")
    assert found.message == "dropped: cut to their first 6 tokens, chosen and rejected are the same"


def test_the_tightest_limits_leave_one_token_of_a_response():
    data = DataSection.model_validate(
        {"train": "x", "max_length": 2, "max_prompt_length": 1, "on_overflow": "truncate"}
    )
    fitted = fit_length(make_example(1, 20, 20), data)
    assert (fitted.prompt.tolist(), [branch.tolist() for branch in fitted.branches]) == ([1], [[101], [201]])


# Prompts: what truncation leaves is a conversation as the template writes it


def with_history(family: Family, num_earlier: int, question: str) -> PreferencePair:
    system = (Message(role="system", content="Be short."),) if family.has_system else ()
    earlier = [
        Message(role=role, content=f"{role} says {number}, a word or two")
        for number in range(num_earlier)
        for role in ("user", "assistant")
    ]
    thought = "<think>\nhm\n</think>\n\n" if family.name == "deepseek_r1" else ""
    chosen, rejected = (Message(role="assistant", content=thought + text) for text in ("four", "five"))
    return PreferencePair(
        prompt=(*system, *earlier, Message(role="user", content=question)),
        chosen=(chosen,),
        rejected=(rejected,),
        source=Source(path="made", line=1),
    )


def tokenized(tokenizer: PairTokenizer, row: PreferencePair, limit: int | None = None) -> TokenizedExample | Finding:
    *_, found = tokenizer.tokenize([row], limit)
    return found


QUESTION = "The question is what comes after the answer, and the weather in Köln: " + "two three four five " * 5
every_family = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in FAMILIES for kind in KINDS], ids=lambda value: value
)


@every_family
def test_a_cut_conversation_is_the_same_one_without_its_oldest_exchanges(name, kind):
    family = FAMILIES[name]
    tokenizer = PairTokenizer.of(tokenizer_of(family, kind), "chat", [])
    lengths = [len(tokenized(tokenizer, with_history(family, number, "and?")).prompt) for number in range(5)]
    row = with_history(family, 4, "and?")
    for kept in range(5):
        system = row.prompt[: family.has_system]
        wanted = tokenized(tokenizer, replace(row, prompt=(*system, *row.prompt[len(system) + 2 * (4 - kept) :])))
        for limit in (lengths[kept], lengths[kept] + 1):
            cut = tokenized(tokenizer, row, limit)
            assert cut == replace(wanted, prompt_cut=kept < 4)


@every_family
def test_the_last_question_loses_its_beginning_and_keeps_its_header_whatever_the_limit(name, kind):
    family = FAMILIES[name]
    tokenizer = PairTokenizer.of(tokenizer_of(family, kind), "chat", [])
    row = with_history(family, 2, QUESTION)
    shortest = len(tokenized(tokenizer, with_history(family, 0, ".")).prompt)
    longest = len(tokenized(tokenizer, with_history(family, 0, QUESTION)).prompt)
    for limit in range(shortest + 1, longest, 7):
        cut = tokenized(tokenizer, row, limit)
        assert limit - 3 <= len(cut.prompt) <= limit
        text = tokenizer.tokenizer.decode(cut.prompt.tolist())
        before, after = tokenizer.tokenizer.decode(
            tokenized(tokenizer, with_history(family, 0, "QUESTION")).prompt.tolist()
        ).split("QUESTION")
        assert text.startswith(before.rstrip(" "))
        assert text.endswith(after)
        kept = text.removeprefix(before.rstrip(" ")).removesuffix(after)
        assert QUESTION.strip().endswith(kept.strip())
        assert kept.strip()
        assert cut.prompt_cut
        assert cut.truncated == (False, False)


def test_a_limit_that_the_headers_and_the_system_turn_fill_refuses_the_row():
    tokenizer = PairTokenizer.of(tokenizer_of(FAMILIES["chatml"]), "chat", [])
    finding = tokenized(tokenizer, with_history(FAMILIES["chatml"], 1, "and?"), 10)
    assert (finding.code, finding.severity) == ("too_long", "error")
    assert finding.message == "the prompt is over max_prompt_length 10 even after truncation"


def test_what_follows_the_last_question_stays():
    tokenizer = PairTokenizer.of(tokenizer_of(FAMILIES["qwen"]), "chat", [])
    row = with_history(FAMILIES["qwen"], 2, QUESTION)
    lookup = (Message(role="assistant", content="let me look"), Message(role="tool", content="rain"))
    row = replace(row, prompt=row.prompt + lookup)
    cut = tokenized(tokenizer, row, 120)
    text = tokenizer.tokenizer.decode(cut.prompt.tolist())
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")
    assert "let me look<|im_end|>\n<|im_start|>user\n<tool_response>\nrain" in text


@pytest.mark.parametrize("adds_bos", [True, False], ids=["adds BOS", "doesn't"])
def test_without_a_template_a_prompt_keeps_bos_and_its_end(adds_bos):
    plain = tokenizer_of(FAMILIES["vicuna"])
    if adds_bos:
        bos = plain.bos_token_id
        plain.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PairTokenizer.of(plain, "none", [])
    row = replace(with_history(FAMILIES["vicuna"], 0, QUESTION), prompt=(Message(role="user", content=QUESTION),))
    whole = tokenized(tokenizer, row).prompt.tolist()
    cut = tokenized(tokenizer, row, 9)
    assert cut.prompt.tolist() == (whole[:1] + whole[-8:] if adds_bos else whole[-9:])
    assert tokenized(tokenizer, row, 1).prompt.tolist() == whole[-1:]

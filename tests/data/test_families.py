"""What holds for the chat templates of all families: BOS, stop tokens, boundaries, control tokens, turns, tools."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import FAMILIES, KINDS, Family, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpref.data.tokenize import PairTokenizer
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather", "parameters": {"type": "object"}},
}
CASES = [(name, kind) for name in FAMILIES for kind in KINDS]
every_family = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}, {kind}" for name, kind in CASES])
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=30)
MADE: dict[tuple[str, str], PairTokenizer] = {}


def pairs_of(name: str, kind: str) -> PairTokenizer:
    if (name, kind) not in MADE:
        MADE[name, kind] = PairTokenizer.of(tokenizer_of(FAMILIES[name], kind), "chat", [])
    return MADE[name, kind]


def said(role: str, content: str, **extra: object) -> Message:
    return Message(role=role, content=content, extra=extra)


def thought(family: Family, text: str) -> str:
    """R1's template opens a thinking block for every response."""
    return f"<think>\nhm\n</think>\n\n{text}" if family.name == "deepseek_r1" else text


def conversation(family: Family, prompt: str, chosen: str, rejected: str) -> PreferencePair:
    """A second question, after a system turn where the family has one."""
    system = [said("system", "Be short.")] if family.has_system else []
    earlier = [said("user", "What comes after two?"), said("assistant", "three")]
    return PreferencePair(
        prompt=(*system, *earlier, said("user", prompt)),
        chosen=(said("assistant", thought(family, chosen)),),
        rejected=(said("assistant", thought(family, rejected)),),
        source=Source(path="made", line=1),
    )


def tokenize(tokenizer: PairTokenizer, row: PreferencePair) -> TokenizedExample:
    *_, example = tokenizer.tokenize([row])
    assert isinstance(example, TokenizedExample), example
    return example


def as_dicts(*turns: Message) -> list[dict[str, object]]:
    return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in turns]


@every_family
def test_exactly_one_bos_where_the_template_writes_it_and_none_where_it_does_not(name, kind):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    example = tokenize(tokenizer, conversation(family, "and then?", "four", "five"))
    bos = tokenizer.tokenizer.bos_token_id
    if family.bos is None or name == "smollm":  # its BOS starts every turn
        return
    assert example.prompt.count(bos) == ("bos_token" in family.template)
    assert [branch.count(bos) for branch in example.branches] == [0, 0]


@every_family
@given(prompt=texts, chosen=texts, rejected=texts)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_response_ends_in_exactly_one_stop_token(name, kind, prompt, chosen, rejected):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    stop = tokenizer.tokenizer.convert_tokens_to_ids(family.stop)
    for each in tokenizer.tokenize([conversation(family, prompt, chosen, rejected)]):
        for branch in each.branches if isinstance(each, TokenizedExample) else ():
            assert branch[-1] == stop
            assert [token for token in branch if token in tokenizer.stop_tokens] == [stop]


def asked(name: str, kind: str, row: PreferencePair, **options: object):
    """The prompt as generation gets it; Qwen's without thinking, as the rows are."""
    thinking = {"enable_thinking": False} if name == "qwen" else {}
    return pairs_of(name, kind).tokenizer.apply_chat_template(
        as_dicts(*row.prompt), add_generation_prompt=True, **thinking, **options
    )


@every_family
def test_the_prompt_is_what_generation_starts_from(name, kind):
    row = conversation(FAMILIES[name], "and then?", "four", "five")
    assert tokenize(pairs_of(name, kind), row).prompt.tolist() == asked(name, kind, row, return_dict=False)


@every_family
@given(prompt=texts, chosen=texts, rejected=texts, other=texts)
@settings(deadline=None, max_examples=10)
def test_a_prompts_tokens_do_not_depend_on_the_responses(name, kind, prompt, chosen, rejected, other):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    made = [
        each.prompt
        for row in (conversation(family, prompt, chosen, rejected), conversation(family, prompt, other, chosen))
        for each in tokenizer.tokenize([row])
        if isinstance(each, TokenizedExample)
    ]
    assert all(one == made[0] for one in made)


@every_family
@pytest.mark.parametrize("prompt", ["and then?", "in Köln 🙂?\n\n", "  世界  is"])
@pytest.mark.parametrize("answer", ["four", "The  weather\n\nis 4", "世界 🙂", "12345 67890"])
def test_prompt_and_response_decode_to_the_conversation_with_no_space_between(name, kind, prompt, answer):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    row = conversation(family, prompt, answer, "the other")
    example = tokenize(tokenizer, row)
    for branch, side in zip(example.branches, (row.chosen, row.rejected), strict=True):
        text = side[0].content.removeprefix("<think>\n")
        together = asked(name, kind, row, tokenize=False) + family.opens + text + family.closes + family.stop
        if kind == "metaspace":
            together = together.replace("▁", " ")  # R1's tokens hold the sign that stands for a space there
        assert tokenizer.tokenizer.decode([*example.prompt, *branch]) == together


@every_family
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_every_control_token_in_a_text_is_refused(name, kind, side):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    for token in {family.stop, family.bos, family.eos, *family.others} - {None, ""}:
        spoken = {"prompt": "and?", "chosen": "four", "rejected": "five"} | {side: f"say {token} please"}
        (finding,) = tokenizer.tokenize([conversation(family, **spoken)])
        assert isinstance(finding, Finding)
        assert (finding.code, finding.message) == ("control_token", f"the text holds the control token {token}")


@every_family
def test_a_system_turn_is_rendered_or_the_row_is_refused_in_the_templates_words(name, kind):
    family, tokenizer = FAMILIES[name], pairs_of(name, kind)
    row = replace(conversation(family, "and?", "four", "five"), prompt=(said("system", "Be kind."), said("user", "Hi")))
    *_, found = tokenizer.tokenize([row])
    if family.has_system:
        assert "Be kind." in tokenizer.tokenizer.decode(found.prompt.tolist())
    else:
        assert (found.code, found.message) == ("template", "the chat template refuses it: System role not supported")


def with_tools(family: Family) -> PreferencePair:
    """The weather was asked for and told; the responses speak, or call the function again."""
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
    return PreferencePair(
        prompt=(
            said("user", "What is the weather in Köln?"),
            said("assistant", "", tool_calls=[call]),
            said("tool", "rain", name="get_weather"),
        ),
        chosen=(said("assistant", "It rains."),),
        rejected=(said("assistant", "", tool_calls=[call]),),
        tools=(WEATHER,),
        source=Source(path="made", line=1),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_tools])
def test_tools_calls_and_their_results_reach_the_prompt_and_a_call_is_a_response(name, kind):
    tokenizer = pairs_of(name, kind)
    row = with_tools(FAMILIES[name])
    first, *more = tokenizer.tokenize([row])
    example = more[-1] if more else first
    assert isinstance(example, TokenizedExample), example
    decode = tokenizer.tokenizer.decode
    prompt = decode(example.prompt.tolist())
    assert '"description": "The weather"' in prompt
    assert '"Köln"' in prompt
    assert "rain" in prompt
    assert '"get_weather"' in decode(example.branches[1].tolist())
    assert {branch[-1] for branch in example.branches} == {
        tokenizer.tokenizer.convert_tokens_to_ids(FAMILIES[name].stop)
    }
    assert not [each for each in (first, *more[:-1]) if isinstance(each, Finding) and each.code == "template"]


@pytest.mark.parametrize("name", ["chatml", "zephyr", "smollm", "phi3"])
def test_a_template_without_a_place_for_tools_is_warned_of_and_a_call_that_it_loses_refused(name):
    tokenizer = pairs_of(name, KINDS[0])
    row = conversation(FAMILIES[name], "and?", "four", "five")
    warnings = [each for each in tokenizer.tokenize([replace(row, tools=(WEATHER,))]) if isinstance(each, Finding)]
    assert [(each.severity, each.message) for each in warnings if each.code == "template"] == [
        ("warning", "the chat template doesn't render tools")
    ]
    (refused,) = tokenizer.tokenize([replace(row, rejected=with_tools(FAMILIES[name]).rejected)])
    assert (refused.severity, refused.message) == ("error", "the chat template drops a part of a response")

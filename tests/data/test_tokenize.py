"""Pairs become the tokens that the model will meet: one BOS or none, one stop token, one prompt for both sides."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from families import FAMILIES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qpref.data.tokenize import PairTokenizer
from qpref.errors import PolicyError
from qpref.hooks import hang_watch
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

END_OF_TEXT, START, END = 256, 257, 258  # <|endoftext|>, <|im_start|>, <|im_end|>: the last is eos and pad too


def make_pair(prompt: object = "2+2?", chosen: str = "4", rejected: str = "five", line: int = 1) -> PreferencePair:
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    return PreferencePair(
        prompt=tuple(Message(role=role, content=content) for role, content in turns),
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
        weight=2.0,
        margin=0.5,
        source=Source(path="made", line=line),
    )


def with_bos(tokenizer):
    """The tokenizer as one that puts its BOS before every text by itself, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    assert tokenizer("x")["input_ids"][0] == START
    return tokenizer


def tokenize(pair: PreferencePair, tokenizer=None, template: str = "chat", stop_tokens=()) -> TokenizedExample:
    *_, example = PairTokenizer.of(tokenizer or make_tokenizer(), template, stop_tokens).tokenize([pair])
    assert isinstance(example, TokenizedExample), example
    return example


def refusal(pair: PreferencePair, tokenizer=None, template: str = "chat", stop_tokens=()) -> Finding:
    (finding,) = PairTokenizer.of(tokenizer or make_tokenizer(), template, stop_tokens).tokenize([pair])
    assert isinstance(finding, Finding), finding
    assert finding.severity == "error"
    assert finding.source == pair.source
    return finding


def text_of(example: TokenizedExample, branch: int, tokenizer=None) -> str:
    return (tokenizer or make_tokenizer()).decode([*example.prompt, *example.branches[branch]])


def test_a_pair_is_the_chat_template_around_its_texts():
    example = tokenize(make_pair())
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(example, 0) == f"{prompt}4<|im_end|>"
    assert text_of(example, 1) == f"{prompt}five<|im_end|>"


def test_a_conversation_is_rendered_whole():
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?")]
    rendered = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text_of(tokenize(make_pair(turns)), 0) == f"{rendered}<|im_start|>assistant\n4<|im_end|>"


def test_weight_margin_number_and_place_come_along():
    example = tokenize(replace(make_pair(line=7), number=3))
    assert (example.weight, example.margin, example.number, str(example.source)) == (2.0, 0.5, 3, "made:7")
    assert example.truncated == (False, False)


# BOS

TEMPLATE_WITH_BOS = "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|im_start|>", "[turn]")
TEMPLATE_WITHOUT_BOS = CHAT_TEMPLATE.replace("<|im_start|>", "[turn]")


@pytest.mark.parametrize("tokenizer_adds", [True, False], ids=["tokenizer adds", "tokenizer doesn't"])
@pytest.mark.parametrize(
    ("template", "wanted"), [(TEMPLATE_WITH_BOS, 1), (TEMPLATE_WITHOUT_BOS, 0)], ids=["has", "hasn't"]
)
def test_a_template_rules_over_bos(template, wanted, tokenizer_adds):
    tokenizer = make_tokenizer(template)
    if tokenizer_adds:
        tokenizer = with_bos(tokenizer)
    example = tokenize(make_pair(), tokenizer)
    assert example.prompt.count(START) == wanted
    assert [branch.count(START) for branch in example.branches] == [0, 0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], add_generation_prompt=True, return_dict=False
    )
    assert example.prompt.tolist() == asked  # what the model is given at inference


@pytest.mark.parametrize(("tokenizer_adds", "wanted"), [(True, 1), (False, 0)], ids=["adds", "doesn't"])
def test_without_a_template_the_tokenizer_rules_over_bos(tokenizer_adds, wanted):
    tokenizer = with_bos(make_tokenizer()) if tokenizer_adds else make_tokenizer()
    example = tokenize(make_pair(), tokenizer, template="none")
    assert example.prompt.count(START) == wanted
    assert example.prompt.tolist() == tokenizer("2+2?")["input_ids"]
    assert [branch.count(START) for branch in example.branches] == [0, 0]


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_tokenizer_without_bos_gets_none(template):
    tokenizer = make_tokenizer(TEMPLATE_WITHOUT_BOS)
    tokenizer.bos_token = None
    example = tokenize(make_pair(), tokenizer, template)
    assert START not in example.prompt


# The end of a response

ENDINGS = {  # what the template puts after a response
    "its end token": "<|im_end|>",
    "its end token and white space": "<|im_end|>\n\n",
    "nothing": "",
    "two end tokens": "<|im_end|><|im_end|>",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_response_ends_in_exactly_one_stop_token_where_the_template_puts(ending):
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}" + (
        ENDINGS[ending] + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = tokenize(make_pair(), make_tokenizer(template))
    for branch, text in zip(example.branches, ("4", "five"), strict=True):
        assert make_tokenizer().decode(branch[:-1]) == text
        assert branch[-1] == END


@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_padding_token_that_is_eos_stays_in_the_response(template):
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    assert [branch[-1] for branch in tokenize(make_pair(), tokenizer, template).branches] == [END, END]


def test_another_stop_token_of_the_model_ends_a_response_too():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    example = tokenize(make_pair(), tokenizer, stop_tokens=[END_OF_TEXT, END])
    assert tokenizer.decode(example.branches[0]) == "4<|im_end|>"


def test_the_first_of_several_stop_tokens_ends_a_response():
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|><|endoftext|>{% endfor %}"
    example = tokenize(make_pair(), make_tokenizer(template), stop_tokens=[END_OF_TEXT])
    assert make_tokenizer().decode(example.branches[0]) == "4<|im_end|>"


def test_without_a_template_the_first_stop_token_is_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    example = tokenize(make_pair(), tokenizer, template="none", stop_tokens=[END])
    assert tokenizer.decode(example.branches[0]) == "4<|endoftext|>"


def test_a_tokenizer_without_any_stop_token_is_refused():
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", ""))
    tokenizer.eos_token = None
    assert refusal(make_pair(), tokenizer).code == "no_stop"


# Prompt and response


def merging_tokenizer():
    """One that makes a single token of "Answer: " followed by "yes"."""
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens([": yes"])
    assert len(tokenizer("Answer: yes")["input_ids"]) < len(tokenizer("Answer: ")["input_ids"]) + len("yes")
    return tokenizer


def test_a_responses_first_token_never_swallows_the_prompts_last():
    tokenizer = merging_tokenizer()
    example = tokenize(make_pair("Answer: ", "yes", "no"), tokenizer, template="none")
    assert example.prompt.tolist() == tokenizer("Answer: ")["input_ids"]
    assert example.branches[0].tolist() == [*tokenizer("yes")["input_ids"], END]


def test_a_row_whose_boundary_moves_in_one_piece_is_warned_of_by_place_and_no_other_is():
    tokenizer = PairTokenizer.of(merging_tokenizer(), "none", [])
    rows = [make_pair("Answer: ", "maybe", "no", line=1), make_pair("Answer: ", "no", "yes", line=2)]
    first, warning, second = tokenizer.tokenize(rows)
    assert [type(each) for each in (first, second)] == [TokenizedExample] * 2
    assert (warning.code, warning.severity, str(warning.source)) == ("boundary", "warning", "made:2")
    assert warning.message == (
        "tokenized together, prompt and response would share a token: the response is tokenized separately"
    )


@given(prompt=st.text(alphabet="ab :\n", min_size=1, max_size=500), response=st.text(alphabet="ab :\n", min_size=1))
@settings(deadline=None)
def test_a_response_has_the_tokens_that_follow_the_prompts_in_one_piece_or_its_own(prompt, response):
    tokenizer = tokenizer_of(FAMILIES["vicuna"], "byte level")
    alone, joined, own = (tokenizer(text)["input_ids"] for text in (prompt, prompt + response, response))
    *warnings, example = PairTokenizer.of(tokenizer, "none", []).tokenize([make_pair(prompt, response, "b")])
    joins = joined[: len(alone)] == alone
    assert example.branches[0].tolist()[:-1] == (joined[len(alone) :] if joins else own)
    assert joins or [each.code for each in warnings] == ["boundary"]


def test_a_boundary_that_depends_on_the_whole_of_a_long_prompt_is_found():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    twos = Tokenizer(models.BPE({"a": 0, "aa": 1, "</s>": 2}, [("a", "a")]))  # from the left: what follows an odd one
    tokenizer = PairTokenizer.of(PreTrainedTokenizerFast(tokenizer_object=twos, eos_token="</s>"), "none", [])
    for length, codes in ((202, []), (203, ["boundary"])):
        *warnings, example = tokenizer.tokenize([make_pair("a" * length, "aaa", "a")])
        assert [each.code for each in warnings] == codes
        assert example.branches[0].tolist() == [1, 0, 2]


def test_a_long_prompt_is_not_tokenized_once_for_each_response():
    words = " ".join(f"word{number}" for number in range(2000))
    short = PairTokenizer.of(make_tokenizer(), "none", [])._pieces(make_pair(words))
    assert len(short.tail) == 200
    assert sum(map(len, short.texts)) < len(words) + 700


texts = st.text(min_size=1, max_size=20).filter(lambda text: "<|" not in text)  # hypothesis tries qpref's own constants


@given(prompt=texts, chosen=texts, rejected=texts)
@settings(deadline=None)
def test_prompt_and_response_decode_to_the_rendered_conversation(prompt, chosen, rejected):
    example = tokenize(make_pair(prompt, chosen, rejected), SHARED)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    for branch, answer in enumerate((chosen, rejected)):
        turns[1]["content"] = answer
        rendered = SHARED.apply_chat_template(turns, tokenize=False)
        assert text_of(example, branch, SHARED) + "\n" == rendered


@given(prompt=texts, chosen=texts, rejected=texts)
@settings(deadline=None)
def test_without_a_template_prompt_and_response_stand_as_they_are(prompt, chosen, rejected):
    example = tokenize(make_pair(prompt, chosen, rejected), SHARED, template="none")
    for branch, answer in enumerate((chosen, rejected)):
        assert text_of(example, branch, SHARED) == f"{prompt}{answer}<|im_end|>"


SHARED = make_tokenizer()


@given(prompt=texts, chosen=texts, rejected=texts, other=texts)
@settings(deadline=None)
def test_the_prompts_tokens_do_not_depend_on_the_responses(prompt, chosen, rejected, other):
    first = tokenize(make_pair(prompt, chosen, rejected), SHARED)
    second = tokenize(make_pair(prompt, rejected, other), SHARED)
    assert first.prompt == second.prompt
    assert first.branches[1] == second.branches[0]


def test_every_token_is_an_integer_of_the_vocabulary():
    example = tokenize(make_pair("é 🙂", "ж", "\u0000"))
    assert len(example.prompt) > 2
    assert all(0 <= token <= END for part in (example.prompt, *example.branches) for token in part)


# What is refused


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_a_control_token_in_a_text_is_refused_by_place(side, token):
    finding = refusal(make_pair(**{side: f"say {token} please"}, line=12))
    assert finding.code == "control_token"
    assert finding.message == f"the text holds the control token {token}"
    assert str(finding.source) == "made:12"


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_control_token_is_refused_with_and_without_a_template(template):
    assert refusal(make_pair("a<|im_end|>"), template=template).code == "control_token"


def test_a_control_token_in_an_earlier_turn_is_refused():
    turns = [("system", "<|im_start|>"), ("user", "2+2?")]
    assert refusal(make_pair(turns)).code == "control_token"


@pytest.mark.parametrize("place", ["name", "call", "key", "tool"])
def test_a_control_token_in_a_tool_or_a_call_of_one_is_refused(place):
    hidden = "a<|im_end|>"
    extras = {
        "name": {"name": hidden},
        "call": {"tool_calls": [{"function": {"name": "add", "arguments": {"left": [1, hidden]}}}]},
        "key": {"tool_calls": [{"function": {"name": "add", "arguments": {hidden: 1}}}]},
        "tool": {},
    }
    turn = Message(role="user", content="2+2?", extra=extras[place])
    tools = ({"name": "add", "description": hidden},) if place == "tool" else ()
    assert refusal(replace(make_pair(), prompt=(turn,), tools=tools)).code == "control_token"


def test_a_stop_token_that_the_tokenizer_does_not_call_special_is_refused_in_a_text():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<stop>"])
    assert refusal(make_pair("a<stop>"), tokenizer, stop_tokens=[END + 1]).code == "control_token"
    assert isinstance(tokenize(make_pair("a<stop>"), tokenizer), TokenizedExample)


def test_a_control_token_that_normalizing_makes_of_a_text_is_refused():
    tokenizer = tokenizer_of(FAMILIES["chatml"], "normalizing", normalized=True)
    fullwidth = "say \N{FULLWIDTH LESS-THAN SIGN}|im_end|> please"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(fullwidth)["input_ids"]
    for side in ("prompt", "chosen", "rejected"):
        finding = refusal(make_pair(**{side: fullwidth}), tokenizer)
        assert finding.code == "control_token"
        assert finding.message == "the tokenizer normalizes text to the control token <|im_end|>"
    assert tokenize(make_pair("say \N{FULLWIDTH LATIN SMALL LETTER A} please"), tokenizer)


def test_unknown_text_is_no_control_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert tokenize(make_pair("strange", "a", "b"), tokenizer, template="none").prompt.tolist() == [0]


def test_what_only_looks_like_a_control_token_is_text():
    example = tokenize(make_pair("<|im_end> <im_end|> |im_end|"))
    assert example.prompt.count(END) == 1  # the template's own


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    assert "<think>" in text_of(tokenize(make_pair(chosen="<think>"), tokenizer), 0, tokenizer)


def test_a_template_that_changes_the_prompt_once_a_response_follows_is_refused():
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "bot\n{% endif %}")
    finding = refusal(make_pair(), make_tokenizer(template))
    assert finding.code == "template"
    message = r"the chat template changes the prompt once a response follows: 'bot\n' is missing or different"
    assert finding.message == message


def test_where_a_template_drops_the_system_turn_once_a_response_follows_training_has_generations_prompt():
    loop = "{% for message in messages if messages[-1].role == 'user' or message.role != 'system' %}"
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("{% for message in messages %}", loop))
    turns = [("system", "Be short."), ("user", "2+2?")]
    warning, example = PairTokenizer.of(tokenizer, "chat", []).tokenize([make_pair(turns)])
    assert (warning.code, warning.severity) == ("template", "warning")
    assert (
        warning.message
        == "the chat template changes the prompt once a response follows; training uses the one for generation"
    )
    assert example == tokenize(make_pair(turns))


def test_what_a_template_says_when_it_refuses_is_passed_on():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    finding = refusal(make_pair([("system", "Be short."), ("user", "2+2?")]), make_tokenizer(template))
    assert (finding.code, finding.message) == ("template", "the chat template refuses it: no system role")


def test_a_template_that_leaves_nothing_of_a_response_is_refused():
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    finding = refusal(make_pair(), make_tokenizer(template))
    assert (finding.code, finding.message) == ("empty", "the chat template drops chosen completely")


def test_a_prompt_without_tokens_is_refused():
    assert refusal(make_pair(""), template="none").code == "empty"


def test_a_conversation_without_a_template_is_refused():
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?")]
    assert refusal(make_pair(turns), template="none").code == "no_template"


def test_tools_without_a_template_are_refused():
    assert refusal(replace(make_pair(), tools=({"name": "add"},)), template="none").code == "no_template"


@pytest.mark.parametrize(
    "extra", [{"tool_calls": [{"function": {"name": "add"}}]}, {"reasoning_content": "hm"}], ids=str
)
def test_without_a_template_calls_and_reasoning_are_refused_and_not_dropped(extra):
    turn = (Message(role="assistant", content="4", extra=extra),)
    for row in (replace(make_pair(), chosen=turn), replace(make_pair(), rejected=turn)):
        assert refusal(row, template="none").message == "tool calls and reasoning need a chat template"


def test_rows_are_the_same_in_whatever_company():
    rows = [make_pair(f"What is {number}?", str(number), "no", line=number) for number in range(200)]
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [])
    alone = [example for row in rows for example in tokenizer.tokenize([row])]
    assert list(tokenizer.tokenize(rows)) == alone


def test_one_bad_pair_leaves_the_others_as_they_are():
    pairs = [make_pair(line=1), make_pair("<|im_end|>", line=2), make_pair(line=3)]
    found = list(PairTokenizer.of(make_tokenizer(), "chat", []).tokenize(pairs))
    assert [type(each) for each in found] == [TokenizedExample, Finding, TokenizedExample]
    assert [each.source.line for each in found] == [1, 2, 3]


# No template


def test_without_a_template_in_the_model_texts_stand_as_they_are_and_the_log_says_so(caplog):
    example = tokenize(make_pair(), make_tokenizer(None), template="chat")
    assert text_of(example, 0) == "2+2?4<|im_end|>"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the model has no chat template")


def test_a_recipe_that_wants_no_template_is_not_warned(caplog):
    tokenize(make_pair(), template="none")
    assert not caplog.records


def test_the_first_row_is_shown_with_its_special_tokens_and_scored_spans():
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [])
    (example,) = tokenizer.tokenize([make_pair()])
    assert tokenizer.render_first(example) == (
        "prompt: <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\n"
        "chosen: ⟦4<|im_end|>⟧\nrejected: ⟦five<|im_end|>⟧"
    )


@pytest.mark.parametrize(("label", "name"), [(True, "desirable"), (False, "undesirable")])
def test_a_first_row_that_is_a_single_completion_is_shown_with_its_label(label, name):
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [])
    (pair,) = tokenizer.tokenize([make_pair()])
    single = replace(pair, branches=pair.branches[:1], truncated=pair.truncated[:1], label=label)
    assert tokenizer.render_first(single).splitlines()[-1] == f"{name}: ⟦4<|im_end|>⟧"


# A tokenizer's pattern splits most texts at once, and reaches Oniguruma's limits on others.

LONG = "a" * 2000


class PanicException(BaseException):
    """As PyO3's, which no library exports."""


@pytest.fixture
def panicking(monkeypatch):
    """A tokenizer that fails on a text of many a's."""
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "org/odd"
    call = type(tokenizer).__call__

    def fail_on_long(self, text, **options):
        if any(LONG in one for one in ([text] if isinstance(text, str) else text)):
            raise PanicException("Onig: Regex search error:\n retry-limit-in-match over")
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", fail_on_long)
    return tokenizer


@pytest.mark.parametrize("pair", [make_pair(LONG, line=2), make_pair(chosen=LONG, line=2)])
def test_a_row_at_which_the_tokenizer_fails_is_named_with_the_tokenizer(pair, panicking):
    pairs = PairTokenizer.of(panicking, "chat", ())
    with pytest.raises(PolicyError) as refused:
        list(pairs.tokenize([make_pair(), pair, make_pair(line=3)]))
    words = "the tokenizer of org/odd fails on it: Onig: Regex search error: retry-limit-in-match over"
    assert refused.value.what == f"made:2: {words}"
    assert refused.value.exit_code == 10


def test_a_prompt_that_the_tokenizer_fails_on_while_it_is_cut_is_named(panicking):
    pairs = PairTokenizer.of(panicking, "none", ())
    row = make_pair("b" * 10, line=7)
    assert list(pairs.tokenize([row], max_prompt_length=5))
    with pytest.raises(PolicyError, match=r"^made:7: the tokenizer of org/odd fails"):
        list(pairs.tokenize([make_pair(LONG, line=7)], max_prompt_length=5))


@pytest.mark.soak
def test_a_real_pattern_beyond_oniguruma_s_limits_is_named():
    """Some 20 CPU seconds: the limit is 10 million steps."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex("(?=.*.*.*.*x)a"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    with pytest.raises(PolicyError, match=r"^made:2: the tokenizer of .* fails on it: Onig: .*retry-limit-in-match"):
        list(PairTokenizer.of(tokenizer, "chat", ()).tokenize([make_pair(), make_pair(LONG, line=2)]))


def test_a_tokenizer_that_does_not_return_is_named_with_the_rows(monkeypatch):
    entered = []
    monkeypatch.setattr(hang_watch.watch, "enter", entered.append)
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "org/slow"
    list(PairTokenizer.of(tokenizer, "chat", ()).tokenize([make_pair(), make_pair(line=2)]))
    assert entered[0] == "the tokenizer of org/slow, on made:1 to made:2,"

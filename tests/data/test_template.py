"""Chat templates that think, and those that a stranger wrote: what they do to a prompt is found out, or refused."""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from dataclasses import replace

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from families import FAMILIES, tokenizer_of

from qpref.data import template_limits as guard
from qpref.data.template_limits import limited
from qpref.data.tokenize import PairTokenizer
from qpref.errors import PolicyError
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

THOUGHT = "<think>\nhm\n</think>\n\n"


def make_row(chosen: str, rejected: str, **extra: object) -> PreferencePair:
    return PreferencePair(
        prompt=(Message(role="user", content="2+2?"),),
        chosen=(Message(role="assistant", content=chosen, extra=extra),),
        rejected=(Message(role="assistant", content=rejected),),
        source=Source(path="made", line=3),
    )


def texts_of(template: str, chosen: str, rejected: str, **extra: object) -> list[str]:
    """Prompt and responses as texts, by a template over a byte-level tokenizer."""
    tokenizer = PairTokenizer.of(make_tokenizer(template), "chat", [])
    *_, example = tokenizer.tokenize([make_row(chosen, rejected, **extra)])
    assert isinstance(example, TokenizedExample), example
    return [tokenizer.tokenizer.decode(ids.tolist()) for ids in (example.prompt, *example.branches)]


def refusal(template: str, chosen: str = "4", rejected: str = "5", **extra: object) -> str:
    tokenizer = PairTokenizer.of(make_tokenizer(template), "chat", [])
    (finding,) = tokenizer.tokenize([make_row(chosen, rejected, **extra)])
    assert isinstance(finding, Finding), finding
    assert (finding.code, finding.severity, str(finding.source)) == ("template", "error", "made:3")
    return finding.message


# Thinking

QWEN = FAMILIES["qwen"].template
R1 = FAMILIES["deepseek_r1"].template.replace("<｜end▁of▁sentence｜>", "<|im_end|>")  # noqa: RUF001
ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def opening(when_thinking: str, when_not: str) -> str:
    """A template that starts a thinking block for generation, and always writes one into the last response."""
    prompt = (
        "{%- if enable_thinking is not defined or enable_thinking %}"
        + when_thinking
        + ("{% else %}" + when_not + "{% endif %}")
    )
    return QWEN.replace(
        "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        prompt,
    )


def test_responses_without_thinking_go_on_from_the_prompt_of_generation_without_it():
    prompt = ASKED + "<think>\n\n</think>\n\n"
    assert texts_of(QWEN, "4", "5") == [prompt, "4<|im_end|>", "5<|im_end|>"]


def test_a_response_that_thinks_is_generated_after_the_plain_prompt_and_so_is_its_rival():
    assert texts_of(QWEN, f"{THOUGHT}4", "5") == [
        ASKED,
        f"{THOUGHT}4<|im_end|>",
        "<think>\n\n</think>\n\n5<|im_end|>",
    ]


def test_thinking_beside_the_content_is_part_of_the_response():
    assert texts_of(QWEN, "4", "5", reasoning_content="hm")[1] == f"{THOUGHT}4<|im_end|>"


def test_a_block_that_the_prompt_opens_is_not_opened_again():
    template = opening("{{ '<think>\\n' }}", "{{ '<think>\\n\\n</think>\\n\\n' }}")
    assert template != QWEN
    thinking = [ASKED + "<think>\n", "hm\n</think>\n\n4<|im_end|>", "hm\n</think>\n\n5<|im_end|>"]
    assert texts_of(template, f"{THOUGHT}4", f"{THOUGHT}5") == thinking
    assert texts_of(template, "<think>hm</think>4", f"{THOUGHT}5") == thinking  # in the template's own form
    assert texts_of(template, "4", "5")[0] == ASKED + "<think>\n\n</think>\n\n"


def test_a_template_that_does_not_think_unless_asked_is_asked_for_responses_that_do():
    template = QWEN.replace(
        "is defined and not enable_thinking %}{{ '<think>\\n\\n", "is not defined %}{{ '<think>\\n\\n"
    )
    assert template != QWEN
    assert texts_of(template, f"{THOUGHT}4", f"{THOUGHT}5")[0] == ASKED
    assert texts_of(template, "4", "5")[0] == ASKED + "<think>\n\n</think>\n\n"


def test_thinking_that_a_template_drops_from_the_response_is_kept_after_the_block_that_it_opens():
    prompt = R1_PROMPT
    assert texts_of(R1, f"{THOUGHT}4", "<think>no</think>5") == [
        prompt,
        "hm\n</think>\n\n4<|im_end|>",
        "no</think>5<|im_end|>",
    ]


R1_PROMPT = "<|im_start|><｜User｜>2+2?<｜Assistant｜><think>\n"  # noqa: RUF001


def test_a_template_that_would_open_the_block_twice_opens_it_once():
    twice = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
        "{{ message['content'] }}",
        "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
    )
    assert texts_of(twice, f"{THOUGHT}4", "5")[1] == "hm\n</think>\n\n4<|im_end|>"


def test_a_response_without_the_thinking_that_generation_would_open_is_refused():
    assert refusal(R1, f"{THOUGHT}4", "5") == (
        "the chat template changes the prompt once a response follows: '<think>\\n' is missing or different"
    )


def test_thinking_that_a_template_drops_without_opening_a_block_is_kept_as_it_is_written():
    template = R1.replace("<think>\\n", "")
    assert texts_of(template, f"{THOUGHT}4", "5")[1:] == [f"{THOUGHT}4<|im_end|>", "5<|im_end|>"]


def test_a_template_that_drops_the_end_of_a_response_is_refused():
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'][:4]")
    assert refusal(template, "four five") == "the chat template drops a part of a response"


def test_thinking_beside_the_content_that_a_template_does_not_read_is_refused():
    assert refusal(CHAT_TEMPLATE, reasoning_content="hm") == "the chat template drops a part of a response"


# What templates do to the prompt

LEFT_OUT = "the chat template drops or changes the text of the system turn"


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("{% for message in messages if message.role != 'system' %}", LEFT_OUT),
        (
            "{% for message in messages | sort(attribute='role', reverse=true) %}",
            "the chat template changes the order of turns",
        ),
    ],
    ids=["drops", "reorders"],
)
def test_a_template_that_drops_or_moves_a_turn_is_warned_of(loop, said):
    tokenizer = PairTokenizer.of(
        make_tokenizer(CHAT_TEMPLATE.replace("{% for message in messages %}", loop)), "chat", []
    )
    row = make_row("4", "5")
    row = PreferencePair(
        prompt=(Message(role="system", content="Be short."), *row.prompt),
        chosen=row.chosen,
        rejected=row.rejected,
        source=row.source,
    )
    warnings = [each.message for each in tokenizer.tokenize([row]) if isinstance(each, Finding)]
    assert warnings[0] == said


def test_a_template_that_goes_on_after_a_stop_token_is_refused():
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] }}<|im_end|>{{ message['content'] }}"
    )
    assert refusal(template) == "the chat template writes more text after the stop token <|im_end|>"


def test_an_end_of_turn_that_generation_does_not_stop_at_ends_responses_and_is_warned_of(caplog):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    pairs = PairTokenizer.of(tokenizer, "chat", [])
    assert pairs.stop_tokens == (256, 258)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the chat template ends a response with <|im_end|>, at which the model's generation settings don't stop: "
        "add 258 to the eos_token_id of generation_config.json"
    )
    caplog.clear()
    assert PairTokenizer.of(tokenizer, "chat", [258]).stop_tokens == (256, 258)
    assert not caplog.records


def test_what_stands_after_the_last_response_alone_is_not_the_end_of_a_turn():
    assert PairTokenizer.of(tokenizer_of(FAMILIES["phi3"]), "chat", []).template.end_of_turn == "<|end|>"
    assert (
        PairTokenizer.of(tokenizer_of(FAMILIES["cohere"]), "chat", []).template.end_of_turn == "<|END_OF_TURN_TOKEN|>"
    )


def test_an_end_of_turn_in_plain_text_stays_and_eos_follows_it():
    template = CHAT_TEMPLATE.replace("<|im_end|>", "[end]")
    assert texts_of(template, "4", "5\n")[1:] == ["4[end]<|im_end|>", "5\n[end]<|im_end|>"]


def test_a_template_that_writes_the_date_is_warned_of(caplog):
    PairTokenizer.of(make_tokenizer("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE), "chat", [])
    assert "today's date" in caplog.text


def test_a_template_that_refuses_the_probe_is_used_all_the_same():
    template = "{% if messages[0].content != '2+2?' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    assert texts_of(template, "4", "5")[1:] == ["4<|im_end|>", "5<|im_end|>"]


@pytest.mark.parametrize("fault", ["{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{{ messages.x.y }}", "{{ 'a'|int('b') + [] }}"])
def test_whatever_a_templates_program_raises_refuses_the_row(fault):
    assert refusal(CHAT_TEMPLATE + fault).startswith("the chat template refuses it: ")


# A greeting by the assistant


def greeted(*before: Message) -> PreferencePair:
    row = make_row("4", "5")
    return replace(row, prompt=(*before, Message(role="assistant", content="Ask me."), *row.prompt))


def test_a_greeting_by_the_assistant_is_in_the_prompt():
    tokenizer = PairTokenizer.of(make_tokenizer(CHAT_TEMPLATE), "chat", [])
    (example,) = tokenizer.tokenize([greeted()])
    assert isinstance(example, TokenizedExample)
    assert "assistant\nAsk me.<|im_end|>\n<|im_start|>user\n2+2?" in tokenizer.tokenizer.decode(example.prompt.tolist())


@pytest.mark.parametrize("before", [(), (Message(role="system", content="Be kind."),)], ids=["first", "after system"])
def test_a_template_that_refuses_a_greeting_says_what_to_do(before):
    alternating = "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" \
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"  # fmt: skip
    tokenizer = PairTokenizer.of(make_tokenizer(alternating + CHAT_TEMPLATE), "chat", [])
    (finding,) = tokenizer.tokenize([greeted(*before)])
    assert isinstance(finding, Finding)
    assert finding.message == (
        "the chat template refuses it: Roles must alternate; the assistant speaks first: remove that turn, or move it "
        "into the system turn"
    )
    assert not isinstance(next(iter(tokenizer.tokenize([make_row("4", "5")]))), Finding)


# Templates that a stranger wrote

UNSAFE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "attribute filter": "{{ (''|attr('__class__')).__base__ }}",
    "change": "{% set _ = messages.append(1) %}",
    "syntax": "{% for message in messages %}",
}
ENDLESS = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "power": "{{ (7 ** (9 ** 9)) % 2 }}",
    "long text": "{{ 'a' * 200000000 }}",
    "longer text": "{{ ('a' * 20000000000)|length }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", UNSAFE.values(), ids=UNSAFE)
def test_a_template_that_reaches_out_of_its_sandbox_is_refused(template):
    with pytest.raises(PolicyError, match="the chat template cannot be run"):
        PairTokenizer.of(make_tokenizer(CHAT_TEMPLATE + template), "chat", [])


# Hypothesis times the garbage collector in a callback, where the first exception may end up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("when", ["always", "for one row"])
def test_a_template_that_takes_all_time_or_memory_is_refused_soon(template, when, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    limits, started = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    if when == "for one row":
        template = (
            "{% if messages[0].content == '2+2?' %}" + template.replace("'a'", "messages[0].role") + "{% endif %}"
        )
    tokenizer = make_tokenizer(CHAT_TEMPLATE + template)
    try:
        (found,) = PairTokenizer.of(tokenizer, "chat", []).tokenize([make_row("4", "5")])
    except PolicyError as error:
        found = Finding(code="template", severity="error", message=error.what, source=Source(path="", line=0))
    assert (found.code, found.severity, found.message[:18]) == ("template", "error", "the chat template ")
    assert time.process_time() - started < 3
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_limits_leave_the_signals_of_others_alone():
    def own(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGVTALRM, own)
    try:
        with limited():
            assert signal.getsignal(signal.SIGVTALRM) is not own
        assert signal.getsignal(signal.SIGVTALRM) is own
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_rows_are_tokenized_in_a_thread_too():
    found: list[object] = []
    pairs = PairTokenizer.of(make_tokenizer(), "chat", [])
    thread = threading.Thread(target=lambda: found.extend(pairs.tokenize([make_row("4", "5")])))
    thread.start()
    thread.join()
    assert isinstance(found[0], TokenizedExample)

"""Tool calls and reasoning reach each kind of chat template in the form that it reads."""

from __future__ import annotations

import json

import pytest
from conftest import make_tokenizer
from families import FAMILIES

from qpref.data.tokenize import PairTokenizer
from qpref.records import Finding, Row, Source, TokenizedExample
from qpref.rows.formats import records_of_row

ARGUMENTS = {"city": 'Köln "Süd"', "days": [1, 2.5], "exact": True}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
OPEN, CLOSE = "{{ '<|im_start|>' + m.role + '\\n' }}", "{{ '<|im_end|>\\n' }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}{% set args = call.function.arguments %}"
    "<call>{{ call.function.name }} CALL{% endfor %}"
)
TURNS = "{% for m in messages %}" + OPEN + "{{ m.content or '' }}" + CALLS + CLOSE + GENERATION
ITEMS = "{% for key, value in args.items() %}<{{ key }}>{{ value if value is string else value | tojson }}{% endfor %}"
TEMPLATES = {
    name: TURNS.replace("CALL", call)
    for name, call in {
        "tojson": "{{ args | tojson }}",
        "tojson of the function": "{{ call.function | tojson }}",
        "text added": "{{ '' + args }}",
        "text joined": "{{ '' ~ args }}",
        "text printed": "{{ args }}",
        "either": "{{ args if args is string else args | tojson }}",
        "long ids": "{% if call.id | length != 9 %}{{ raise_exception('') }}{% endif %}{{ args | tojson }}",
    }.items()
}
TEMPLATES["text, if there are tools"] = TEMPLATES["text added"].replace(
    "in m.tool_calls or []", "in m.tool_calls if tools"
)
TEMPLATES["text, and no results of tools"] = (
    "{% for m in messages if m.role == 'tool' %}{{ raise_exception('') }}{% endfor %}" + TEMPLATES["text added"]
)


def example_of(template, chosen, rejected="It rains."):
    """Texts of prompt and responses; or the finding that refuses the row."""
    values = {
        "prompt": "Weather?",
        "chosen": [{"role": "assistant"} | chosen],
        "rejected": rejected,
        "tools": [{"name": "weather"}],
    }
    (record,) = records_of_row(Row(values=values, source=Source(path="made", line=1)))
    tokenizer = PairTokenizer.of(make_tokenizer(template), "chat", [])
    *_, found = tokenizer.tokenize([record])
    if isinstance(found, Finding):
        return found
    assert isinstance(found, TokenizedExample)
    return [tokenizer.tokenizer.decode(ids.tolist()) for ids in (found.prompt, *found.branches)]


def call(arguments):
    return {"tool_calls": [{"id": "abcdefgh9", "function": {"name": "weather", "arguments": arguments}}]}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_arguments_are_encoded_once_whatever_the_template_and_the_data_have(template):
    ours, theirs = (example_of(template, call(arguments)) for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)))
    assert ours == theirs
    assert ours[1].startswith("<call>")
    assert ours[1].count(TEXT) == 1


def test_a_template_that_writes_arguments_one_by_one_gets_the_object():
    template = TURNS.replace("CALL", ITEMS)
    for arguments in (ARGUMENTS, TEXT):
        assert (
            example_of(template, call(arguments))[1]
            == '<call>weather <city>Köln "Süd"<days>[1, 2.5]<exact>true<|im_end|>'
        )


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral"])
def test_the_families_that_call_tools_encode_arguments_once(name):
    tokenizer = make_tokenizer(FAMILIES[name].template)
    assert not PairTokenizer.of(tokenizer, "chat", []).template.form.arguments_as_text


@pytest.mark.parametrize("name", ["tojson", "text added"])
def test_arguments_that_are_no_object_stay_text(name):
    assert '{"city": ' in example_of(TEMPLATES[name], call('{"city": '))[1].replace("\\", "")


def test_arguments_that_a_template_drops_refuse_the_row():
    template = TURNS.replace("CALL", "{% if args is mapping %}" + ITEMS + "{% endif %}")
    assert example_of(template, call(ARGUMENTS))[1].startswith("<call>weather <city>")
    found = example_of(template, call("no JSON"))
    assert (found.code, found.message) == ("template", "the chat template drops a part of a response")


def test_a_call_of_the_prompt_that_a_template_drops_is_warned_of():
    values = {
        "prompt": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant"} | call(ARGUMENTS),
            {"role": "tool", "content": "rain"},
        ],
        "chosen": "It rains.",
        "rejected": "It snows.",
    }
    (record,) = records_of_row(Row(values=values, source=Source(path="made", line=1)))
    for template, messages in (
        (TURNS.replace("CALL", ""), ["the chat template drops or changes a tool call of the prompt"]),
        (TEMPLATES["tojson"], []),
    ):
        findings = PairTokenizer.of(make_tokenizer(template), "chat", []).tokenize([record])
        assert [one.message for one in findings if isinstance(one, Finding) and one.code == "template"] == messages


@pytest.mark.parametrize("reads", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("written", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_key_that_the_template_reads(reads, written):
    block = f"{{% if m.{reads} %}}<think>{{{{ m.{reads} }}}}</think>{{% endif %}}"
    template = TURNS.replace("{{ m.content", block + "{{ m.content")
    chosen = {"content": "It rains.", written: "Clouds."}
    assert example_of(template, chosen)[1] == "<think>Clouds.</think>It rains.<|im_end|>"


@pytest.mark.parametrize(
    "content",
    ["{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content[0]['text'] }}", "{{ m.content[0].text }}"],
)
def test_a_template_that_reads_parts_alone_gets_parts(content):
    assert example_of(
        TURNS.replace("{{ m.content or '' }}", content).replace("CALL", ""), {"content": "It pours."}
    ) == [
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
        "It pours.<|im_end|>",
        "It rains.<|im_end|>",
    ]


@pytest.mark.parametrize("content", ["{{ m.content[:3] }}", "{{ m.content | upper }}", "{{ m.content | tojson }}"])
def test_a_template_that_changes_texts_does_not_get_parts(content):
    template = TURNS.replace("{{ m.content or '' }}", content).replace("CALL", "")
    assert not PairTokenizer.of(make_tokenizer(template), "chat", []).template.form.content_as_parts

"""Chat templates taken apart, and written in Ollama's language: each text where the template itself puts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_tokenizer

from qpref.merging.chat_pieces import chat_pieces
from qpref.merging.modelfile import ollama_template

TEMPLATES = Path(__file__).parents[1] / "data/templates"
MADE_OF_FIXED_TEXTS = ("chatml", "cohere", "deepseek_r1", "llama3", "phi3", "qwen", "smollm", "vicuna", "zephyr")
NOT_SO = ("gemma", "mistral")
"""They put the system turn into a user's."""
CONVERSATION = (("user", "Hi"), ("assistant", "Hello."), ("user", "What comes\nafter 3?"))
SYSTEM = ("system", "Count aloud.")


def tokenizer_of(name):
    return make_tokenizer((TEMPLATES / f"{name}.jinja").read_text())


def as_go(template: str, turns) -> str:
    """What Go's text/template makes of a template that `ollama_template` writes, for turns that an answer follows."""
    found = re.fullmatch(
        r"\{\{ if \.System \}\}(.*?)\{\{ \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
        r"\{\{ range \$i, \$_ := \.Messages \}\}\{\{ if eq \.Role \"user\" \}\}(.*?)\{\{ \.Content \}\}(.*?)"
        r"\{\{ if eq \(len \(slice \$\.Messages \$i\)\) 1 \}\}(.*?)\{\{ end \}\}"
        r"\{\{ else if eq \.Role \"assistant\" \}\}(.*?)\{\{ \.Content \}\}"
        r"\{\{ if eq \(len \(slice \$\.Messages \$i\)\) 1 \}\}\{\{ else \}\}(.*?)\{\{ end \}\}"
        r"\{\{ end \}\}\{\{ end \}\}",
        template,
        re.DOTALL,
    )
    before, after, default, user, user_end, generation, answer, answer_end = found.groups()
    text = default
    for role, content in turns:
        match role:
            case "system":
                text = before + content + after
            case "user":
                text += user + content + user_end
            case "assistant":
                text += answer + content + answer_end
    return text + generation


@pytest.mark.parametrize(
    "turns", [CONVERSATION[:1], CONVERSATION, (SYSTEM, *CONVERSATION)], ids=["one", "three", "system"]
)
@pytest.mark.parametrize("name", MADE_OF_FIXED_TEXTS)
def test_a_template_in_ollamas_language_writes_the_conversation_that_the_models_own_writes(name, turns):
    tokenizer = tokenizer_of(name)
    listed = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
    assert as_go(ollama_template(chat_pieces(tokenizer)), turns) == expected


@pytest.mark.parametrize("name", NOT_SO)
def test_a_template_that_is_not_made_of_fixed_texts_has_no_pieces(name):
    assert chat_pieces(tokenizer_of(name)) is None


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ strftime_now('%d') }}{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }};{% endfor %}",
        "{% for m in messages %}[{{ m.role }}{{ loop.index }}]{{ m.content }};{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
    ids=["none", "date", "changed content", "numbered turns", "refused"],
)
def test_what_the_pieces_cannot_say_is_not_said(template):
    assert chat_pieces(make_tokenizer(template)) is None


def test_a_bos_token_that_the_tokenizer_adds_itself_is_left_to_the_engine():
    from tokenizers.processors import TemplateProcessing

    plain = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    written = make_tokenizer(plain)
    assert chat_pieces(written).default_system == "<|im_start|>"
    adding = make_tokenizer(plain)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", adding.bos_token_id)]
    )
    assert chat_pieces(adding).default_system == ""

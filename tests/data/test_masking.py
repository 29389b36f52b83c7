"""A mask keeps its place through templates, white space and tokenizers, and decides which tokens are scored."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from families import FAMILIES, KINDS, tokenizer_of

from qpref.data.load import fingerprint
from qpref.data.masking import NO_MASKS, Masking, token_mask
from qpref.data.mismatch import only_partner, with_mismatched, without_partner
from qpref.data.token_cache import TokenCache
from qpref.data.tokenize import PairTokenizer
from qpref.data.truncate import fit_length
from qpref.policy.reference import row_keys
from qpref.recipe.data_section import DataSection
from qpref.records import Finding, Message, PreferencePair, Source, TokenizedExample

THINKING = Masking("exclude", (re.compile("<think>.*?</think>", re.DOTALL),))
STRIPS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
SPLITS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>"
    "\n\n{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes thinking anew, as Qwen3's template does."""
OPENS = CHAT_TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")


def make_pair(chosen: Message | str, rejected: str = "no", prompt: str = "2+2?") -> PreferencePair:
    return PreferencePair(
        prompt=(Message(role="user", content=prompt),),
        chosen=(chosen if isinstance(chosen, Message) else Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
        source=Source(path="made", line=7),
    )


def masked(content: str, *spans: str) -> Message:
    """A response in which these parts of the content are masked."""
    found = [(content.index(span), content.index(span) + len(span)) for span in spans]
    return Message(role="assistant", content=content, masked=tuple(found))


def tokenize(pair: PreferencePair, tokenizer=None, masking: Masking = NO_MASKS, template: str = "chat"):
    *_, found = PairTokenizer.of(tokenizer or make_tokenizer(), template, (), masking).tokenize([pair])
    return found


def runs(example: TokenizedExample, tokenizer=None) -> list[str]:
    """Texts of the chosen response's runs of tokens; those that count are in brackets."""
    shown = PairTokenizer.of(tokenizer or make_tokenizer(), "none", ()).render_first(example)
    return re.findall("⟦.*?⟧|[^⟦⟧]+", re.search("\nchosen: (.*)\nrejected: ", shown, re.DOTALL)[1], re.DOTALL)


# Where a mask is


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("border", ["", " ", "\n\n"])
def test_each_familys_template_and_tokenizer_keeps_a_mask_in_place(family, kind, border):
    tokenizer = tokenizer_of(FAMILIES[family], kind)
    first, second = f"Grüße aus 你好 🙂 the weather{border}", "the answer is Köln 🙂"
    opens = "<think>\n" if family == "deepseek_r1" else ""  # its prompt for generation ends so
    example = tokenize(make_pair(masked(opens + first + second, opens + first), f"{opens}no"), tokenizer)
    assert isinstance(example, TokenizedExample), example
    branch, mask = example.branches[0], example.masks[0]
    start = mask.index(1)
    assert mask == bytes(start) + b"\1" * (len(branch) - start)
    before, after = (tokenizer.decode(list(part)) for part in (branch[:start], branch[start:]))
    whole = tokenizer.decode(list(branch))
    assert first.strip().startswith(before.strip()[: len(first.strip())])
    assert second in after
    one_more = tokenizer.decode(list(branch[: start + 1]))
    assert len(one_more.rstrip("\ufffd")) > whole.index(second) or one_more.endswith("\ufffd")


def test_a_token_that_reaches_over_the_border_counts():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["p. So"])
    example = tokenize(make_pair(masked("Step. So 4", "Step.")), tokenizer)
    assert runs(example, tokenizer) == ["Ste", "⟦p. So 4<|im_end|>⟧"]


def test_a_character_of_several_tokens_is_masked_whole():
    example = tokenize(make_pair(masked("a🙂b", "🙂")))
    assert example.masks[0] == bytes([1, 0, 0, 0, 0, 1, 1])


def test_parts_in_the_middle_and_at_the_end_are_masked_and_the_end_of_turn_counts():
    example = tokenize(make_pair(masked("one two three", "two ", "ee")))
    assert runs(example) == ["⟦one ⟧", "two ", "⟦thr⟧", "ee", "⟦<|im_end|>⟧"]
    assert example.masks[1] == b"\1" * 3


@pytest.mark.parametrize(
    ("template", "content", "spans", "expected"),
    [
        (STRIPS, " \n think: 4", [" \n think:"], ["think:", "⟦ 4<|im_end|>⟧"]),
        (STRIPS, "\n\nyes, 4  ", ["4  "], ["⟦yes, ⟧", "4", "⟦<|im_end|>⟧"]),
        (CHAT_TEMPLATE, " \n think: 4", [" \n think:"], [" \n think:", "⟦ 4<|im_end|>⟧"]),
        (CHAT_TEMPLATE, "  4 ", ["  "], ["  ", "⟦4 <|im_end|>⟧"]),
        (SPLITS, "<think>hm</think>4", ["<think>hm</think>"], ["<think>\nhm\n</think>", "⟦\n\n4<|im_end|>⟧"]),
        (SPLITS, "<think>\nhm\n</think>\n\n4", ["hm\n"], ["⟦<think>\n⟧", "hm\n", "⟦</think>\n\n4<|im_end|>⟧"]),
        (OPENS, "<think>hm</think>4", ["<think>hm</think>"], ["hm</think>", "⟦4<|im_end|>⟧"]),
        (None, " hm 4", [" hm"], [" hm", "⟦ 4<|im_end|>⟧"]),
    ],
)
def test_a_template_that_changes_white_space_shifts_no_mask(template, content, spans, expected):
    tokenizer = make_tokenizer(template)
    example = tokenize(make_pair(masked(content, *spans), "<think>n</think>o"), tokenizer)
    assert runs(example, tokenizer) == expected


def test_content_is_found_behind_reasoning_that_says_the_same():
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "('<think>' + message['reasoning_content'] + '</think>' if message['reasoning_content'] else '') "
        "+ message['content']",
    )
    message = replace(masked("so 4", "so"), extra={"reasoning_content": "so 4"})
    tokenizer = make_tokenizer(template)
    assert runs(tokenize(make_pair(message), tokenizer), tokenizer) == ["⟦<think>so 4</think>⟧", "so", "⟦ 4<|im_end|>⟧"]


def test_content_that_the_template_rewrites_refuses_the_row():
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | tojson")
    finding = tokenize(make_pair(masked('it is "four"', "it")), make_tokenizer(template))
    assert (finding.code, finding.source.line) == ("bad_mask", 7)
    assert "so they have no position" in finding.message


# Patterns


def test_patterns_mask_what_they_match_in_every_response():
    pair = make_pair("<think>a\nb</think>4", "no thought")
    example = tokenize(pair, masking=THINKING)
    assert runs(example) == ["<think>a\nb</think>", "⟦4<|im_end|>⟧"]
    assert example.masks[1] == b"\1" * len(example.branches[1])
    assert tokenize(pair).masks == ()


def test_a_pattern_starts_in_the_tag_that_a_prompt_opens():
    tokenizer = make_tokenizer(OPENS)
    example = tokenize(make_pair("<think>a</think>4", "<think>b</think>5"), tokenizer, THINKING)
    assert runs(example, tokenizer) == ["a</think>", "⟦4<|im_end|>⟧"]


def test_a_pattern_masks_rendered_reasoning_and_tool_calls():
    tokenizer = tokenizer_of(FAMILIES["qwen"], "byte level")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    message = Message(role="assistant", content="the answer", extra={"tool_calls": [call]})
    masking = Masking("exclude", (re.compile("<tool_call>.*</tool_call>", re.DOTALL),))
    example = tokenize(make_pair(message, "the question"), tokenizer, masking)
    hidden = [text for text in runs(example, tokenizer) if text[0] != "⟦"]
    assert len(hidden) == 1
    assert hidden[0].startswith("<tool_call>")
    assert '"name": "weather"' in hidden[0]
    assert hidden[0].endswith("</tool_call>")


def test_a_response_of_masked_tokens_alone_is_refused_by_line():
    finding = tokenize(make_pair("<think>4</think>"), masking=THINKING)
    assert isinstance(finding, Finding)
    assert (finding.code, finding.severity, str(finding.source)) == ("masked", "error", "made:7")
    assert finding.message == "chosen: every token is masked, so that nothing of it counts"


def test_ignored_masks_leave_no_trace():
    pair = make_pair(masked("one two", "one"))
    plain = tokenize(make_pair("one two"))
    ignored = tokenize(pair, masking=Masking("ignore"))
    assert ignored == plain
    assert fingerprint([ignored]) == fingerprint([plain])
    assert fingerprint([tokenize(pair)]) != fingerprint([plain])
    assert fingerprint([tokenize(pair)]) != fingerprint([tokenize(pair, masking=Masking("loss"))])


# Offsets


def test_white_space_that_a_tokenizer_leaves_out_of_its_offsets_belongs_to_the_next_token():
    trimmed, whole = [(0, 2), (4, 4), (5, 7)], [(0, 2), (2, 4), (4, 7)]
    for characters, expected in (([0, 0, 0, 1, 0, 0, 0], [0, 1, 0]), ([0, 0, 0, 0, 1, 1, 1], [0, 0, 1])):
        for offsets in (trimmed, whole):
            assert token_mask("ab   cd", bytes(characters), offsets) == bytes(expected)


def test_white_space_decides_only_where_a_token_has_nothing_else():
    counts = bytes([0, 0, 1, 1, 1])
    assert token_mask("a.\n\nb", counts, [(0, 4), (4, 5)]) == bytes([0, 1])
    assert token_mask("a.\n\nb", counts, [(0, 2), (2, 4), (4, 5)]) == bytes([0, 1, 1])


def test_tokens_without_characters_take_the_next_ones_mask():
    assert token_mask("abc", bytes([0, 0, 1]), [(0, 0), (0, 2), (2, 2), (2, 3)]) == bytes([0, 0, 1, 1])


# What else is made of examples


def test_the_cache_returns_masks_and_knows_other_masks_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    variants = [
        (make_pair(masked("one two", "one")), Masking()),
        (make_pair(masked("one two", "two")), Masking()),
        (make_pair("one two"), Masking()),
        (make_pair("one two"), Masking("exclude", (re.compile("o"),))),
        (make_pair(masked("one two", "two")), Masking("loss")),
        (make_pair(masked("one two", "two")), Masking("ignore")),
    ]
    for _ in range(2):
        for pair, masking in variants:
            tokenizer = PairTokenizer.of(make_tokenizer(), "chat", (), masking)
            (cached,) = TokenCache.open(tokenizer).tokenize([pair])
            (direct,) = tokenizer.tokenize([pair])
            assert cached == direct


def test_the_second_reading_is_the_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    pair = make_pair(masked("one two", "one"))
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", (), Masking())
    (first,) = TokenCache.open(tokenizer).tokenize([pair])
    monkeypatch.setattr(PairTokenizer, "tokenize", lambda *_: iter(()))
    (second,) = TokenCache.open(tokenizer).tokenize([pair])
    assert second == first
    assert 0 in second.masks[0]


def test_truncation_cuts_masks_and_drops_a_row_of_which_only_masked_tokens_are_left():
    data = DataSection(train="x", max_length=40, max_prompt_length=39, on_overflow="truncate")
    example = tokenize(make_pair(masked("one two three", "one"), "number five"))
    room = len(example.prompt)
    cut = fit_length(example, data.model_copy(update={"max_length": room + 5}))
    assert cut.masks == (bytes([0, 0, 0, 1, 1]), b"\1" * 5)
    finding = fit_length(example, data.model_copy(update={"max_length": room + 3}))
    assert (finding.code, finding.severity) == ("masked", "warning")


def test_partners_bring_their_masks():
    one = tokenize(make_pair(masked("one two", "one"), prompt="first"))
    other = tokenize(make_pair("plain", prompt="second"))
    singles = [without_partner(replace(each, label=True)) for each in (one, other)]
    first, second = with_mismatched(singles, 0, 1000)
    assert first.masks == (one.masks[0], b"\1" * len(other.branches[0]))
    assert only_partner(second).masks == one.masks[:1]
    assert without_partner(second).masks == (b"\1" * len(other.branches[0]),)


def test_the_reference_of_masked_tokens_is_another_row_than_that_of_all():
    pair = make_pair(masked("one two", "one"))
    excluded, scored, plain = tokenize(pair), tokenize(pair, masking=Masking("loss")), tokenize(make_pair("one two"))
    assert row_keys(excluded)[0] != row_keys(plain)[0]
    assert row_keys(excluded)[1] == row_keys(plain)[1]
    assert row_keys(scored) == row_keys(plain)

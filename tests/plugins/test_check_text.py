"""Each kind of answer that is no text is found, and what people do write is left alone."""

import random
import tracemalloc

import pytest

from qpref_plugins import check_text
from qpref_plugins.check_text import WHAT, CheckText, TextChecks
from tests.plugins.check_cases import findings, lines, pair, reported, severities, single, words

PROMPT = "Tell me why bread rises, in a few words."
GOOD = "Bread rises because yeast turns sugar into gas, which the dough's gluten holds."
LOOP = "1. The dough rises.\n" + "".join(f"{number}. The dough rises again in the oven.\n" for number in range(2, 40))


def kinds_of(answer, prompt):
    """The codes of a response to a prompt of one turn."""
    return check_text.kinds_of(answer, prompt, prompt)


@pytest.mark.parametrize(
    "answer",
    ["<nooutput>", "<noinput>", "<no-output>", "<No Output>", "<unk>", "</s>", "<|endoftext|>", "None", "none.", "N/A",
     "n/a ", "nan", "null", "TBD", "...", "[image]", "[Image]", "[deleted]", "[removed]", "[Link to Spotify playlist]",
     "[Scope Template]", "[Your name here]", "{{answer}}", "{response}", "No response.", "**None**"],
    ids=repr,
)  # fmt: skip
def test_placeholders_are_found(answer):
    assert kinds_of(answer, PROMPT) == ("placeholder",)


@pytest.mark.parametrize(
    "answer",
    ["Yes", "No", "42", "1, 2, 3", "A", "[A]", "(B)", "[1, 2, 3]", "[positive]", "<br>", "<div>", "<html>", "true",
     "True.", "Nothing.", "I have none of them.", "Nantes", "x = 3", "Null island", "{'a': 1}", "None of the above",
     "Notional", "[] + [1]", "[image] shows a loaf of bread, [table] its price.",
     "[text that was written by a baker, who was asked for a picture]"],
    ids=repr,
)  # fmt: skip
def test_short_answers_are_answers(answer):
    assert kinds_of(answer, PROMPT) == ()


@pytest.mark.parametrize("answer", ["?", "| | |\n| | |", "\U0001f44d", "\u200b\u200b", "{}", "-----", "$$"], ids=repr)
def test_an_answer_without_a_word_is_found(answer):
    assert kinds_of(answer, PROMPT) == ("no_word",)


@pytest.mark.parametrize(
    "answer", ["\u9762\u5305", "\u0445\u043b\u0435\u0431", "\u0661\u0662", "7", "\u00bd"], ids=repr
)
def test_words_are_those_of_every_script(answer):
    assert kinds_of(answer, PROMPT) == ()


@pytest.mark.parametrize(
    "text", ["Zoë\u2019s crème brûlée costs £5 \u2013 “très bon”…", "Größe", "naïve café", "☕ 😀"]
)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_that_was_read_as_another_encoding_is_found(text, encoding):
    wrong = "".join(
        bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode()
    )  # as browsers read the holes of Windows-1252
    found = kinds_of(f"{GOOD} {wrong}", PROMPT)
    assert "garbled" in found or (encoding == "latin-1" and "unseen" in found)
    assert kinds_of(f"{GOOD} {text}", PROMPT) == ()


def test_replacement_characters_are_found():
    assert kinds_of("The caf\ufffd is open.", PROMPT) == ("garbled",)


@pytest.mark.parametrize(
    "answer",
    [
        "« LIBERTÉ\u00a0»",
        "« LIBERTÉ»",
        "MAÇÃ”",
        "São Paulo, Ângela e João",
        "Â e Ã são letras",
        "5 €",
        "à\u00a0la",
        "ÀÉÎ",
    ],
    ids=repr,
)
def test_accents_are_not_broken(answer):
    assert kinds_of(answer, PROMPT) == ()


@pytest.mark.parametrize(
    "sign",
    ["\x00", "\x08", "\x1b", "\x7f", "\u0085", "\u200b", "\u2060", "\ufeff", "\u202e", "\u2066"],
    ids=repr,
)
def test_signs_that_nobody_sees_are_found(sign):
    assert kinds_of(f"{GOOD}{sign} It is warm.", PROMPT) == ("unseen",)


def test_text_hidden_in_tags_is_found():
    hidden = "".join(chr(0xE0000 + ord(letter)) for letter in "ignore all")
    assert kinds_of(GOOD + hidden, PROMPT) == ("unseen",)


@pytest.mark.parametrize(
    "answer",
    ["a\tb\nc\r\nd", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
     "\U0001f468\u200d\U0001f469\u200d\U0001f467 family", "a\u00a0b",
     "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England"],
    ids=repr,
)  # fmt: skip
def test_signs_that_scripts_and_emoji_need_are_left_alone(answer):
    assert kinds_of(answer, PROMPT) == ()


@pytest.mark.parametrize(
    "answer", ["Bread<br>rises", "<p>Bread</p>", "Salt &amp; water", "a&nbsp;b", "it&#39;s", '<a href="x">here</a>']
)
def test_leftovers_of_html_are_found(answer):
    assert kinds_of(answer, PROMPT) == ("markup",)


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("<p>Bread</p>", "Write HTML for a paragraph"),
        ("<p>Bread</p>", "What does <p> do?"),
        ("Use `<br>` here", PROMPT),
        ("```\n<p>Bread</p>\n```", PROMPT),
        ("a < b && c > d", PROMPT),
        ("if (a<b) return List<int>;", PROMPT),
        ("Johnson & Johnson; AT&T", PROMPT),
        ("<think>Yeast.</think> Gas.", PROMPT),
    ],
)
def test_code_and_comparisons_are_no_leftovers(answer, prompt):
    assert kinds_of(answer, prompt) == ()


@pytest.mark.parametrize(
    ("answer", "found"),
    [(PROMPT, ("echo",)), (f" {PROMPT}\nGas.", ("echo",)), ("in a few words.", ()), (f"You ask: {PROMPT}", ())],
)
def test_an_answer_that_starts_with_the_whole_prompt_is_found(answer, found):
    assert kinds_of(answer, PROMPT) == found


def test_a_short_prompt_may_start_its_answer():
    assert kinds_of("Bread? Bread is food.", "Bread?") == ()


@pytest.mark.parametrize(
    "answer", [LOOP, LOOP[:-9], LOOP.rstrip("\n") + "\n40. ", "no " * 100, "Paris, Lyon, Nice, " * 12], ids=repr
)
def test_an_answer_in_circles_is_found(answer):
    assert kinds_of(answer, PROMPT) == ("repetition",)


@pytest.mark.parametrize(
    "answer",
    [
        "ha ha ha ha",
        words(random.Random(1), 500),
        "\n".join(f"- {words(random.Random(number), 6)} in the oven at home." for number in range(12)),
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
    ],
)
def test_lists_and_long_texts_are_no_circles(answer):
    assert kinds_of(answer, PROMPT) == ()


@pytest.mark.parametrize(
    "answer",
    ["As an AI language model, I have no bread.", "Sorry. As a language model I don't eat.",
     "I'm sorry, but I can\u2019t help with that.",
     "I cannot assist with that request.", "I am unable to provide this."],
)  # fmt: skip
def test_refusals_are_found(answer):
    assert kinds_of(answer, PROMPT) == ("refusal",)


@pytest.mark.parametrize(
    "answer",
    ["I can't wait to see you!", "I'm sorry to hear that. How can I help?", "I cannot stress enough how good it is.",
     "An AI language model is a program.", "She said: I cannot help it."],
)  # fmt: skip
def test_being_sorry_is_no_refusal(answer):
    assert kinds_of(answer, PROMPT) == ()


def test_a_rejected_refusal_is_as_it_should_be():
    refusal = "I'm sorry, but I can't help with that."
    rows = [pair(PROMPT, GOOD, refusal, 1), pair(PROMPT, refusal, GOOD, 2)]
    rows += [single(PROMPT, refusal, False, 3), single(PROMPT, refusal, True, 4)]
    assert lines(check_text, "refusal", rows) == [2, 4]


def test_a_finding_names_the_sides():
    rows = [pair(PROMPT, "None", GOOD, 1), pair(PROMPT, GOOD, "None", 2), pair(PROMPT, "[image]", "N/A", 3)]
    rows += [single(PROMPT, "?", True, 4), pair(PROMPT, GOOD, GOOD, 5)]
    assert reported(check_text, rows) == [
        ("placeholder", 1, "chosen is a placeholder, not a response"),
        ("placeholder", 2, "rejected is a placeholder, not a response"),
        ("placeholder", 3, "chosen and rejected: each is a placeholder, not a response"),
        ("no_word", 4, "completion has no letter or digit"),
    ]


def test_each_kind_is_reported_once_a_row():
    row = pair(PROMPT, LOOP + "\x00", LOOP + "<br>")
    assert [code for code, _, _ in reported(check_text, [row])] == ["unseen", "markup", "repetition"]


CASES = {
    "placeholder": "None", "no_word": "?", "garbled": "caf\ufffd", "unseen": "a\x00b", "markup": "a<br>b",
    "echo": PROMPT, "repetition": LOOP, "refusal": "As an AI language model, no.",
}  # fmt: skip


def test_every_kind_has_a_case():
    assert list(CASES) == list(WHAT)
    assert set(TextChecks.model_fields) - set(WHAT) == {"lost_backslash", "turn_markers"}


@pytest.mark.parametrize("code", CASES)
@pytest.mark.parametrize(("severity", "shown"), [("error", ["error"]), ("warn", ["warning"]), ("off", [])])
def test_every_kind_has_the_severity_that_the_recipe_gives(code, severity, shown):
    assert severities(check_text, [pair(PROMPT, CASES[code], GOOD)], **{code: severity}) == shown


def test_findings_share_their_messages():
    one, other = findings(check_text, [pair(PROMPT, "None", GOOD, 1), pair(PROMPT, "N/A", GOOD, 2)])
    assert one.message is other.message


def test_nothing_is_kept():
    check = CheckText(TextChecks())
    kept = []
    tracemalloc.start()
    for line in range(4_000):
        check.look(pair(PROMPT, GOOD + str(line), LOOP, line), "train")
        if line in (1_999, 3_999):
            kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert kept[1] - kept[0] < 2_000

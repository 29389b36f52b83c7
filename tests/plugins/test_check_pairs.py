"""Each check of the pairs fires at its threshold, with the severity that the recipe gives it."""

import random
import time
import unicodedata
from difflib import SequenceMatcher

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qpref.records import Message, PreferencePair, Source
from qpref_plugins.check_pairs import MAX_COMPARED_CHARACTERS, PairChecks, check_pair, same_text, same_words
from qpref_plugins.check_pairs.similarity import SHORTEST_SEED, more_alike_than

LONG = "Bread rises because yeast turns sugar into gas, which the dough's gluten holds."
OTHER = "I would not know; perhaps somebody in a bakery could be asked about all that."
ALIKE = "chosen and rejected are more than 90% alike"


def pair(chosen, rejected, line=1):
    return PreferencePair(
        prompt=(Message(role="user", content="Why does bread rise?"),),
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
        source=Source(path="pairs.jsonl", line=line),
    )


def found(chosen, rejected, **options):
    """(code, severity, message) of each finding of one pair."""
    findings = check_pair(PairChecks(**options), pair(chosen, rejected))
    return [(finding.code, finding.severity, finding.message) for finding in findings]


def test_a_good_pair_has_no_finding():
    assert found(LONG, OTHER) == []


@pytest.mark.parametrize(
    "rejected", [LONG, f" {LONG}\n", LONG.replace(" ", "\n\n"), LONG.replace(" ", "\u00a0")], ids=repr
)
def test_the_same_text_twice_is_refused_whatever_the_space(rejected):
    assert found(LONG, rejected) == [("identical", "error", "chosen and rejected are the same text")]


def test_the_same_letters_in_other_code_points_are_the_same_text():
    text = LONG + " Crème brûlée, 한국."
    assert [code for code, _, _ in found(text, unicodedata.normalize("NFD", text))] == ["identical"]


@pytest.mark.parametrize(
    "rejected",
    [LONG.upper(), f"**{LONG}**", LONG.replace(",", " -"), f'"{LONG}"', LONG.replace("'", "\u2019")],
    ids=repr,
)
def test_case_and_punctuation_alone_are_warned_of(rejected):
    assert found(LONG, rejected) == [
        ("nearly_identical", "warning", "chosen and rejected differ only in case or punctuation")
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [("It is 15.", "It is 1.5."), ("e-mail", "email"), ("Yes.", "Yes. No."), ("?", "!"),
     ("\u0915\u093f", "\u0915\u093e"),
     ("resume", "résumé")],
    ids=repr,
)  # fmt: skip
def test_other_words_are_another_answer(one, other):
    assert not same_words(one, other)
    assert not same_words(other, one)
    assert not same_text(one, other)


@pytest.mark.parametrize("rejected", [LONG.lower(), LONG.replace(" ", ""), LONG + "."], ids=repr)
def test_another_text_is_not_identical(rejected):
    assert "identical" not in {code for code, _, _ in found(LONG, rejected)}


def test_identical_texts_are_reported_once():
    assert [code for code, _, _ in found("Yes.", "Yes.")] == ["identical"]


@pytest.mark.parametrize(
    ("num_chosen", "num_rejected", "messages"),
    [
        (50, 20, []),
        (49, 20, ["chosen has 49 characters, under 50"]),
        (50, 19, ["rejected has 19 characters, under 20"]),
        (1, 2, ["chosen has 1 characters, under 50; rejected has 2 characters, under 20"]),
    ],
)
def test_a_response_under_its_length_is_warned_of(num_chosen, num_rejected, messages):
    assert found("c" * num_chosen, "r" * num_rejected) == [("too_short", "warning", message) for message in messages]


def test_space_around_a_response_does_not_lengthen_it():
    assert [code for code, _, _ in found(" " * 50 + "c", OTHER)] == ["too_short"]


def test_the_lengths_are_the_recipes():
    assert found("c", "rr", min_chosen_characters=1, min_rejected_characters=3) == [
        ("too_short", "warning", "rejected has 2 characters, under 3")
    ]


@pytest.mark.parametrize(("num_other", "codes"), [(4, ["too_similar"]), (5, []), (50, [])])
def test_more_than_nine_tenths_alike_is_warned_of(num_other, codes):
    # SequenceMatcher's ratio is 2 * 50 common characters / (50 + 50), less what the last `num_other` differ in.
    chosen, rejected = "a" * 50, "a" * (50 - num_other) + "b" * num_other
    assert [code for code, _, _ in found(chosen, rejected)] == codes


def test_similarity_says_its_limit():
    assert found("a" * 50, "a" * 49 + "b") == [("too_similar", "warning", ALIKE)]


def test_long_texts_that_differ_in_a_letter_are_too_similar():
    # Every letter stands often here: SequenceMatcher's own heuristic would take them all for noise.
    text = LONG * 20
    assert [code for code, _, _ in found(text, "Oh. " + text)] == ["too_similar"]


def test_only_the_first_characters_are_compared():
    start = "".join(chr(0x4E00 + place) for place in range(MAX_COMPARED_CHARACTERS))
    assert [code for code, _, _ in found(start + "c" * 10_000, start + "d" * 10_000)] == ["too_similar"]


@pytest.mark.parametrize(
    ("check", "chosen", "rejected"),
    [
        ("identical", LONG, LONG),
        ("too_short", "Gas.", OTHER),
        ("nearly_identical", LONG, LONG.upper() + "!"),
        ("too_similar", LONG, LONG + " No."),
    ],
)
@pytest.mark.parametrize(("severity", "shown"), [("error", ["error"]), ("warn", ["warning"]), ("off", [])])
def test_every_check_has_the_severity_that_the_recipe_gives(check, chosen, rejected, severity, shown):
    assert [found_severity for _, found_severity, _ in found(chosen, rejected, **{check: severity})] == shown


def test_findings_come_in_the_pairs_order_with_their_places():
    pairs = [pair("Gas.", OTHER, 3), pair(LONG, OTHER, 5), pair(LONG, LONG, 8)]
    places = [(finding.code, str(finding.source)) for one in pairs for finding in check_pair(PairChecks(), one)]
    assert places == [("too_short", "pairs.jsonl:3"), ("identical", "pairs.jsonl:8")]


@pytest.mark.parametrize(
    "options",
    [
        {"identical": "warning"},
        {"too_short": True},
        {"min_chosen_characters": -1},
        {"min_rejected_characters": "20"},
        {"max_similarity": 1.1},
        {"identicl": "off"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        PairChecks(**options)


@st.composite
def edited_texts(draw):
    """Two texts, the second made from pieces of the first: near duplicates, repeats and moved parts."""
    letters = draw(st.sampled_from(["ab", "abcdefgh", "abcdefghijklmnopqrstuvwxyz \n", "é한aß"]))
    first = draw(st.text(letters, max_size=200)) * draw(st.integers(1, 3))
    second = first
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted((draw(st.integers(0, len(second))), draw(st.integers(0, len(second)))))
        kind = draw(st.sampled_from(["insert", "delete", "repeat", "move"]))
        piece = second[start:end][:40]
        if kind == "insert":
            second = second[:start] + draw(st.text(letters, max_size=10)) + second[start:]
        elif kind == "delete":
            second = second[:start] + second[start + len(piece) :]
        elif kind == "repeat":
            second = second[:start] + piece + second[start:]
        else:
            second = piece + second[:start] + second[start + len(piece) :]
    return first, second


@settings(max_examples=1500, deadline=None)
@given(edited_texts(), st.one_of(st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0]), st.floats(0, 1)))
@example(("", ""), 0.9)
@example(("", ""), 1.0)
@example(("a", ""), 0.0)
def test_the_verdict_is_always_difflibs(texts, limit):
    ratio = SequenceMatcher(None, *texts, autojunk=False).ratio()
    assert more_alike_than(limit, *texts) == (ratio > limit)
    assert not more_alike_than(ratio, *texts)
    assert more_alike_than(ratio - 1e-9, *texts) or not ratio


@pytest.mark.parametrize("num_edits", [1, 5, 20])
def test_the_verdict_is_difflibs_on_answers_of_common_length(num_edits):
    rng = random.Random(num_edits)
    for _ in range(5):
        text = [rng.choice("etaoin shrdlu") for _ in range(500)]
        other = list(text)
        for _ in range(num_edits):
            place = rng.randrange(len(other))
            other[place : place + rng.randint(0, 2 * SHORTEST_SEED)] = rng.choices("etaoin", k=rng.randint(0, 4))
        first, second = "".join(text), "".join(other)
        ratio = SequenceMatcher(None, first, second, autojunk=False).ratio()
        for limit in (0.7, 0.8, 0.9, 0.95, ratio):
            assert more_alike_than(limit, first, second) == (ratio > limit)


def test_near_copies_cost_far_less_than_with_difflib():
    rng = random.Random(0)
    text = "".join(rng.choices("etaoin shrdlucmfwyp", k=2000))
    other = text[:600] + "another" + text[620:1500] + text[1510:]
    start = time.process_time()
    assert SequenceMatcher(None, text, other, autojunk=False).ratio() > 0.9
    middle = time.process_time()
    for _ in range(10):
        assert more_alike_than(0.9, text, other)
    assert (time.process_time() - middle) / 10 < (middle - start) / 5

"""Each check of the pairs fires at its threshold, with the severity that the recipe gives it."""

import random
import time
import unicodedata
from dataclasses import replace
from difflib import SequenceMatcher

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qpref.hooks.reading import reading_length, reads_shorter
from qpref.records import Message
from qpref_plugins import check_pairs
from qpref_plugins.check_pairs import MAX_COMPARED_CHARACTERS, PairChecks
from qpref_plugins.check_pairs.same import same_text, same_words
from qpref_plugins.check_pairs.similarity import SHORTEST_SEED, more_alike_than
from tests.plugins import check_cases
from tests.plugins.check_cases import findings

LONG = "Bread rises because yeast turns sugar into gas, which the dough's gluten holds."
OTHER = "I would not know; perhaps somebody in a bakery could be asked about all that."
ALIKE = "chosen and rejected are more than 90% alike"


def pair(chosen, rejected, line=1):
    return check_cases.pair("Why does bread rise?", chosen, rejected, line)


def found(chosen, rejected, **options):
    """(code, severity, message) of each finding of one pair."""
    return [(one.code, one.severity, one.message) for one in findings(check_pairs, [pair(chosen, rejected)], **options)]


def test_a_good_pair_has_no_finding():
    assert found(LONG, OTHER) == []


def calling(number, **arguments):
    """A response that calls a tool, with an id as a server makes it up."""
    call = {"id": f"call_{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return (Message(role="assistant", content="", extra={"tool_calls": [call]}),)


def test_calls_that_differ_in_their_ids_alone_are_the_same_text():
    for city, codes in (("Oslo", ["identical"]), ("Turku", [])):
        calls = replace(pair("", ""), chosen=calling(1, city="Oslo"), rejected=calling(2, city=city))
        assert [one.code for one in findings(check_pairs, [calls], too_short="off", too_similar="off")] == codes


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
     ("resume", "résumé"), ("It is 5 + 3.", "It is 5 - 3."), ("a < b", "a > b"), ("It is -5.", "It is 5."),
     ("It costs $5.", "It costs 5."), ("In C++.", "In C."), ("Good \U0001f44d", "Good \U0001f44e"),
     ("Good \U0001f44d", "Good"),
     ("√2", "2"), ("x² = 4", "x2 = 4"), ("✓ rye", "✗ rye"), ("5 €", "5 £"), ("面包好吃", "面包不好吃"), ("กา", "ก้า")],
    ids=repr,
)  # fmt: skip
def test_other_words_are_another_answer(one, other):
    assert not same_words(one, other)
    assert not same_words(other, one)
    assert not same_text(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("# Rye\n- wheat", "Rye\n* Wheat!"), ("> rye", "Rye"), ("`rye` ~ wheat", "Rye, wheat"), ("2024-05", "2024-05."),
     ("面包，会膨胀。", "面包会膨胀"), ("「パン」です", "パンです。"), ("ＡＢＣ、１２", "abc, 12"),
     ("ขนมปัง ขึ้นฟู!", "ขนมปังขึ้นฟู"),
     ("Rye - wheat", "rye: wheat"), ("שלום, לחם", "שלום לחם!"), ("خبز، شاي", "خبز شاي"), ("5+3", "5 + 3")],
    ids=repr,
)  # fmt: skip
def test_punctuation_is_none_of_the_words_in_any_script(one, other):
    assert same_words(one, other)
    assert same_words(other, one)


CODE = "def rise(dough):\n    if dough:\n        return 2 * dough\n    return 0\n"


@pytest.mark.parametrize(
    ("rejected", "codes"),
    [
        (CODE.replace("    return 0", "        return 0"), ["nearly_identical"]),
        (CODE.replace("    ", "\t"), ["identical"]),
        ("\n".join(f"  {line}" for line in CODE.split("\n")), ["identical"]),
        (CODE.replace("\n", "\n\n"), ["identical"]),
        (CODE.replace("\n", "\r\n"), ["identical"]),
    ],
    ids=repr,
)
def test_indentation_is_content(rejected, codes):
    assert [code for code, _, _ in found(CODE, rejected) if code != "too_short"] == codes


def test_similarity_says_how_much_of_long_texts_it_compares():
    long = "".join(chr(0x4E00 + place) for place in range(MAX_COMPARED_CHARACTERS))
    assert [message for _, _, message in found(long + "a", long + "b" * 50)] == [
        f"{ALIKE}, in their first {MAX_COMPARED_CHARACTERS} characters"
    ]


@pytest.mark.parametrize("rejected", [LONG.lower(), LONG.replace(" ", ""), LONG + "."], ids=repr)
def test_another_text_is_not_identical(rejected):
    assert "identical" not in {code for code, _, _ in found(LONG, rejected)}


def test_identical_texts_are_reported_once():
    assert [code for code, _, _ in found("Yes.", "Yes.")] == ["identical"]


@pytest.mark.parametrize(
    ("num_chosen", "num_rejected", "sides"),
    [
        (50, 20, []),
        (49, 20, ["chosen under 50 characters in 1"]),
        (50, 19, ["rejected under 20 characters in 1"]),
        (1, 2, ["chosen under 50 characters in 1, rejected under 20 characters in 1"]),
    ],
)
def test_a_response_under_its_length_is_warned_of(num_chosen, num_rejected, sides):
    assert found("c" * num_chosen, "r" * num_rejected) == [
        (
            "too_short",
            "warning",
            f"1 of 1 training row (100.0%) have a short response ({side}), at line 1",
        )
        for side in sides
    ]


def test_short_responses_are_one_warning_for_each_source_and_split():
    pairs = [pair("Gas." if line % 4 else LONG, OTHER if line % 3 else "No.", line) for line in range(1, 25)]
    elsewhere = [check_cases.pair("Why?", "Gas.", OTHER, 8, "other.jsonl")] * 3  # a ranking: one row
    told = [(str(one.source), one.message) for one in findings(check_pairs, pairs + elsewhere, pairs[:1])]
    short = "have a short response (chosen under 50 characters in"
    assert told == [
        ("pairs.jsonl", f"1 of 1 held-out row (100.0%) {short} 1), at line 1"),
        (
            "pairs.jsonl",
            f"20 of 24 training rows (83.3%) {short} 18, rejected under 20 characters in 8), first at "
            "lines 1, 2, 3, 5, 6",
        ),
        ("other.jsonl", f"1 of 1 training row (100.0%) {short} 1), at line 8"),
    ]


def test_short_responses_that_refuse_their_rows_are_named_by_line():
    rows = [pair("Gas.", OTHER, 3), pair(LONG, OTHER, 4), pair(LONG, "\u4e0d\u7528\u3002", 5)]
    found = findings(check_pairs, rows, too_short="error")
    assert [(one.source.line, one.severity, one.message) for one in found] == [
        (3, "error", "chosen is as long as 4 characters of Latin script, under 50"),
        (5, "error", "rejected is as long as 8 characters of Latin script, under 20"),
    ]


def test_space_around_a_response_does_not_lengthen_it():
    assert [code for code, _, _ in found(" " * 50 + "c", OTHER)] == ["too_short"]


def test_the_lengths_are_the_recipes():
    ((_, _, message),) = found("c", "rr", min_chosen_characters=1, min_rejected_characters=3)
    assert "rejected under 3 characters in 1" in message


@pytest.mark.parametrize(
    "answer",
    [
        "先用干净的棉布把面包包好，再放进有盖的木盒里。",
        "請先把麵包放進紙袋，再收到陰涼乾燥的櫃子裡。",
        "パンは布で包んで、ふた付きの箱に入れておくと乾きません。",
        "빵을 마른 천으로 싸서 뚜껑이 있는 상자에 넣어 두세요.",
        "ห่อขนมปังด้วยผ้าฝ้ายแล้วเก็บไว้ในกล่องที่ปิดสนิท",
        "ຫໍ່ເຂົ້າຈີ່ດ້ວຍຜ້າຝ້າຍແລ້ວເກັບໄວ້ໃນກ່ອງທີ່ປິດສະໜິດ",
        "עטפו את הלחם במגבת נקייה ושמרו אותו בקופסה.",
        "لف الخبز بقطعة قماش نظيفة واحفظه في صندوق مغلق.",
        "Заверните хлеб в полотно и храните его в закрытой коробке.",
        "रोटी को साफ कपड़े में लपेटकर एक बंद डिब्बे में रखें।",
    ],
)
def test_a_sentence_is_long_enough_in_every_script(answer):
    assert not reads_shorter(answer, 50)
    assert not reads_shorter(unicodedata.normalize("NFD", answer), 50)


@pytest.mark.parametrize(
    "answer",
    [
        "包好。",
        "はい。",
        "네.",
        "ใช่",
        "כן",
        "Да.",
        "हाँ",
        "Oui.",
        "e\u0301" * 19,
        "\u200b" * 100,
        "\U0001f44d\U0001f3fd" * 3,
    ],
    ids=repr,
)
def test_a_word_is_short_in_every_script(answer):
    assert reads_shorter(answer, 20)


@pytest.mark.parametrize(
    ("text", "length"),
    [("abc", 3), (" a c\n", 3), ("面包", 7), ("かな", 3.2), ("한글", 4.5), ("หก", 2.4), ("שלום", 5.2), ("é\u0301", 1),
     ("面, a", 6.5), ("\U0001f44d\U0001f3fd", 1), ("\u0660", 1), ("\U00020000", 3.5)],
    ids=repr,
)  # fmt: skip
def test_characters_count_by_what_they_say(text, length):
    assert reading_length(text) == pytest.approx(length)
    assert reading_length(unicodedata.normalize("NFD", text)) == pytest.approx(length)


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
    pairs = [pair(LONG, LONG + " No.", 3), pair(LONG, OTHER, 5), pair(LONG, LONG, 8)]
    places = [(one.code, str(one.source)) for one in findings(check_pairs, pairs)]
    assert places == [("too_similar", "pairs.jsonl:3"), ("identical", "pairs.jsonl:8")]


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

"""Each check of the pairs fires at its threshold, with the severity that the recipe gives it."""

import pytest
from pydantic import ValidationError

from qpref.records import Message, PreferencePair, Source
from qpref_check_pairs import MAX_COMPARED_CHARACTERS, PairChecks, check_pair

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
        (1, 2, ["chosen has 1 characters, under 50", "rejected has 2 characters, under 20"]),
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
    assert [code for code, _, _ in found(text, "#" + text)] == ["too_similar"]


def test_only_the_first_characters_are_compared():
    start = "".join(chr(0x4E00 + place) for place in range(MAX_COMPARED_CHARACTERS))
    assert [code for code, _, _ in found(start + "c" * 10_000, start + "d" * 10_000)] == ["too_similar"]


@pytest.mark.parametrize(
    ("check", "chosen", "rejected"),
    [("identical", LONG, LONG), ("too_short", "Gas.", OTHER), ("too_similar", LONG, LONG + "!")],
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

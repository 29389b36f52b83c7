"""Length bias and class balance: the figures are those of the textbook, the thresholds those of the recipe."""

import math
import random
import statistics
import tracemalloc

import pytest
from pydantic import ValidationError

from qpref.records import Source
from qpref_plugins import check_bias
from qpref_plugins.check_bias import FEWEST_EXAMPLES, BiasChecks, CheckBias, wilson_interval
from tests.plugins.check_cases import findings, pair, severities, single


def of_lengths(*lengths):
    return [pair("p", "c" * chosen, "r" * rejected, line) for line, (chosen, rejected) in enumerate(lengths, 1)]


def labelled(num_good, num_bad, good=100, bad=100):
    return [
        single("p", "x" * ((good if line < num_good else bad) + line % 2 * 20), line < num_good, line + 1)
        for line in range(num_good + num_bad)
    ]


def codes(rows, heldout=(), **options):
    return [one.code for one in findings(check_bias, rows, heldout, **options)]


def test_the_message_has_the_figures_of_a_plain_count():
    rng = random.Random(1)
    lengths = [(rng.randint(160, 300), rng.randint(40, 170)) for _ in range(20)]
    (found,) = findings(check_bias, of_lengths(*lengths))
    differences = [chosen - rejected for chosen, rejected in lengths]
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = wilson_interval(longer, longer + shorter)
    ties = f", without {20 - longer - shorter} ties" if longer + shorter < 20 else ""
    effect = statistics.mean(differences) / statistics.stdev(differences)
    mean, of = statistics.mean(differences), statistics.mean(rejected for _, rejected in lengths)
    assert found.source == Source(path="pairs.jsonl", line=0)
    assert found.message.startswith(
        f"chosen is the longer one in {longer} of {longer + shorter} pairs{ties} ({longer / (longer + shorter):.1%}, "
        f"95 % interval {low:.1%} to {high:.1%}), and {mean:.0f} characters ({mean / of:.0%}) longer on average "
        f"(Cohen's d_z {effect:+.2f}), for training. "
    )
    assert "simpo" in found.message


def test_the_interval_holds_the_shares_that_are_two_deviations_away_at_most():
    # Wilson's bounds p solve |share - p| = z sqrt(p (1 - p) / n).
    for hits, count in [(0, 10), (3, 10), (61, 100), (100, 100)]:
        for bound in wilson_interval(hits, count):
            assert abs(hits / count - bound) == pytest.approx(
                1.959964 * math.sqrt(max(0.0, bound * (1 - bound)) / count), abs=1e-9
            )


def spread(num_longer, num_shorter, num_ties=0):
    """Pairs whose differences are as often long as short, so that the effect is small."""
    return of_lengths(*[(101, 100)] * num_longer, *[(100, 101)] * num_shorter, *[(100, 100)] * num_ties)


@pytest.mark.parametrize(("num_longer", "found"), [(60, []), (61, ["length_bias"]), (39, ["length_bias"]), (40, [])])
def test_the_share_may_be_as_high_as_the_recipe_says(num_longer, found):
    assert codes(spread(num_longer, 100 - num_longer), max_effect_size=10.0) == found


def test_ties_do_not_count():
    assert codes(spread(70, 30, 900)) == ["length_bias"]


def test_few_pairs_may_be_chance():
    assert codes(spread(13, 7), max_effect_size=10.0) == []  # 65 %, but the interval reaches from 43 % to 82 %


@pytest.mark.parametrize(("num_pairs", "found"), [(FEWEST_EXAMPLES - 1, []), (FEWEST_EXAMPLES, ["length_bias"])])
def test_a_handful_of_pairs_is_not_judged(num_pairs, found):
    assert codes(of_lengths(*[(200, 100)] * num_pairs)) == found


def test_a_large_effect_is_reported_where_shares_are_even():
    # Half of the pairs differ by +1000 give or take, the others by -1: the share is even, the mean difference isn't.
    rows = of_lengths(*[(1100, 100), (100, 101)] * 50)
    assert codes(rows) == ["length_bias"]
    assert codes(rows, max_effect_size=1.0) == []


def test_shorter_answers_are_a_bias_as_well():
    (found,) = findings(check_bias, of_lengths(*[(100, 200), (100, 180)] * 20))
    assert found.message.startswith(
        "chosen is the shorter one in 40 of 40 pairs (100.0%, 95 % interval 91.2% to 100.0%)"
    )
    assert "90 characters (47%) shorter on average" in found.message


def test_equal_lengths_are_no_bias():
    assert codes(of_lengths(*[(100, 100)] * 50)) == []


def test_each_source_and_split_is_judged_by_itself():
    biased, even = of_lengths(*[(200, 100)] * 50), spread(50, 50)
    elsewhere = [pair("p", "c" * 300, "r", line, "other.jsonl") for line in range(30)]
    found = findings(check_bias, even + elsewhere, biased)
    assert [(one.source.path, "held-out" in one.message) for one in found] == [
        ("pairs.jsonl", True),
        ("other.jsonl", False),
    ]


@pytest.mark.parametrize(
    ("num_good", "num_bad", "found"), [(80, 20, []), (81, 19, ["class_balance"]), (19, 81, ["class_balance"])]
)
def test_the_rarer_label_may_be_as_rare_as_the_recipe_says(num_good, num_bad, found):
    rows = labelled(num_good, num_bad)
    assert codes(rows) == found
    if found:
        message = findings(check_bias, rows)[0].message
        assert message.startswith(f"{num_good} desirable and {num_bad} undesirable completions, for training.")


@pytest.mark.parametrize(
    ("num_good", "num_bad", "class_", "missing"),
    [(30, 0, "desirable", "undesirable"), (0, 30, "undesirable", "desirable")],
)
def test_one_class_alone_is_said(num_good, num_bad, class_, missing):
    (found,) = findings(check_bias, labelled(num_good, num_bad))
    assert found.code == "one_class"
    assert found.message.startswith(f"all 30 completions are {class_}, for training: ")
    assert found.message.endswith(f"Add {missing} ones")


@pytest.mark.parametrize(("good", "found"), [(104, []), (106, ["length_bias"])])
def test_classes_of_other_lengths_are_a_bias(good, found):
    # Both classes spread by 10 about their means: d = 0.5 is a difference of 5 characters, nearly.
    rows = labelled(50, 50, good, 100)
    lengths = {label: [len(row.completion[0].content) for row in rows if row.label is label] for label in (True, False)}
    pooled = math.sqrt((statistics.variance(lengths[True]) + statistics.variance(lengths[False])) / 2)
    effect = (good - 100) / pooled
    assert (effect > 0.5) == bool(found)
    assert codes(rows) == found
    if found:
        message = findings(check_bias, rows)[0].message
        assert f"6 characters (5%) longer on average (Cohen's d {effect:+.2f})" in message


CASES = {
    "length_bias": of_lengths(*[(200, 100)] * 50),
    "one_class": labelled(30, 0),
    "class_balance": labelled(95, 5),
}


@pytest.mark.parametrize("code", CASES)
@pytest.mark.parametrize(("severity", "shown"), [("warn", ["warning"]), ("off", [])])
def test_every_check_has_the_severity_that_the_recipe_gives(code, severity, shown):
    assert severities(check_bias, CASES[code], **{code: severity}) == shown


@pytest.mark.parametrize("code", CASES)
def test_a_whole_source_cannot_be_refused(code):
    with pytest.raises(ValidationError, match=code):
        BiasChecks(**{code: "error"})


def test_sums_alone_are_kept():
    check = CheckBias(BiasChecks())
    tracemalloc.start()
    for line in range(20_000):
        check.look(pair("p", "cc", "r", line), "train")
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 20_000

"""Statistics of a data set are those of the rows that training uses: refused rows are in none of them."""

from collections import Counter
from dataclasses import replace

import pytest

from qpref.data.check import check_data
from qpref.hooks import Options, Reader, Validator
from qpref.hooks.manager import CHECK, Loaded, Offer, PluginHost
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding, Row, Source

LONG = "Bread rises because yeast turns sugar into gas, which the dough's gluten holds, in round {}."
SHORT = "It rises by itself, round {}."
SAME = "Nobody knows why bread rises at all."


@pytest.fixture(scope="module")
def ours():
    host = PluginHost()
    names = ("bias", "duplicates", "leakage", "pairs", "text")
    loaded = [host.load(CHECK, name) for name in names]
    return [Choice(one, one.record.options()) for one in loaded]


def write(tmp_path, rows, split="train"):
    """A source of a split, whose reader yields the rows."""
    path = tmp_path / f"{split}.x"
    path.touch()
    made = [Row(values=row, source=Source(path=str(path), line=line)) for line, row in enumerate(rows, 1)]
    plugin = Loaded(Reader(name="x", summary="", read=lambda _: iter(made)), Offer("read", "x", "a", "1", "a"))
    return SourceChoice(location=str(path), split=split, reader=plugin)


@pytest.fixture
def findings(tmp_path, ours):
    """The report of all built-in checks, in the worst order: those of whole sources first."""

    def of(train, heldout=(), more=()):
        sources = [write(tmp_path, heldout, "heldout")] if heldout else []
        return check_data([*sources, write(tmp_path, train)], [*more, *ours]).report

    return of


def different(number):
    return {"prompt": f"Why does loaf {number} rise?", "chosen": LONG.format(number), "rejected": SHORT.format(number)}


def identical(number):
    return {"prompt": f"Why does loaf {number} rise?", "chosen": SAME, "rejected": SAME}


def messages(report, code):
    return [one.message for one in report.findings if one.code == code]


def test_refused_pairs_are_no_ties_of_the_length_bias(findings):
    report = findings([identical(line) if line % 2 else different(line) for line in range(60)])
    assert report.refused == 30
    (message,) = messages(report, "length_bias")
    assert message.startswith("chosen is the longer one in 30 of 30 pairs (100.0%")


def test_refused_pairs_make_no_source_large_enough_to_judge(findings):
    report = findings([identical(line) if line < 30 else different(line) for line in range(40)])
    assert messages(report, "length_bias") == []


def test_refused_rows_have_no_duplicates_and_no_prompts(findings):
    report = findings([identical(0)] * 60 + [different(line) for line in range(50)])
    assert {one.code for one in report.findings} == {"identical", "length_bias"}


def test_refused_rows_leak_from_neither_side(findings):
    report = findings([different(1), identical(2)], [identical(1), different(2)])
    assert messages(report, "leaked_prompt") == []
    assert messages(findings([different(1)], [different(1)]), "leaked_pair")


def test_lengths_are_those_of_kept_rows(findings):
    report = findings([identical(1), different(2), different(3)])
    assert sum(report.lengths["chosen characters"].values()) == 2


def test_a_ranking_is_refused_as_a_whole(findings):
    ranked = {"prompt": "Why?", "responses": [LONG, SAME, SAME], "ranks": [1, 2, 3]}
    report = findings([ranked] * 30)
    assert report.refused == 30
    assert {one.code for one in report.findings} == {"identical"}


def as_errors(checks, **severities):
    return [
        replace(check, options=check.plugin.record.options(**severities.get(check.plugin.record.name, {})))
        for check in checks
    ]


def test_rows_that_are_refused_at_the_end_are_no_ties_either(ours, tmp_path):
    # 30 rows repeat the first, whose responses are of one length; duplicates are found after all rows.
    tie = {"prompt": "Why?", "chosen": LONG.format("one"), "rejected": LONG.format("two")}
    path = write(tmp_path, [tie] * 31 + [different(line) for line in range(25)])
    checks = as_errors(ours, duplicates={"duplicate": "error"})
    report = check_data([path], checks).report
    assert report.refused == 30
    (message,) = messages(report, "length_bias")
    assert message.startswith("chosen is the longer one in 25 of 25 pairs, without 1 ties")
    assert messages(report, "few_prompts") == messages(report, "leaked_prompt") == []


def test_what_refuses_rows_at_the_end_is_reported_once(ours, tmp_path):
    checks = as_errors(ours, duplicates={"duplicate": "error"}, leakage={"leaked_prompt": "error"})
    sources = [write(tmp_path, [different(1)] * 3, "heldout"), write(tmp_path, [different(1) | {"chosen": SAME}] * 2)]
    report = check_data(sources, checks).report
    codes = Counter(one.code for one in report.findings if one.severity == "error")
    assert codes == {"duplicate": 3, "leaked_prompt": 2}


class Watch:
    """A third party's check that sees every row by default, and refuses nothing."""

    def __init__(self, seen):
        self.seen = seen

    def look(self, example, split):
        self.seen.append(example.source.line)
        return ()

    def finish(self):
        return [Finding(code="seen", severity="warning", message=str(self.seen), source=Source(path="x", line=0))]


@pytest.mark.parametrize(("skips", "seen"), [(False, [1, 2, 3]), (True, [1, 3])])
def test_a_check_sees_refused_rows_unless_it_skips_them(findings, skips, seen):
    record = Validator(name="watch", summary="", options=Options, start=lambda _: Watch([]), skips_refused=skips)
    watch = Choice(Loaded(record, Offer("check", "watch", "acme", "2.0", "acme")), Options())
    report = findings([different(1), identical(2), different(3)], more=[watch])
    assert messages(report, "seen") == [str(seen)]

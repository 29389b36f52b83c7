"""Every row of a file is accounted for, bad ones stop the run beyond a share, and a broken plugin is named."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from checked_rows import check

from qpref.data.check import check_data
from qpref.data.data_report import NUM_SHOWN, DataReport
from qpref.data.split import HeldOutShare
from qpref.errors import DataError, PluginError, RecipeError
from qpref.hooks import Options, Reader, Validator
from qpref.hooks.manager import Loaded, Offer
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding, Row, Source

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}


def source(line):
    return Source(path="pairs.x", line=line)


def finding(line, severity="error", code="bad", message="is bad"):
    return Finding(code=code, severity=severity, message=message, source=source(line))


def reader(read):
    return Loaded(Reader(name="x", summary="", read=read), Offer("read", "x", "acme", "2.0", "acme_x"))


def rows(*values):
    """A reader of one row for each dict; anything else is yielded as it is."""
    return reader(
        lambda path: iter(
            [
                Row(values=value, source=source(line)) if isinstance(value, dict) else value
                for line, value in enumerate(values, start=1)
            ]
        )
    )


def validator(look=lambda example, split: (), finish=lambda: ()):
    """A check of two functions."""
    record = Validator(
        name="v", summary="", options=Options, start=lambda options: SimpleNamespace(look=look, finish=finish)
    )
    return Choice(Loaded(record, Offer("check", "v", "acme", "2.0", "acme_v")), Options())


def judge(*findings):
    """A validator that finds the same whatever it sees."""
    return validator(finish=lambda: findings)


def read_rows(path, reader, validators, pairs_only=True):
    """The training rows of one file."""
    choice = SourceChoice(location=str(path), split="train", reader=reader)
    return check_data([choice], validators, pairs_only=pairs_only).train


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pairs.x"
    path.touch()
    return path


@pytest.fixture
def log(caplog, monkeypatch):
    """The messages of qpref's logger, whatever the command line has done to it."""
    monkeypatch.setattr(logging.getLogger("qpref"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qpref")
    return caplog


# What read_pairs makes of a file.


def test_counts_add_up(path):
    found = [finding(2), finding(2), finding(3, "warning"), finding(5)]
    read = rows(GOOD, GOOD, GOOD, {"prompt": "Why?"}, GOOD, finding(6), GOOD, GOOD)
    report = read_rows(path, read, [judge(*found)]).report
    report.drop(source(7))
    report.drop(source(6))  # refused already
    # 8 rows; refused: 2 and 5 by the validator, 4 for its format, 6 by the reader; 1 too long.
    assert (report.read, report.refused, report.dropped, report.kept) == (8, 4, 1, 3)


def test_the_pairs_of_a_report_are_those_that_no_error_refuses(path):
    checked = read_rows(path, rows(GOOD, GOOD, GOOD), [judge(finding(1), finding(2, "warning"))])
    assert [pair.source.line for pair in checked.rows()] == [2, 3]


def test_rows_are_read_again_and_not_kept(path):
    times = []

    def read(path):
        times.append(1)
        yield from rows(GOOD, {}, GOOD).record.read(path)

    checked = read_rows(path, reader(read), [judge(), judge()])
    assert (checked.report.read, len(times)) == (3, 1)  # one pass for all validators
    assert [pair.source.line for pair in checked.rows()] == [pair.source.line for pair in checked.rows()] == [1, 3]
    assert len(times) == 3
    assert checked.report.read == 3


def test_without_a_validator_rows_are_counted_all_the_same(path):
    assert read_rows(path, rows(GOOD, {}, GOOD), []).report.read == 3


def test_a_file_that_changes_between_two_passes_is_refused(path):
    checked = read_rows(path, rows(GOOD, GOOD), [])
    path.write_text("more")
    with pytest.raises(DataError, match="has changed while it was read"):
        list(checked.rows())


def test_a_file_that_changes_during_a_pass_is_refused(path):
    def read(path):
        yield from rows(GOOD, GOOD).record.read(path)
        path.write_text("more")

    with pytest.raises(DataError, match="has changed while it was read"):
        read_rows(path, reader(read), [])


def test_a_reader_that_fails_under_a_validator_is_blamed_and_not_the_validator(path):
    def read(path):
        yield from rows(GOOD).record.read(path)
        raise KeyError("gone")

    with pytest.raises(PluginError, match=re.escape("acme 2.0 [read-x] failed on")):
        read_rows(path, reader(read), [validator()])


def test_a_validator_sees_the_pairs_and_not_the_bad_rows(path):
    seen = []
    spy = validator(look=lambda example, split: seen.append(example.source.line) or ())
    read_rows(path, rows(GOOD, {}, finding(3), GOOD), [spy])
    assert seen == [1, 4]


def test_every_validator_sees_all_pairs_whatever_another_finds(path):
    seen = []
    spy = validator(look=lambda example, split: seen.append(example.source.line) or ())
    read_rows(path, rows(GOOD, GOOD), [judge(finding(1)), spy])
    assert seen == [1, 2]


def test_findings_are_the_readers_then_each_validators(path):
    report = read_rows(path, rows(GOOD, finding(2)), [judge(finding(1)), judge(finding(1, code="worse"))]).report
    assert [(one.source.line, one.code) for one in report.findings] == [(2, "bad"), (1, "bad"), (1, "worse")]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/none.x: no such file")):
        read_rows(tmp_path / "none.x", rows(), [])


def test_a_folder_is_no_data_file(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: not a regular file")):
        read_rows(tmp_path, rows(), [])


def boom(*arguments):
    raise KeyError("x")


def interrupt(*arguments):
    raise KeyboardInterrupt


def end_of_generator(*arguments):
    yield from ()
    raise GeneratorExit


def half_read(path):
    yield Row(values=GOOD, source=source(1))
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (boom, "KeyError: 'x'"),
        (half_read, "ValueError: no luck"),
        (interrupt, "KeyboardInterrupt"),
        (end_of_generator, "GeneratorExit"),
    ],
    ids=["at once", "after a row", "an interrupt", "a generator's exit"],
)
def test_a_reader_that_raises_is_named(path, read, reason):
    with pytest.raises(PluginError) as caught:
        read_rows(path, reader(read), [])
    assert str(caught.value) == f"acme 2.0 [read-x] failed on {path}: {reason}"


def test_a_reader_that_yields_no_row_is_named(path):
    with pytest.raises(PluginError, match=re.escape("acme 2.0 [read-x] yields str, neither Row nor Finding")):
        read_rows(path, rows("prompt,chosen"), [])


def test_a_disk_that_fails_is_no_plugins_fault(path):
    def unreadable(path):
        raise OSError(5, "Input/output error")

    with pytest.raises(DataError) as caught:
        read_rows(path, reader(unreadable), [])
    assert str(caught.value) == f"{path}: cannot be read: Input/output error"


def half_check(example, split):
    yield finding(1)
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (boom, "KeyError: 'x'"),
        (half_check, "ValueError: no luck"),
        (interrupt, "KeyboardInterrupt"),
        (end_of_generator, "GeneratorExit"),
    ],
    ids=["at once", "after a finding", "an interrupt", "a generator's exit"],
)
def test_a_validator_that_raises_is_named(path, check, reason):
    with pytest.raises(PluginError) as caught:
        read_rows(path, rows(GOOD), [validator(check)])
    assert str(caught.value) == f"acme 2.0 [check-v] failed: {reason}"


def switch_off(*arguments):
    torch.set_grad_enabled(False)
    return ()


@pytest.mark.parametrize("culprit", ["read-x", "check-v"])
def test_a_reader_or_validator_that_changes_torchs_settings_is_named(path, culprit):
    read = reader(switch_off) if culprit == "read-x" else rows(GOOD)
    with pytest.raises(PluginError, match=r"acme 2\.0 \[" + culprit + r"\].* changed torch's grad mode, which would"):
        read_rows(path, read, [validator(switch_off)] if culprit == "check-v" else [])
    assert torch.is_grad_enabled()


# What a report stops at.


def report_of(read, *findings, dropped=0):
    """A report of so many rows, the last of which are dropped for their length."""
    report = DataReport(("pairs.x",), read=read)
    report.add(findings)
    for line in range(read - dropped + 1, read + 1):
        report.drop(source(line))
    return report


def stop(report, allowed_share=0.0):
    with pytest.raises(DataError) as caught:
        report.stop_on_errors(allowed_share)
    return str(caught.value)


GENERAL_HINT = (
    "hint: fix or drop the rows (`qpref check` lists all of them), or allow a share of them with [data] skip_bad"
)


def test_without_a_finding_the_run_goes_on():
    report_of(3).stop_on_errors(0.0)


def test_warnings_never_stop_a_run():
    report_of(2, finding(1, "warning"), finding(2, "warning")).stop_on_errors(0.0)


def test_one_bad_row_stops_the_run():
    assert stop(report_of(10, finding(4))) == f"pairs.x:4: is bad; 1 of 10 rows are refused\n{GENERAL_HINT}"


def test_the_only_row_needs_no_share():
    assert stop(report_of(1, finding(1))) == f"pairs.x:1: is bad\n{GENERAL_HINT}"


def test_every_bad_row_has_its_line():
    assert stop(report_of(9, finding(4), finding(7, message="is worse"))) == (
        f"pairs.x:4: is bad\npairs.x:7: is worse; 2 of 9 rows are refused\n{GENERAL_HINT}"
    )


def test_a_row_with_two_errors_counts_once():
    assert "; 1 of 9 rows are refused" in stop(report_of(9, finding(4), finding(4)))


def test_of_many_bad_rows_the_first_are_shown_and_the_rest_counted():
    lines = stop(report_of(100, *(finding(line) for line in range(1, NUM_SHOWN + 6)))).splitlines()
    assert lines == [
        *(f"pairs.x:{line}: is bad" for line in range(1, NUM_SHOWN + 1)),
        f"and 5 more; {NUM_SHOWN + 5} of 100 rows are refused",
        GENERAL_HINT,
    ]


@pytest.mark.parametrize("num_bad", [1, 2])
def test_the_run_goes_on_with_bad_rows_up_to_the_share(num_bad):
    report_of(10, *(finding(line) for line in range(1, num_bad + 1))).stop_on_errors(0.2)


def test_the_run_stops_with_bad_rows_beyond_the_share():
    assert "3 of 10 rows are refused" in stop(report_of(10, finding(1), finding(2), finding(3)), 0.2)


def test_rows_that_are_left_out_are_reported(log):
    report_of(10, finding(4), finding(7)).stop_on_errors(0.2)
    assert log.messages == ["pairs.x: 2 of 10 rows are left out (first: pairs.x:4: is bad)"]


def test_skip_bad_never_leaves_an_empty_set():
    assert "2 of 2 rows are refused" in stop(report_of(2, finding(1), finding(2)), 0.99)


def test_dropped_rows_count_when_nothing_is_left():
    assert stop(report_of(2, finding(1), dropped=1), 0.99).startswith("pairs.x:1: is bad")


@pytest.mark.parametrize(("read", "dropped"), [(0, 0), (3, 3)])
def test_no_pair_at_all_stops_the_run(read, dropped):
    assert stop(report_of(read, dropped=dropped)) == f"pairs.x: no pair is left of {read} rows"


@pytest.mark.parametrize(
    ("codes", "hint"),
    [
        (["identical"], 'drop the lines, or set [checks] identical = "warn"'),
        (["too_long"], 'raise [data] max_length, or set [data] on_overflow = "drop" or "truncate"'),
        (["empty"], GENERAL_HINT.removeprefix("hint: ")),
        (["identical", "too_long"], GENERAL_HINT.removeprefix("hint: ")),
    ],
)
def test_the_hint_fits_what_is_wrong(codes, hint):
    report = report_of(9, *(finding(line, code=code) for line, code in enumerate(codes, start=1)))
    assert stop(report).endswith(f"rows are refused\nhint: {hint}")


def test_a_warning_does_not_change_the_hint():
    report = report_of(9, finding(1, "warning", code="too_short"), finding(2, code="identical"))
    assert stop(report).endswith('hint: drop the lines, or set [checks] identical = "warn"')


def test_each_kind_of_warning_is_one_line_with_its_first_place(log):
    report_of(
        9,
        finding(5, "warning", "too_short", "is short"),
        finding(2, "error"),
        finding(6, "warning", "too_similar", "is alike"),
        finding(7, "warning", "too_short", "is shorter"),
        finding(0, "warning", "length_bias", "longer answers are chosen"),
    ).log_warnings()
    assert log.messages == [
        "pairs.x: longer answers are chosen",
        "too_short: 2 rows (first: pairs.x:5: is short)",
        "too_similar: 1 row (first: pairs.x:6: is alike)",
    ]


def test_a_column_that_no_format_has_is_a_mistake_in_the_recipe(path):
    source = SourceChoice(location=str(path), split="train", reader=rows(GOOD), columns={"chozen": "good"})
    with pytest.raises(RecipeError, match="no row format has a column 'chozen'; did you mean 'chosen'"):
        check_data([source], [])


def test_columns_of_other_names_are_read(path):
    renamed = {"question": "Why?", "good": "Because.", "bad": "No idea."}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    source = SourceChoice(location=str(path), split="train", reader=rows(renamed, GOOD), columns=names)
    checked = check_data([source], [])
    assert [one.prompt[0].content for one in checked.train.rows()] == ["Why?"]
    assert checked.report.refused == 1


# Both splits.


def two_sources(tmp_path):
    """Training rows 1 and 2 of one file, held-out row 1 of another."""
    choices = []
    for split, read in (("train", rows(GOOD, GOOD)), ("heldout", rows(GOOD))):
        (tmp_path / split).touch()
        choices.append(SourceChoice(location=str(tmp_path / split), split=split, reader=read))
    return choices


def test_checks_see_all_held_out_rows_before_the_training_rows(tmp_path):
    seen = []
    spy = validator(look=lambda example, split: seen.append((split, example.source.line)) or ())
    checked = check_data(two_sources(tmp_path), [spy])
    assert seen == [("heldout", 1), ("train", 1), ("train", 2)]
    assert checked.report.read == 3


def test_without_a_held_out_source_there_is_none(path):
    assert check_data([SourceChoice(location=str(path), split="train", reader=rows(GOOD))], []).heldout is None


def test_a_share_is_counted_once_and_each_row_is_on_one_side(path):
    many = rows(*({**GOOD, "prompt": f"Why {number}?"} for number in range(40)), {})
    source = SourceChoice(location=str(path), split="train", reader=many)
    checked = check_data([source], [], share=HeldOutShare(0.5, seed=0))
    lines = [[one.source.line for one in split.rows()] for split in (checked.train, checked.heldout)]
    assert checked.report.read == 41
    assert all(lines)
    assert sorted(lines[0] + lines[1]) == list(range(1, 41))


def test_weights_are_those_of_the_rows_files(path):
    source = SourceChoice(location=str(path), split="train", reader=rows(GOOD), weight=2.5)
    assert check_data([source], []).train.weights == {"pairs.x": 2.5}


def test_rows_that_repeat_an_earlier_one_are_counted_refused_ones_too(path):
    listed = {**GOOD, "prompt": [{"role": "user", "content": "Why?"}]}
    bad = {"prompt": "Why?", "chosen": ""}
    read = rows(GOOD, bad, {**GOOD, "more": 1}, dict(GOOD), dict(bad), listed, dict(listed), finding(8))
    assert read_rows(path, read, []).report.repeated == 3


@pytest.mark.parametrize("share", [None, HeldOutShare(0.5, seed=0)])
def test_repeats_are_counted_over_both_splits_and_once(tmp_path, share):
    sources = two_sources(tmp_path) if share is None else two_sources(tmp_path)[:1]
    assert check_data(sources, [], share=share).report.repeated == len(sources)


def test_values_that_python_hashes_alike_are_no_repeats(path):
    read = rows(*({**GOOD, "margin": margin} for margin in (-1, -2, 1, True, 1.0)))
    assert read_rows(path, read, []).report.repeated == 0


def test_a_share_that_leaves_nothing_is_reported(path):
    source = SourceChoice(location=str(path), split="train", reader=rows(GOOD))
    checked = check_data([source], [], share=HeldOutShare(1e-9, seed=0))
    assert checked.heldout.is_empty
    assert checked.heldout.why_empty == f"{path}: heldout_share 1e-09 leaves no row for heldout; change it"


@pytest.mark.parametrize("share", [None, HeldOutShare(0.5, seed=0)])
def test_a_readers_note_on_the_whole_source_is_no_row_and_is_reported_once(tmp_path, share):
    note = finding(0, severity="warning", code="separator")
    path = tmp_path / "pairs.x"
    path.touch()
    sources = [SourceChoice(location=str(path), split="train", reader=rows(note, GOOD, GOOD | {"prompt": "How?"}))]
    checked = check_data(sources, [], share=share)
    kept = [row for split in (checked.train, checked.heldout) if split is not None for row in split.rows()]
    assert (checked.report.read, checked.report.kept, checked.report.refused, len(kept)) == (2, 2, 0, 2)
    assert checked.report.findings == [note]


def test_a_refused_row_is_told_its_reason_alone():
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x", "detail": "high"}}]}
    refused = {"prompt": [image], "chosen": "a", "rejected": "b"}
    report = check([refused, {"prompt": "Why?", "chosen": "a", "rejected": "b"}]).report
    assert [finding.code for finding in report.findings] == ["not_a_message"]

"""Curves land where their numbers are, spikes and gaps are seen whatever the number of rows."""

from __future__ import annotations

import json
import math
import random
import re
import time

import pytest

from qpref.report import charts
from qpref.report.charts import Curve, draw
from qpref.report.read import Column
from qpref.report.text import log_ticks, number_text, tick_texts, ticks, time_text

RIGHT = charts.WIDTH - charts.RIGHT
BOTTOM = charts.HEIGHT - charts.BOTTOM


def column(values, first_step=1) -> Column:
    made = Column()
    for step, value in enumerate(values, first_step):
        made.add(step, value)
    return made


def chart(values, last_step=None, **curve):
    made = column(values)
    settings = {"label": "training", "colour": 0, "is_heldout": False} | curve
    return draw("loss", [Curve(column=made, **settings)], last_step or len(values))


def places(path: str) -> list[list[tuple[float, float]]]:
    """The corners of each stroke of a path."""
    return [
        [tuple(map(float, corner.split())) for corner in stroke.rstrip("Z").split("L")]
        for stroke in path.split("M")[1:]
    ]


def test_points_stand_where_the_axes_say():
    drawn = chart([1.0, 3.0, 2.0])
    ((first, second, third),) = places(drawn.linear.traces[0].line)
    labels = {float(text): y for y, text in drawn.linear.y_ticks}
    steps = {float(text): x for x, text in drawn.x_ticks}
    assert first == pytest.approx((steps[1], labels[1.0]), abs=0.11)
    assert second == pytest.approx((steps[2], labels[3.0]), abs=0.11)
    assert third == pytest.approx((steps[3], labels[2.0]), abs=0.11)
    assert (steps[0], steps[3]) == (charts.LEFT, RIGHT)
    assert labels[3.0] < labels[1.0]


def test_all_runs_share_one_step_axis():
    assert places(chart([1.0, 2.0], last_step=4).linear.traces[0].line)[0][-1][0] == (charts.LEFT + RIGHT) / 2


def test_a_row_without_a_value_breaks_the_line_and_is_marked():
    drawn = chart([1.0, 2.0, math.nan, 3.0, math.nan])
    strokes = places(drawn.linear.traces[0].line)
    assert [len(stroke) for stroke in strokes] == [2, 2]  # the second is one point, drawn as a dot
    assert strokes[1][0] == strokes[1][1]
    assert len(drawn.gaps) == 2
    assert drawn.notes == ["2 rows have no value (not finite, or undefined for the batch); marked on the axis."]
    assert [row[1] for row in drawn.rows] == ["1", "2", "no value", "3", "no value"]


def test_a_curve_without_any_value_is_an_empty_chart():
    drawn = chart([math.nan, math.nan])
    assert drawn.linear.traces[0].line == ""
    assert "no value" in drawn.summary


def test_a_share_has_the_ends_of_its_interval_as_band():
    drawn = chart([0.25, 0.75], share_of=8, is_heldout=True)
    (band,) = places(drawn.linear.traces[0].band)
    labels = {float(text): y for y, text in drawn.linear.y_ticks}
    per_unit = (labels[0.8] - labels[0.2]) / 0.6
    heights = [0.8 + (y - labels[0.8]) / per_unit for _, y in band]
    # Wilson's interval of 2 in 8 is 0.0715 to 0.5907, and that of 6 in 8 its mirror image.
    assert heights == pytest.approx([0.5907, 0.9285, 0.4093, 0.0715], abs=0.002)
    value, low, high = map(float, re.findall(r"[\d.]+", drawn.linear.traces[0].points[0][2]))
    assert (value, low, high) == (0.25, pytest.approx(0.0715, abs=5e-5), pytest.approx(0.5907, abs=5e-5))
    assert drawn.notes == ["The band of held-out rows is the 95 % interval (Wilson) of a share of 8 examples."]


def test_on_a_log_axis_equal_ratios_are_equal_distances():
    drawn = chart([1.0, 10.0, 1000.0])
    ((first, second, third),) = places(drawn.log.traces[0].line)
    assert (second[1] - third[1]) / (first[1] - second[1]) == pytest.approx(2, abs=0.01)
    ticks_at = {float(text.replace(",", "")): y for y, text in drawn.log.y_ticks}
    assert ticks_at[10.0] == pytest.approx(second[1], abs=0.11)
    assert [point[1:] for point in drawn.log.traces[0].points] == [point[1:] for point in drawn.linear.traces[0].points]


@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 1.0], [0.69, 0.68], [math.nan]])
def test_values_that_are_not_above_0_or_all_close_have_no_log_axis(values):
    assert chart(values).log is None


def test_training_rows_are_smoothed_by_an_average_that_starts_at_the_first():
    values = [1.0, *[0.0] * 29]
    (smooth,) = places(chart(values).linear.traces[0].smooth)
    raw = places(chart(values).linear.traces[0].line)[0]
    height = raw[1][1] - raw[0][1]  # of 1
    averages = [(raw[1][1] - y) / height for _, y in smooth]
    expected = [0.1 * 0.9**step / (1 - 0.9 ** (step + 1)) for step in range(30)]
    assert averages == pytest.approx(expected, abs=0.002)


def test_few_rows_and_held_out_rows_are_not_smoothed():
    assert chart([1.0] * 19).linear.traces[0].smooth == ""
    assert chart([1.0] * 40, is_heldout=True).linear.traces[0].smooth == ""
    assert chart([1.0] * 40, is_noisy=False).linear.traces[0].smooth == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -5e-7, 1e150, 3e-320])
def test_a_constant_has_an_axis_of_its_own(value):
    drawn = chart([value] * 3)
    assert all(charts.TOP <= y <= BOTTOM for _, y in places(drawn.linear.traces[0].line)[0])
    assert drawn.linear.y_ticks


def test_a_single_row_is_a_dot():
    drawn = chart([0.5])
    assert len(drawn.linear.traces[0].dots) == 1
    assert len(drawn.x_ticks) == 2


@pytest.fixture(scope="module")
def many():
    """200,000 noisy rows with one spike, and three rows without a value that share a pixel column with others."""
    random.seed(0)
    values = [random.gauss(0, 0.1) for _ in range(200_000)]
    values[123_456] = 9.0
    for place in (50_000, 50_001, 199_999):
        values[place] = math.nan
    started = time.monotonic()
    drawn = chart(values)
    return values, drawn, time.monotonic() - started


def test_hundreds_of_thousands_of_rows_become_a_few_hundred_points(many):
    _, drawn, seconds = many
    assert sum(map(len, places(drawn.linear.traces[0].line))) <= charts.NUM_COLUMNS
    assert len(drawn.hover) < 40_000
    assert seconds < 3


def test_a_spike_of_one_row_is_drawn_at_its_height(many):
    values, drawn, _ = many
    (band,) = places(drawn.linear.traces[0].band)
    x, y = min(band, key=lambda corner: corner[1])
    assert x == pytest.approx(charts.LEFT + (RIGHT - charts.LEFT) * 123_457 / len(values), abs=2)
    labels = {float(text): height for height, text in drawn.linear.y_ticks}
    assert y == pytest.approx(labels[5.0] + (labels[5.0] - labels[0.0]) * 4 / 5, abs=0.5)


def test_the_line_is_each_columns_mean(many):
    values, drawn, _ = many
    point = drawn.linear.traces[0].points[10]
    low, high = (place * len(values) / charts.NUM_COLUMNS for place in (10, 11))
    inside = [value for step, value in enumerate(values, 1) if low <= step < high]
    mean, least, most = (float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", point[2]))
    assert mean == pytest.approx(sum(inside) / len(inside), rel=1e-3)
    assert (least, most) == pytest.approx((min(inside), max(inside)), rel=1e-3)


def test_rows_without_a_value_are_marked_even_where_their_column_has_others(many):
    values, drawn, _ = many
    expected = [charts.LEFT + (RIGHT - charts.LEFT) * step / len(values) for step in (50_001, 200_000)]
    assert drawn.gaps == pytest.approx(expected, abs=3)
    assert drawn.notes[0].startswith("200,000 rows: each pixel column combines about 738 of them")
    assert drawn.notes[1].startswith("3 rows have no value")


def test_a_long_gap_breaks_the_line_of_many_rows():
    values = [1.0] * 4000 + [math.nan] * 2000 + [2.0] * 4000
    assert len(places(chart(values).linear.traces[0].line)) == 2


def test_rows_far_apart_are_joined_when_others_are_many():
    """Columns without a row are no gap: a run that logs every 100 steps beside one that logs each."""
    sparse = Column()
    for step in range(0, 100_000, 900):
        sparse.add(step, 1.0)
    dense = Curve("dense", 0, False, column([1.0] * 100_000))
    drawn = draw("loss", [dense, Curve("sparse", 1, False, sparse)], 100_000)
    assert len(places(drawn.linear.traces[1].line)) == 1


def test_the_table_has_the_first_and_the_last_row_and_says_what_it_leaves_out(many):
    values, drawn, _ = many
    assert drawn.header == ["step", "training"]
    assert drawn.rows[0] == ["1", number_text(values[0])]
    assert drawn.rows[-1] == ["200,000", "no value"]
    assert len(drawn.rows) == charts.TABLE_ROWS
    assert drawn.table_note == "24 of 200,000 rows per curve, evenly spaced."


def test_the_table_leaves_cells_blank_where_a_curve_has_no_row():
    heldout = Column()
    heldout.add(0, 0.7)
    drawn = draw("loss", [Curve("training", 0, False, column([0.5])), Curve("held-out", 0, True, heldout)], 1)
    assert drawn.rows == [["0", "", "0.7"], ["1", "0.5", ""]]


def test_steps_out_of_order_are_drawn_in_order():
    mixed = Column()
    for step in (3, 1, 2):
        mixed.add(step, float(step))
    (stroke,) = places(draw("loss", [Curve("training", 0, False, mixed)], 3).linear.traces[0].line)
    assert stroke == sorted(stroke)


def test_what_the_pointer_reads_is_what_the_rows_say():
    (trace,) = json.loads(chart([0.69314718, 0.5], label="<b>").hover)
    assert trace["label"] == "<b>"
    assert [point[1:] for point in trace["points"]] == [["1", "0.69315"], ["2", "0.5"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.69314718, "0.69315"),
        (-121.96427, "-121.96"),
        (0.0, "0"),
        (1.0, "1"),
        (100.0, "100"),
        (12345.678, "12,346"),
        (1.2e-5, "1.2e-05"),
        (4e11, "4e+11"),
        (math.nan, "no value"),
        (0.99999999, "1"),
    ],
)
def test_numbers_have_five_digits(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3.2, 1.1, ["-3", "-2", "-1", "0", "1"]),
        (0.0, 2e-6, ["0", "0.5e-6", "1.0e-6", "1.5e-6", "2.0e-6"]),
        (0.0, 45_000.0, ["0", "10,000", "20,000", "30,000", "40,000"]),
        (1e12, 2e12, ["1.0e12", "1.2e12", "1.4e12", "1.6e12", "1.8e12", "2.0e12"]),
    ],
)
def test_ticks_are_round_and_their_labels_tell_them_apart(low, high, texts):
    assert tick_texts(ticks(low, high, 5)) == texts


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        (0.3, 100, [0.5, 1, 2, 5, 10, 20, 50, 100]),
        (1e-9, 1, [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        (2, 9, [2, 5]),
        (2.1, 4.9, []),
    ],
)
def test_log_ticks_are_1_2_and_5_times_powers_of_ten(low, high, values):
    assert log_ticks(math.log10(low), math.log10(high), 8) == pytest.approx(values)


def test_steps_have_no_fractions():
    assert ticks(0, 2, 7, whole=True) == [0, 1, 2]


@pytest.mark.parametrize(("seconds", "text"), [(4.04, "4.0 s"), (245, "4 min 05 s"), (7325, "2 h 02 min")])
def test_times_are_in_words(seconds, text):
    assert time_text(seconds) == text

"""docs/beta.md, its picture, and the pages that quote it have the numbers that were measured."""

from __future__ import annotations

import pytest
from manual_commands import ROOT, problem_of
from test_docs import loaded

from benchmarks import beta

BETA = loaded("make_beta_page")


def test_the_pages_numbers_are_those_that_were_measured():
    assert all(f"<!-- {name}: python docs/make_beta_page.py -->" in BETA.PAGE.read_text() for name in BETA.BLOCKS)
    assert BETA.page(BETA.PAGE.read_text()) == BETA.PAGE.read_text(), "run python docs/make_beta_page.py"


def test_the_picture_is_of_the_measured_runs_and_has_colours_for_dark_pages():
    picture = BETA.PICTURE.read_text()
    assert BETA.checksum() in picture
    assert "prefers-color-scheme: dark" in picture
    assert all(colour in picture for colour in (*BETA.LIGHT.values(), *BETA.DARK.values()))


@pytest.mark.parametrize("page", BETA.QUOTING)
def test_a_page_that_quotes_has_the_measured_numbers(page):
    text = " ".join((ROOT / page).read_text().split())
    assert all(figures in text for figures in BETA.quoted())


def test_the_command_that_trains_the_runs_exists():
    assert problem_of(" ".join(beta.sweep("runs/beta", [0]))) is None


def test_the_runs_show_what_the_page_says_of_them():
    """Reward margins rise with beta; the distance in nats falls with it, beyond the intervals.

    Chosen answers become less likely at the small beta and likelier at the large one, with the same accuracy.
    """
    runs = BETA.overlaid()
    margins = [run.curve[-1]["rewards/margins"] for run in runs]
    assert margins == sorted(margins)
    small, *_, large = runs
    assert large.found["verdict"]["margin"]["high"] < small.found["verdict"]["margin"]["low"]
    assert large.found["measured"]["kl"]["high"] < small.found["measured"]["kl"]["low"]
    assert small.found["verdict"]["chosen"]["high"] < 0 < large.found["verdict"]["chosen"]["low"]
    assert [run.curve[-1]["logps/accuracies"] for run in (small, large)] == [1.0, 1.0]


@pytest.mark.parametrize("page", ["docs/beta.md", "docs/tutorial.md", "docs/tutorial.zh-CN.md"])
def test_what_is_quoted_of_the_methods_is_in_their_results(page):
    quick = (ROOT / "benchmarks/results/2026-11-30-frontier-quick.md").read_text()
    cells = [row.split(" | ") for row in quick.splitlines() if row.startswith("| dpo | beta ")]
    quoted = (ROOT / page).read_text()
    assert len(cells) == 2
    for _, _, reward, kl, *_ in cells:
        assert reward.split()[0] in quoted
        assert kl.split()[0] in quoted

"""What docs/beta.md compares runs by, and the runs that it is of."""

from __future__ import annotations

import itertools

from benchmarks import beta
from qpref.sweep.points import make_points, parse_axes


def test_the_runs_have_the_folders_that_their_sweep_makes(tmp_path):
    command = beta.sweep(str(tmp_path), [0, 1])
    overs = [value for option, value in itertools.pairwise(command) if option == "--over"]
    points = make_points(beta.ROOT / beta.RECIPE, parse_axes(overs), [], tmp_path)
    assert [point.name for point in points] == [beta.folder_of(settings) for settings in beta.runs([0, 1])]


def test_each_run_is_measured_by_samples_of_its_own_policy(trained_run):
    """The second run's policy is nearer to the base; measured alone, it has the same KL and answers."""
    far, near = trained_run(), trained_run(**{"train.learning_rate": 0.001})
    both, alone = beta.measure([far, near]), beta.measure([near])
    assert both.runs[1] == alone.runs[0]
    assert both.base_answers == alone.base_answers
    assert both.runs[0]["kl"]["value"] > both.runs[1]["kl"]["high"]
    assert all(run["kl"]["low"] <= run["kl"]["value"] <= run["kl"]["high"] for run in both.runs)
    assert len(both.base_answers) == len(both.runs[0]["answers"]) == beta.SHOWN

"""Processes that would train different things refuse to, and what may differ between machines is no obstacle."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import outcome
from teams import Trainings, errors, small_recipe

from qpref.data import load
from qpref.training import ranks, run


@pytest.fixture(scope="module")
def trainings(make_base, tmp_path_factory) -> Trainings:
    folder = tmp_path_factory.mktemp("teams")
    return Trainings(folder, small_recipe(folder, make_base(), epochs=1))


@pytest.fixture(scope="module")
def agreed(trainings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agreed") / "run"
    assert trainings.start(2, folder).codes() == [0, 0]
    return folder


def another_setting(rank, plan, prepared):
    document = plan.document | {"train": plan.document["train"] | {"learning_rate": 5e-4}}
    return (replace(plan, document=document) if rank == 1 else plan), prepared


def another_rhythm(rank, plan, prepared):
    document = plan.document | {"train": plan.document["train"] | {"save_every": 5}}
    return (replace(plan, document=document) if rank == 1 else plan), prepared


def another_version(rank, plan, prepared):
    if rank == 1:
        ranks.version_of = lambda name: {"peft": "0.20.9"}.get(name, "1.0")
    else:
        ranks.version_of = lambda name: "1.0"
    return plan, prepared


def with_fingerprint(name):
    def change(rank, plan, prepared):
        changed = replace(prepared, fingerprints=prepared.fingerprints | {name: "f" * 64})
        return plan, changed if rank == 1 else prepared

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_setting, "rank 1 has [train] learning_rate = 0.0005, and rank 0 0.001"),
        (another_rhythm, "rank 1 has [train] save_every = 5, and rank 0 2"),
        (another_version, 'rank 1 has peft = "0.20.9", and rank 0 "1.0"'),
        (with_fingerprint("training data"), "rank 1 has another training data than rank 0"),
        (with_fingerprint("held-out data"), "rank 1 has another held-out data than rank 0"),
        (with_fingerprint("base model"), "rank 1 has another base model than rank 0"),
        (with_fingerprint("start adapter"), "rank 1 has another start adapter than rank 0"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_a_difference_is_refused_and_named_with_its_rank(trainings, tmp_path, change, said):
    outcomes = trainings.start(2, tmp_path / "run", change=change).outcomes()
    assert [each.code for each in outcomes] == [2, 2]
    assert errors(outcomes) == [f"error: the processes of the run don't have the same: {said}"]
    assert not (tmp_path / "run").exists()


def test_a_rank_without_the_data_ends_the_run_by_its_name(trainings, tmp_path):
    def lacks_data(rank, plan, prepared):
        if rank == 1:

            def read(plan):
                sources = tuple(replace(source, location=str(tmp_path / "none.jsonl")) for source in plan.sources)
                return load.load_rows(replace(plan, sources=sources))

            run.load_rows = read
        return plan, prepared

    outcomes = trainings.start(3, tmp_path / "run", change=lacks_data).outcomes()
    assert [each.code for each in outcomes] == [3, 3, 3]
    (message,) = errors(outcomes)
    assert message.startswith("error: rank 1: ")
    assert "none.jsonl" in message


def test_all_processes_start_from_rank_0s_adapter(trainings, agreed, tmp_path):
    def another_start(rank, plan, prepared):
        if rank == 1:
            with torch.no_grad():
                for parameter in prepared.policy.trained_parameters().values():
                    parameter.add_(0.1)
        return plan, prepared

    outcomes = trainings.start(2, tmp_path / "run", change=another_start).outcomes()
    assert [each.code for each in outcomes] == [0, 0], [each.output for each in outcomes]
    assert outcome(tmp_path / "run") == outcome(agreed)


def another_adapter(size):
    """Rank 1's adapter moves away from the others' by this much, before the second step's save."""

    def change(rank, plan, prepared):
        agree = ranks.agree_on_checkpoint

        def moved(session):
            if rank == 1 and session.state.step == 2:
                with torch.no_grad():
                    for parameter in session.prepared.policy.trained_parameters().values():
                        parameter.mul_(1 + size)
            agree(session)

        from qpref.training import saving

        saving.agree_on_checkpoint = moved
        return plan, prepared

    return change


def test_an_adapter_that_drifts_by_rounding_continues_as_rank_0s(trainings, agreed, tmp_path):
    outcomes = trainings.start(2, tmp_path / "run", change=another_adapter(1e-6)).outcomes()
    assert [each.code for each in outcomes] == [0, 0], [each.output for each in outcomes]
    assert "differ by rounding" in outcomes[0].output
    assert outcome(tmp_path / "run") == outcome(agreed)


def test_an_adapter_that_missed_an_update_ends_the_run(trainings, tmp_path):
    outcomes = trainings.start(2, tmp_path / "run", change=another_adapter(0.1)).outcomes()
    assert [each.code for each in outcomes] == [13, 13]
    (message,) = errors(outcomes)
    assert "at step 2 the adapter of rank 1 (by" in message


def test_clocks_may_differ(trainings, agreed, tmp_path):
    def early(rank, plan, prepared):
        if rank == 1:
            now, monotonic = time.time, time.monotonic
            time.time, time.monotonic = lambda: now() - 1e6, lambda: monotonic() + 1e6
        return plan, prepared

    outcomes = trainings.start(2, tmp_path / "run", change=early).outcomes()
    assert [each.code for each in outcomes] == [0, 0], [each.output for each in outcomes]
    assert outcome(tmp_path / "run") == outcome(agreed)


def test_warnings_of_all_processes_are_shown_once(trainings, tmp_path):
    def warns(rank, plan, prepared):
        load_rows = run.load_rows

        def read(plan):
            run.log.warning("a warning of all")
            if rank == 1:
                run.log.warning("a warning of one")
            return load_rows(plan)

        run.load_rows = read
        return plan, prepared

    outcomes = trainings.start(3, tmp_path / "run", change=warns).outcomes()
    assert [each.code for each in outcomes] == [0, 0, 0]
    lines = [line for each in outcomes for line in each.output.splitlines() if "a warning" in line]
    assert sorted(lines) == ["warning: a warning of all", "warning: rank 1: a warning of one"]
    assert all(line.startswith("warning: ") for each in outcomes[1:] for line in each.output.splitlines())

"""RLHF's arms with TRL as it is installed, and DPO's, on a tiny base: what they train, hold in memory and ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.frontier import task
from benchmarks.rlhf import arm, measure, qpref_arms, settings, trl_arms
from benchmarks.rlhf.meter import Meter
from benchmarks.rlhf.settings import LEARNED, OFFLINE, QUICK, ROUNDS, TRUE, Job

WORDS = (("good", "bad"), ("warm", "sad"), ("happy", "ugly"), ("kind", "lost"))
PAGE = Path(__file__).parents[2] / "docs/rlhf.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def job(make_base, tmp_path, monkeypatch):
    """A job on a tiny base, whose pairs prefer kind words."""
    base = str(make_base())
    monkeypatch.setattr(task, "MODEL", {"base": base, "quantization": "nf4", "dtype": "float32"})
    monkeypatch.setattr(settings, "openings", lambda: (["The day", "The night"] * 2, ["The week", "The year"]))
    rows = [{"prompt": "The day", "chosen": f" was {good}.", "rejected": f" was {bad}."} for good, bad in WORDS]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = replace(
        QUICK, openings=4, epochs=1, pairs_per_step=2, rl_steps=2, completions_per_step=4, heldout=2, checkpoints=1
    )
    return Job(arm=LEARNED, seed=0, folder=str(tmp_path), base=base, pairs=str(pairs), sizes=sizes)


def test_rlhf_with_a_learned_reward_holds_two_models_and_moves_the_policy(job):
    meter = Meter()
    trl_arms.with_a_learned_reward(job, meter)
    assert meter.models == {"LlamaForCausalLM": 1, "LlamaForSequenceClassification": 1}
    assert meter.labels == len(WORDS)
    assert [row["step"] for row in meter.saved] == [2]
    assert meter.saved[0]["cpu_seconds"] > 0
    (measured,) = measure.measured(job, [Path(meter.saved[0]["adapter"])])
    assert len(measured["rewards"]) == 2
    assert any(measured["kls"])


def test_rlhf_with_the_true_reward_holds_one_model_and_asks_for_each_completion(job):
    meter = Meter()
    trl_arms.with_the_true_reward(replace(job, arm=TRUE), meter)
    assert meter.models == {"LlamaForCausalLM": 1}
    assert meter.labels == 2 * 4


def test_offline_dpo_is_measured_at_each_checkpoint_against_the_base(job):
    meter = Meter()
    qpref_arms.offline(replace(job, arm=OFFLINE, sizes=replace(job.sizes, checkpoints=2)), meter)
    assert meter.models == {"LlamaForCausalLM": 1}
    assert [row["step"] for row in meter.saved] == [1, 2]
    base, *after = measure.measured(job, [None, *(Path(row["adapter"]) for row in meter.saved)])
    assert base["kls"] == [0.0, 0.0]
    assert all(any(one["kls"]) for one in after)


def test_the_page_quotes_the_settings_that_the_arms_take(job):
    given = {name: arm.settings_given(replace(job, arm=name)) for name in (OFFLINE, ROUNDS, TRUE, LEARNED)}
    for name, count in given.items():
        assert f"| {settings.TITLES[name]} | {count} |" in PAGE.read_text()

"""odpo against its formula in arithmetic that shares no code with it, and from the scores of a file to a run."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pydantic
import pytest
import torch
from conftest import preference_rows, write_jsonl
from loss_cases import all_finite, extreme_pairs, flat_pair, log_sigmoid, paired, random_pair

import qpref
from qpref.errors import DataError
from qpref.records import PairedInputs
from qpref_plugins.loss_odpo import ODPO, OdpoOptions

CASES = [
    {},
    {"beta": 0.5, "alpha": 0.3},
    {"scale": "linear", "alpha": 0.1},
    {"scale": "linear", "beta": 0.3, "alpha": 2.0},
    {"alpha": 0.0},
]
every_case = pytest.mark.parametrize("options", CASES, ids=str)


def scored(pairs: list[dict], scores: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> PairedInputs:
    sides = zip(("score_chosen", "score_rejected"), zip(*scores, strict=True), strict=True)
    columns = {name: torch.tensor(values, dtype=dtype) for name, values in sides}
    return replace(paired(pairs, dtype), columns=columns)


def losses_of(inputs: PairedInputs, **options: object) -> torch.Tensor:
    return ODPO.build(OdpoOptions(**options))(inputs).losses


def exact_loss(pair: dict, scores: tuple[float, float], options: OdpoOptions) -> float:
    """-log sigmoid(beta logits - alpha margin), margin = log(chosen reward - rejected reward): the authors' code."""
    logits = (math.fsum(pair["policy chosen"]) - math.fsum(pair["policy rejected"])) - (
        math.fsum(pair["reference chosen"]) - math.fsum(pair["reference rejected"])
    )
    lead = scores[0] - scores[1]
    if options.scale == "log":
        lead = math.log(max(lead, 1e-6))
    return -log_sigmoid(options.beta * logits - options.alpha * lead - pair["margin"])


@every_case
def test_odpo_is_its_formula_on_1000_random_pairs(options):
    rng = random.Random(1)
    pairs = [random_pair(rng, longest=12) for _ in range(1000)]
    scores = [(rng.uniform(-3, 5), rng.uniform(-3, 3)) for _ in pairs]
    exact = [exact_loss(pair, each, OdpoOptions(**options)) for pair, each in zip(pairs, scores, strict=True)]
    assert losses_of(scored(pairs, scores), **options).tolist() == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_odpo_by_hand():
    # h = 3 nats, beta 1; the scores differ by e, whose logarithm is 1, and by 2
    pair = flat_pair(-1.0, -4.0)
    assert losses_of(scored([pair], [(math.e + 1, 1.0)]), beta=1.0, alpha=2.0).item() == pytest.approx(
        math.log1p(math.exp(-1)), rel=1e-12
    )
    assert losses_of(scored([pair], [(5.0, 3.0)]), beta=1.0, scale="linear").item() == pytest.approx(
        math.log1p(math.exp(-1)), rel=1e-12
    )


def test_a_larger_lead_asks_for_a_larger_margin_and_a_tie_teaches_hardly_anything():
    inputs = scored([flat_pair(-1.0, -1.0)] * 4, [(9.0, 1.0), (3.0, 1.0), (1.0, 1.0), (0.0, 1.0)])
    losses_of(inputs, beta=0.1).sum().backward()
    far, near, tie, contradiction = (-inputs.policy.chosen.values.grad).tolist()
    assert far > near > 0.05
    assert 0 < tie == contradiction < 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_odpo_is_finite_with_a_finite_gradient_at_extremes(options, dtype):
    pairs = extreme_pairs()
    scores = [((0.0, 1e4, -1e4, 1e30)[at % 4], (0.0, -1e4, 1e4)[at % 3]) for at in range(len(pairs))]
    inputs = scored(pairs, scores, dtype)
    assert all_finite(losses_of(inputs, **options), inputs)


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"alpha": -0.1}, {"scale": "square"}, {"chosen_column": ""}, {"chosen_column": "score_rejected"}],
)
def test_odpo_refuses_options_out_of_range(options):
    with pytest.raises(pydantic.ValidationError):
        OdpoOptions(**options)


@pytest.fixture
def recipe(make_recipe, tmp_path: Path):
    """12 pairs with scores of their own, and 4 held-out ones, under other names than the loss's."""

    def make(change: dict[str, object] | None = None):
        rows = [row | {"good": 3.0 + at, "bad": 1.0} for at, row in enumerate(preference_rows(12))]
        rows[5] |= change or {}
        heldout = [row | {"good": 4.0, "bad": 1.0} for row in preference_rows(4, start=100)]
        made = make_recipe({"train.max_steps": 2, "train.log_every": 1, "train.batch_size": 12})
        made["data"] |= {
            "train": str(write_jsonl(tmp_path / "scored.jsonl", rows)),
            "heldout": str(write_jsonl(tmp_path / "scored-heldout.jsonl", heldout)),
        }
        return made | {"loss": {"name": "odpo", "chosen_column": "good", "rejected_column": "bad"}}

    return make


def test_a_run_reads_the_scores_of_its_rows(recipe, tmp_path):
    """At the first step policy and reference are the same, so the loss is -log sigmoid(-offset) of each row."""
    qpref.train(recipe(), output=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["split"] == "train")
    expected = math.fsum(-log_sigmoid(-math.log(2.0 + at)) for at in range(12)) / 12
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["eval_loss"] == pytest.approx(-log_sigmoid(-math.log(3.0)), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"good": None}, "good: expected a number, found None"),
        ({"bad": "high"}, "bad: expected a number, found 'high'"),
    ],
)
def test_a_row_without_a_score_stops_the_run_before_a_model_is_loaded(recipe, tmp_path, change, problem, monkeypatch):
    monkeypatch.setattr("qpref.training.run.prepare", lambda *anything: pytest.fail("a model is loaded"))
    with pytest.raises(DataError, match="scored.jsonl:6.*" + problem):
        qpref.train(recipe(change), output=tmp_path / "run")

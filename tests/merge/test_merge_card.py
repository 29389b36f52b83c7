"""The model card tells what was merged, whatever state the run's records are in."""

from __future__ import annotations

import json

from edited_runs import reseal
from merge_cases import merge, moved


def test_the_metrics_are_those_of_the_step_whose_adapter_is_merged(trained_run, make_base, tmp_path):
    run, _ = moved(trained_run(), make_base(), tmp_path)
    rows = [{"split": "eval", "step": step, "eval_loss": value} for step, value in ((0, 0.9), (1, 0.25), (3, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"adapter_step": 1}))
    reseal(run)
    merge(run, tmp_path / "out", "bf16")
    card = (tmp_path / "out/README.md").read_text()
    assert "| | step 0 | step 1 |\n|---|---|---|\n| loss | 0.9 | 0.25 |" in card


def test_a_line_that_is_no_row_costs_the_card_that_line_alone(trained_run, make_base, tmp_path, said):
    run, _ = moved(trained_run(), make_base(), tmp_path)
    row = json.dumps({"split": "eval", "step": 3, "eval_loss": 0.5, "eval_odd": "text"})
    (run / "metrics.jsonl").write_bytes(b"[1]\n" + row.encode() + b'\n{"split": "eval", "st\xff')
    merge(run, tmp_path / "out", "bf16")
    assert "| | step 3 | step 3 |\n|---|---|---|\n| loss | 0.5 | 0.5 |" in (tmp_path / "out/README.md").read_text()
    assert f"{run}/metrics.jsonl:1: not a metrics row, left out of the card (2 in all)" in said

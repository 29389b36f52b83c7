"""The model card tells what was merged, whatever state the run's records are in."""

from __future__ import annotations

import json

from merge_cases import merge, moved


def test_the_metrics_are_those_of_the_step_whose_adapter_is_merged(trained_run, make_base, tmp_path):
    run, _ = moved(trained_run(), make_base(), tmp_path)
    rows = [{"split": "eval", "step": step, "eval_loss": value} for step, value in ((0, 0.9), (1, 0.25), (3, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(said | {"adapter_step": 1}))
    merge(run, tmp_path / "out", "bf16")
    card = (tmp_path / "out/README.md").read_text()
    assert "| | step 0 | step 1 |\n|---|---|---|\n| loss | 0.9 | 0.25 |" in card

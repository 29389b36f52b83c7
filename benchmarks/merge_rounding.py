"""Measure the error of held-out margins for each dtype that a merged model can be stored in.

    python -m benchmarks.merge_rounding runs/quickstart

Every model is computed in float32, so only the stored weights differ: exact ones (the dequantized base plus the delta
in float32), rounded to the nearest number of each dtype, and rounded to bf16 with error feedback. Feedback goes through
the columns of a weight in turn and moves each rounding error into the remaining columns, to keep the layer's output on
calibration activations as close as possible: GPTQ (Frantar et al. 2023, algorithm 1) with bf16's numbers as the grid,
calibrated on the training pairs. Prints JSON, errors in nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref.data.load import check_rows
from qpref.data.reload import reload_rows
from qpref.data.tokenize import PairTokenizer
from qpref.merging.compared_models import AsTrained, load_base
from qpref.merging.guards import TrainedRun, read_run
from qpref.merging.replay import ScoredRow, replay
from qpref.merging.replayed_pairs import choose_pairs
from qpref.merging.request import Tolerance
from qpref.merging.rounding import STORED, Retention
from qpref.merging.verdict import Judge
from qpref.policy.tokenizer import stop_tokens
from qpref.recipe.reopen import reopen_plan

DAMPING = 0.01
"""Share of the mean of the second moments' diagonal that is added to the diagonal (as in GPTQ)."""
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder with held-out pairs")
    parser.add_argument("--calibration", type=int, default=48, help="training pairs for the feedback")
    parsed = parser.parse_args()
    run = read_run(parsed.run)
    model, before = load_base(run.base), AsTrained(run.base)
    after, device = before.after(run.delta), run.base.device
    replayed = choose_pairs(run.plan, run.base_folder, run.tokenizer, 10**9)
    rows = replayed.rows
    reference, trained = replay(model, rows, before, device), replay(model, rows, after, device)
    judge = Judge.of(replayed, reference, trained, Tolerance(), device)
    report: dict[str, Any] = {"pairs": len(replayed.contrasts), "learned_margin": judge.learned}
    moments = second_moments(model, calibration_rows(run, parsed.calibration), after, run)
    roundings: dict[str, Callable[[str, Tensor], Tensor]] = {
        name: lambda module, weight, dtype=dtype: weight.to(dtype) for name, dtype in STORED.items()
    }
    roundings["bf16 with feedback"] = lambda module, weight: with_feedback(weight, moments[module])
    for name, rounding in roundings.items():
        stored = Rounded(run, before, rounding)
        verdict = judge.judge(replay(model, rows, stored, device))
        report[name] = {
            "margin_error": verdict.margin_error,
            "share_of_learned": verdict.share,
            "kl_per_token": verdict.kl,
            "flips": len(verdict.flips),
            "kept_in_weights": stored.retention.kept,
        }
    print(json.dumps(report, indent=2))


@dataclass(slots=True)
class Rounded:
    """Convert merged weights to float32 after rounding them; each weight is rounded once and cached.

    Attributes:
        rounding: module name, weight -> rounded weight.
    """

    run: TrainedRun
    before: AsTrained
    rounding: Callable[[str, Tensor], Tensor]
    rounded: dict[str, Tensor] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)

    def __call__(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in self.run.delta.matrices:
            return self.before(name, stored, rows)
        if module not in self.rounded:
            weight, change = self.before(name, stored), self.run.delta.of(module)
            self.rounded[module] = self.rounding(module, weight + change)
            self.retention.add(weight, change, self.rounded[module])
        return self.rounded[module][rows].float()


def calibration_rows(run: TrainedRun, limit: int) -> list[ScoredRow]:
    """Read the prompts and responses of the first `limit` training pairs."""
    plan = reopen_plan(run.recorded)
    tokenizer = PairTokenizer.of(run.tokenizer, plan.recipe.data.template, stop_tokens(run.base_folder))
    examples = reload_rows(check_rows(plan).train, plan, tokenizer)
    return [ScoredRow(tuple(one.prompt), tuple(branch)) for one in examples[:limit] for branch in one.branches]


def second_moments(model: Any, rows: list[ScoredRow], to_float32: AsTrained, run: TrainedRun) -> Mapping[str, Tensor]:
    """Sum [in, in] x x^T over all tokens, for the input x of each adapted layer."""
    sums: dict[str, Tensor] = {}

    def add(module: str, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].flatten(0, -2).float()
        sums[module] = sums.get(module, torch.zeros(flat.shape[1], flat.shape[1])) + flat.t() @ flat

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs))
        for name in run.delta.modules
    ]
    replay(model, rows, to_float32, run.base.device)
    for hook in hooks:
        hook.remove()
    return sums


def with_feedback(weight: Tensor, moments: Tensor) -> Tensor:
    """Round [out, in] `weight` to bf16 so that its product with the calibration activations changes little."""
    moments = moments.clone()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, stored = weight.clone(), torch.empty_like(weight, dtype=torch.bfloat16)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty(weight.shape[0], stop - start)
        for column in range(start, stop):
            stored[:, column] = left[:, column].to(torch.bfloat16)
            error = (left[:, column] - stored[:, column].float()) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return stored


if __name__ == "__main__":
    main()

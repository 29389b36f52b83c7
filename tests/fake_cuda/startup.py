"""Everything that a run does on the device, in its order, at any shape: which stage mixes devices, types or shapes up.

    python -m tests.fake_cuda.startup [--family gemma3_text --loss kto] [--dtype fp16 --dropout 0.1]

Exits with the number of stages that failed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within


def stages(run: Run, meters: fake_cuda.Meters) -> list[tuple[str, Callable[[], Any]]]:
    policy, examples, device = run.policy, run.examples, run.policy.device
    trainer = run.trainer()
    open_recipe = run.plan.recipe.model_copy(update={"train": run.plan.recipe.train.model_copy(
        update={"tokens_per_microbatch": "auto", "gradient_checkpointing": "auto"})})  # fmt: skip

    def layout() -> str:
        names.check_layout(policy, examples[0])  # a fault on its way makes the product fall back, with a warning alone
        assert policy.attention == policy.sharing_paths[0], f"fell back to {policy.attention}"
        return str(policy.attention)

    def steps() -> str:
        meters.syncs.answer = 0.5  # a gradient that is not 0
        trainer.state.budget = 2 * max(len(each.prompt) + 2 * len(each.branches[0]) for each in examples)
        parts = names.split_by_tokens(examples, trainer.state.budget, policy.shares_prompts)
        trainer.step()
        return f"{len(parts)} micro-batches"

    def token_kl() -> Any:
        hidden = torch.empty(5, run.config.hidden_size, dtype=policy.dtype, device=device)
        tokens = names.NextTokens.of(policy.head, hidden)
        return tuple(names.token_kl(tokens, tokens).shape)

    return [
        ("layout check", layout),
        ("start check", lambda: names.check_start(policy, run.objective, names.first_batch(examples, policy))),
        ("settle, with its probe", lambda: names.tune.choose_sizes(policy, open_recipe, run.folder, examples, 2**31)),
        (
            "forecast",
            lambda: len(names.run_forecast(policy, run.plan.recipe, run.folder, examples, 4096)),
        ),
        ("reference fill", lambda: names.reference_pass.fill(run.references, policy, examples, 16384)),
        ("held-out rows", lambda: len(names.heldout_means(trainer.scorer, examples, 4096)[0])),
        ("a step in parts", steps),
        ("token KL", token_kl),
        ("optimizer snapshot", lambda: len(names.optim.optimizer_tensors(run.optimizer)[0])),
    ]


def failures(run: Run, meters: fake_cuda.Meters) -> dict[str, str]:
    """What each stage that fails says."""
    meters.syncs.answer = 0.0  # a difference of 0 passes every check
    found = {}
    for name, stage in stages(run, meters):
        try:
            print(f"ok    {name}: {stage()}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            traceback.print_exc(limit=-3)
            print(f"FAIL  {name}: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    job, _ = Job.parse(__doc__ or "")
    sys.exit(len(within(job, failures)))


if __name__ == "__main__":
    main()

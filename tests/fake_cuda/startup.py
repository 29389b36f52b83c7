"""Everything that training does on the device, in its order, at any shape: which stage mixes devices or types up.

    python -m tests.fake_cuda.startup [--family gemma3_text --loss kto] [--dtype fp16 --dropout 0.1]

Exits with the number of stages that failed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within

Stage = tuple[str, Callable[[], Any]]


def stages(run: Run, meters: fake_cuda.Meters) -> list[Stage]:
    policy, examples, device = run.policy, run.examples, run.policy.device
    trainer = run.trainer()
    open_recipe = run.plan.recipe.model_copy(update={"train": run.plan.recipe.train.model_copy(
        update={"tokens_per_microbatch": "auto", "gradient_checkpointing": "auto"})})  # fmt: skip

    def layout() -> str:
        names.check_layout(policy, examples[0])  # a fault on its way makes the product fall back, with a warning alone
        expected = policy.sharing_paths[0 if run.job.has_flash else -1]
        assert policy.attention == expected, f"{policy.attention} instead of {expected}"
        return str(policy.attention)

    def step(budget: int, objective: Any = run.objective) -> str:
        meters.syncs.answer = 0.5  # a gradient that is not 0
        trainer.state.budget, trainer.objective = budget, objective
        parts = names.split_by_tokens(examples, budget, policy.shares_prompts)
        trainer.step()
        trainer.state.step += 1
        assert (len(parts) > 1) == (budget == pair), f"{len(parts)} micro-batches"
        return f"{len(parts)} micro-batches"

    def token_kl() -> Any:
        hidden = torch.empty(5, run.config.hidden_size, dtype=policy.dtype, device=device)
        tokens = names.NextTokens.of(policy.head, hidden)
        return tuple(names.token_kl(tokens, tokens).shape)

    def resumed() -> str:
        """A snapshot as from a file, on the CPU, restored into a fresh optimizer, and a step with that."""
        session = _session(run, trainer)
        saved = names.snapshot.capture(session, 0, "")
        files = {name: {key: value.cpu() for key, value in file.items()} for name, file in saved.tensors.items()}
        assert files["optimizer"], "the steps left the optimizer without a state"
        again = run.trainer()
        session = _session(run, again)
        names.snapshot.restore(_read_again(saved, files), session)
        assert again.state.step == trainer.state.step > 0
        again.step()
        return f"{len(files['optimizer'])} tensors of the optimizer"

    pair = 2 * max(names.num_fed_tokens(example, policy.shares_prompts) for example in examples)
    found: list[Stage] = [
        ("layout check", layout),
        ("start check", lambda: names.check_start(policy, run.objective, names.first_batch(examples, policy))),
        ("settle, with its probe", lambda: names.tune.choose_sizes(policy, open_recipe, run.folder, examples, 2**31)),
        ("forecast", lambda: len(names.run_forecast(policy, run.plan.recipe, run.folder, examples, 4096))),
    ]
    if run.references is not None:
        found += [
            ("reference check", lambda: check_reference(run, examples[:2])),
            ("reference fill", lambda: names.reference_pass.fill(run.references, policy, examples, 16384)),
        ]
    found += [
        ("held-out rows", lambda: len(names.heldout_means(trainer.scorer, examples, 4096)[0])),
        ("a step in one", lambda: step(16384)),
        ("a step in parts", lambda: step(pair)),
    ]
    if whole := _whole_step_loss(run):
        found.append(("a whole-step loss in parts", lambda: step(pair, whole)))
    return [*found, ("token KL", token_kl), ("snapshot, restored, and a step", resumed)]


def _read_again(saved: names.Checkpoint, tensors: dict[str, Any]) -> names.Checkpoint:
    """A checkpoint as its file gives it back, with the step in its state."""
    return names.Checkpoint(step=saved.step, state={"step": saved.step} | saved.state, tensors=tensors)


def check_reference(run: Run, examples: Sequence[names.TokenizedExample]) -> str:
    """Check an earlier run's scores of these examples, and measure the rounding between batches."""
    policy = run.policy
    batch = names.pack(examples, policy.device)
    keys = [key for example in examples for key in names.row_keys(example)]
    rows = {key: torch.empty(length) for key, length in zip(keys, batch.lengths, strict=True)}
    cache = _EarlierRun(rows, names.CheckRows(tuple(examples), torch.empty(sum(batch.lengths))))
    names.check_cache(names.ReferenceStore(cache), policy, batch, examples)  # type: ignore[arg-type]
    assert not cache.refused, "the earlier run's scores are put aside"
    with names.as_reference(policy):
        names.measured_rounding(examples, policy)
    return f"{len(rows)} rows"


class _EarlierRun:
    """The cache of one earlier run, in memory: what reads files has no fake values to read."""

    def __init__(self, rows: dict[bytes, torch.Tensor], check_rows: names.CheckRows) -> None:
        self.rows, self.known, self.refused = rows, check_rows, False
        self.check_rows: names.CheckRows | None = None
        self.store = SimpleNamespace(run="this", shard_of=lambda key: "earlier" if key in rows else None)

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows

    def get(self, key: bytes) -> torch.Tensor | None:
        return self.rows.get(key)

    def check_rows_of(self, shard: str, max_tokens: int) -> names.CheckRows:
        return self.known

    def put_aside(self, shards: Any) -> None:
        self.refused |= bool(shards)


def _session(run: Run, trainer: Any) -> Any:
    """The part of a run that its checkpoints are made of."""
    prepared = SimpleNamespace(
        policy=run.policy, plan=run.plan, objective=run.objective, fingerprints={}, world=names.ALONE
    )
    return names.Session(prepared, trainer.optimizer, trainer.scaler, trainer.references, trainer.state)


def _whole_step_loss(run: Run) -> Any:
    """A loss that has to see all pairs of a step at once; None in a run on single completions, which has its own."""
    if not run.objective.is_paired or run.references is None:
        return None
    return names.Objective.of(run.plan_of("aot").losses)


def attempted(found: Sequence[Stage], meters: fake_cuda.Meters) -> dict[str, str]:
    """What each stage that fails says."""
    failed = {}
    for name, stage in found:
        meters.syncs.answer = 0.0  # a difference of 0 passes every check
        try:
            print(f"ok    {name}: {stage()}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            traceback.print_exc(limit=-3)
            print(f"FAIL  {name}: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def failures(run: Run, meters: fake_cuda.Meters) -> dict[str, str]:
    """What each stage of training that fails says."""
    return attempted(stages(run, meters), meters)


def main() -> None:
    job, _ = Job.parse(__doc__ or "")
    sys.exit(len(within(job, failures)))


if __name__ == "__main__":
    main()

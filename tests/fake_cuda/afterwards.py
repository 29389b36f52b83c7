"""Everything that evaluation, generation and merging do on the device after a run, at any shape.

    python -m tests.fake_cuda.afterwards [--family gemma3_text --start 1] [--dtype fp16 --capability 7.5]

Exits with the number of stages that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within
from tests.fake_cuda.startup import Stage, attempted

PROMPTS = [[5] * 9, [5] * 4]


def stages(run: Run, meters: fake_cuda.Meters) -> list[Stage]:
    policy, examples = run.policy, run.examples
    policy.model.eval()
    positions = names.kl_positions(examples, seed=0)
    references: list[names.Reference] = []

    def scores() -> str:
        references.append(names.score_reference("run", policy, examples, positions))
        found = names.score_pairs(policy, examples, positions, references[0])
        assert found.kl is not None
        assert len(found.kl) == len(examples)
        return str(found.policy.shape)

    def in_float32() -> str:
        """As where models of different dtypes are compared."""
        names.compute_in_float32(policy)
        names.check_layout(policy, examples[0])
        assert policy.attention == policy.sharing_paths[0], f"fell back to {policy.attention}"
        scores()
        return str(policy.attention)

    def plain() -> str:
        """A model without adapters, against the run's reference."""
        other = names.load_plain(run.plan.recipe.model, run.base_folder)
        names.check_layout(other, examples[0])
        names.score_pairs(other, examples, positions, references[0])
        return f"{other.attention}, {names.answers(other, PROMPTS, names.Sampling(max_new_tokens=2))}"

    def generated(**sampling: Any) -> str:
        found = names.answers(policy, PROMPTS, names.Sampling(max_new_tokens=3, **sampling))
        with names.as_reference(policy):
            names.answers(policy, PROMPTS[:1], names.Sampling(max_new_tokens=3, **sampling))
        return str(found[0])

    return [
        ("layout check of eval", lambda: names.check_layout(policy, examples[0])),
        ("scores and KL", scores),
        ("greedy answers", generated),
        ("sampled answers", partial(generated, temperature=0.7, top_p=0.9)),
        ("eval in float32", in_float32),
        ("eval and answers of a plain model", plain),
        ("merge's replay and verdict", lambda: merged(run)),
    ]


def merged(run: Run) -> str:
    """Replay pairs through base, trained and merged model, one layer on the device at a time, and judge the last."""
    device, dtype, rank = run.policy.device, run.policy.head.weight.dtype, run.job.rank
    linears, matrix = run.linears, partial(torch.empty, dtype=torch.float32)
    base = names.TrainedBase(
        path=run.folder, names={}, tensors={},
        layers=names.AdaptableLayers(names.LayerNames(frozenset(), "model", "lm_head"), frozenset(), {}),
        kept=frozenset(), unread=frozenset(), quantization_state={}, linear=frozenset(), head="lm_head",
        others=frozenset(), experts=frozenset(), conversions=names.Conversions(None, {}, {}),
        quantized=frozenset(name for name, _, _ in linears), dtype=dtype, double_quantization=True, device=device,
    )  # fmt: skip
    delta = names.LoraDelta(
        {name: names.LowRank(matrix(rank, inputs), matrix(out, rank), 2.0) for name, out, inputs in linears}
    )
    pairs = [
        [names.ScoredRow(tuple(example.prompt), tuple(branch)) for branch in example.branches]
        for example in run.examples
    ]
    contrasts = [names.Contrast(rows=tuple(rows), sign=(1, -1)[: len(rows)], location="made up:1") for rows in pairs]
    replayed = names.Replayed(contrasts, "held-out pairs")

    def hidden(to_float32: Callable[..., torch.Tensor]) -> Any:
        model = fake_cuda.plain_model(run.config, dtype)
        return names.replay(model, replayed.rows, to_float32, device)

    before = names.AsTrained(base)
    judge = names.Judge.of(replayed, hidden(before), hidden(before.after(delta)), names.Tolerance(0.02, 0.01), device)
    return str(judge.judge(hidden(names.AsStored(device))).allowed)


def failures(run: Run, meters: fake_cuda.Meters) -> dict[str, str]:
    """What each stage after training that fails says."""
    return attempted(stages(run, meters), meters)


def main() -> None:
    job, _ = Job.parse(__doc__ or "")
    sys.exit(len(within(job, failures)))


if __name__ == "__main__":
    main()

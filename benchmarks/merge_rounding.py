"""What rounding a merged model to a type costs, in held-out margins.

    python -m benchmarks.merge_rounding runs/quickstart

Every model is computed in float32, so only the stored weights differ: exact (the dequantized base plus the delta in
float32), and the same rounded to each 16-bit type. Prints JSON: the mean absolute error of the pairs' margins (nats),
and its share of the mean absolute margin that was learned.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref.data.load import load_rows, tokenize_rows
from qpref.data.tokenize import PairTokenizer
from qpref.merge import STORED, TrainedBase
from qpref.plan import Plan, make_plan
from qpref.policy.delta import LoraDelta
from qpref.policy.source import resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.records import TokenizedExample
from qpref.training.folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder with held-out pairs")
    folder = RunFolder(parser.parse_args().run)
    examples = heldout_examples(make_plan(tomllib.loads(folder.recipe.read_text())))
    base, delta = TrainedBase.of_run(folder), LoraDelta.read(folder.adapter)
    places = base.places_of(delta.modules)
    weights = {key: weight.float() for shard in base.shards for key, weight in base.tensors(shard)}
    exact = {key: weight + delta.of(places[key]) if key in places else weight for key, weight in weights.items()}
    model = empty_model(base.path)
    before, after = margins(model, weights, base, examples), margins(model, exact, base, examples)
    learned = (after - before).abs().mean().item()
    report: dict[str, Any] = {"pairs": len(examples), "learned_margin": learned}
    for name, dtype in STORED.items():
        rounded = {key: weight.to(dtype).float() if key in places else weight for key, weight in exact.items()}
        error = (margins(model, rounded, base, examples) - after).abs().mean().item()
        report[name] = {"margin_error": error, "share_of_learned": error / learned}
    print(json.dumps(report, indent=2))


def heldout_examples(plan: Plan) -> list[TokenizedExample]:
    base = resolve_base(plan.recipe.model)
    tokenizer = load_tokenizer(plan.recipe.model, base)
    if not plan.is_paired:
        raise SystemExit("this measurement is of pairs, and the run's loss is of single completions")
    heldout = load_rows(plan).heldout
    assert heldout is not None, "the run has no held-out pairs"
    pairs = PairTokenizer.of(tokenizer, plan.recipe.data.template, stop_tokens(base))
    return tokenize_rows(heldout, pairs, plan.recipe.data, plan.recipe.train.seed)


def empty_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def margins(model: Any, weights: dict[str, Tensor], base: TrainedBase, examples: Sequence[TokenizedExample]) -> Tensor:
    """[pairs] log-probability of chosen less that of rejected, nats."""
    for key, weight in weights.items():
        model.get_parameter(base.names[key]).copy_(weight)
    totals = []
    for example in examples:
        for branch in example.branches:
            ids = torch.tensor([[*example.prompt, *branch]])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(branch) + 1).logits[0, :-1]
            totals.append(logits.log_softmax(-1).gather(1, ids[0, -len(branch) :, None]).sum())
    chosen, rejected = torch.stack(totals).view(-1, 2).unbind(1)
    return chosen - rejected


if __name__ == "__main__":
    main()

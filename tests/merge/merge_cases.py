"""Runs to merge, and what they are compared with."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import torch
from edited_runs import reseal
from safetensors.torch import load_file

from qpref.merging.merge import merge_run
from qpref.merging.request import MergeRequest, MergeResult
from qpref.policy.adapter import load_adapter_tensors
from qpref.policy.load import load_policy
from qpref.policy.policy import Policy
from qpref.policy.source import resolve_base
from qpref.recipe.resolve import make_plan

PROMPT = list(range(20, 60))


def merge(run: Path, out: Path, dtype: str = "auto", **asked) -> MergeResult:
    return merge_run(MergeRequest(run=run, out=out, dtype=dtype, **asked))


def lock_of(run: Path):
    return tomllib.loads((run / "recipe.lock.toml").read_text())


def trained_policy(run: Path) -> Policy:
    """The policy of a run with its final adapter, loaded as training loads it."""
    plan = make_plan(lock_of(run))
    policy = load_policy(plan.recipe, resolve_base(plan.recipe.model))
    load_adapter_tensors(policy.model, load_file(run / "adapter/adapter_model.safetensors"), "default", "the run")
    policy.share_prompts(False)
    policy.model.eval()
    return policy


@torch.no_grad()
def logits_of(model, ids=PROMPT) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def load_plain(out: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def merged_logits(out: Path) -> torch.Tensor:
    return logits_of(load_plain(out))


def moved(run: Path, base: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a run and of its base that may be harmed, each naming the other's new place."""
    new_run, new_base = folder / "run", folder / "base"
    shutil.copytree(run, new_run)
    shutil.copytree(base, new_base)
    for name in ("run.json", "recipe.lock.toml", "adapter/adapter_config.json"):
        file = new_run / name
        file.write_text(file.read_text().replace(f'"{base}"', f'"{new_base}"'))
    reseal(new_run)
    return new_run, new_base

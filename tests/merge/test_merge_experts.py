"""Experts in 4 bits at merge: the files' tensors, one for each expert, are what training computed with."""

from __future__ import annotations

import pytest
import torch
from merge_cases import logits_of, merge, merged_logits, trained_policy
from safetensors.torch import load_file
from tiny_models import TinyModel

from qpref.policy.experts import through_nf4


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merged_model_has_the_experts_that_were_trained_with(kind, trained_run, tmp_path):
    run = trained_run(TinyModel(model_type=kind).write(tmp_path / "base"), **{"model.quantization": "nf4"})
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert before.keys() == after.keys()


def test_an_expert_is_rounded_with_the_tensors_that_it_is_fused_with(trained_run, tmp_path):
    run = trained_run(TinyModel(model_type="mixtral").write(tmp_path / "base"), **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    fused, merged = (torch.cat([each[f"{prefix}.w1.weight"], each[f"{prefix}.w3.weight"]]) for each in (before, after))
    assert torch.equal(through_nf4(fused[None], double_quantization=True)[0], merged)


def test_onto_the_original_the_experts_stay_as_they_are(trained_run, tmp_path):
    run = trained_run(TinyModel(model_type="mixtral").write(tmp_path / "base"), **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32", onto="original")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)

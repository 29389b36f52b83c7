"""The verdict says what the folder on disk really computes, and decides which type is stored."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import preference_rows, write_jsonl
from merge_cases import load_plain, lock_of, logits_of, merge, moved, trained_policy
from safetensors.torch import load_file, save_file

from qpref.data.load import load_rows, tokenize_rows
from qpref.data.tokenize import PairTokenizer
from qpref.errors import MergeError
from qpref.merging import compared_models, replay, rounding
from qpref.merging import merge as merge_module
from qpref.merging import verdict as verdict_module
from qpref.merging.guards import read_run
from qpref.merging.merge import Session, _survey
from qpref.merging.replayed_pairs import choose_pairs
from qpref.merging.request import MergeRequest, Tolerance
from qpref.policy.delta import LoraDelta
from qpref.policy.source import resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

NF4 = {"model.quantization": "nf4"}


def heldout_examples(run):
    plan = make_plan(lock_of(run))
    base = resolve_base(plan.recipe.model)
    pairs = PairTokenizer.of(load_tokenizer(plan.recipe.model, base), "chat", stop_tokens(base))
    return tokenize_rows(load_rows(plan).heldout, pairs, plan.recipe.data, plan.recipe.train.seed)


@torch.no_grad()
def scores(model, examples):
    """Log-probabilities [row] of chosen and rejected in turn, and [S, vocabulary] of all response tokens; one row at a
    time, by the model's own logits."""
    totals, everything = [], []
    for example in examples:
        for branch in example.branches:
            ids = [*example.prompt, *branch]
            logprobs = logits_of(model, ids)[len(example.prompt) - 1 : -1].double().log_softmax(-1)
            everything.append(logprobs)
            totals.append(logprobs.gather(1, torch.tensor(list(branch))[:, None]).sum())
    return torch.stack(totals), torch.cat(everything)


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
@pytest.mark.parametrize(
    "asked", [{"dtype": "bf16"}, {"dtype": "fp16", "onto": "original"}], ids=["trained", "original"]
)
def test_its_figures_are_those_of_the_loaded_folder_and_the_trained_policy(
    trained_run, make_base, tmp_path, family, asked
):
    run = trained_run(make_base(family), **NF4)
    verdict = merge(run, tmp_path / "out", **asked).verdict
    examples, policy = heldout_examples(run), trained_policy(run)
    trained, trained_all = scores(policy.model, examples)
    with policy.model.disable_adapter():
        reference, _ = scores(policy.model, examples)
    merged, merged_all = scores(load_plain(tmp_path / "out"), examples)
    margins = {name: value[::2] - value[1::2] for name, value in
               {"reference": reference, "trained": trained, "merged": merged}.items()}  # fmt: skip
    errors = (margins["merged"] - margins["trained"]).abs()
    kl = (trained_all.exp() * (trained_all - merged_all)).sum(1)
    assert verdict.pairs == len(examples) == 4
    assert verdict.tokens == sum(len(branch) for example in examples for branch in example.branches)
    assert verdict.learned == pytest.approx((margins["trained"] - margins["reference"]).abs().mean().item(), rel=1e-4)
    assert verdict.margin_error == pytest.approx(errors.mean().item(), rel=0.02, abs=1e-4)
    assert verdict.largest_margin_error == pytest.approx(errors.max().item(), rel=0.02, abs=1e-4)
    assert verdict.worst == f"heldout.jsonl:{examples[int(errors.argmax())].source.line}"
    assert verdict.logprob_error == pytest.approx((merged - trained).abs().mean().item(), rel=0.02, abs=1e-4)
    assert verdict.kl == pytest.approx(kl.mean().item(), rel=0.05, abs=1e-7)
    assert verdict.largest_kl == pytest.approx(kl.max().item(), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
def test_a_float32_merge_is_the_trained_policy(trained_run, make_base, tmp_path, family, dtype):
    run = trained_run(make_base(family), **NF4, **{"model.dtype": dtype})
    verdict = merge(run, tmp_path / "out", "float32").verdict
    assert verdict.learned > 1
    assert verdict.logprob_error < 1e-3
    assert verdict.kl < 1e-9


def test_auto_takes_bf16_where_it_passes(trained_run, tmp_path):
    result = merge(trained_run(), tmp_path / "out")
    assert (result.dtype, result.tried) == ("bf16", {})
    assert result.verdict.passed


def test_auto_leaves_untried_what_surely_fails_and_says_so(trained_run, make_base, tmp_path):
    run = trained_run(make_base(dtype=torch.bfloat16), **{"train.learning_rate": 1e-4, "model.dtype": "bf16"})
    result = merge(run, tmp_path / "out", tolerance=Tolerance(nats=1e-4))
    assert result.kept["bf16"] < 0.99
    assert result.dtype in ("fp16", "float32")
    assert result.notes[0].startswith("bf16 not tried: it keeps ")
    assert result.verdict.passed


def test_auto_tries_the_next_dtype_where_the_verdict_fails(trained_run, make_base, tmp_path):
    run = trained_run(make_base(), **NF4)
    error = merge(run, tmp_path / "bf16", "bf16").verdict.margin_error
    result = merge(run, tmp_path / "out", tolerance=Tolerance(nats=error / 2))
    assert result.tried["bf16"].margin_error == error
    assert not result.tried["bf16"].passed
    assert result.dtype in ("fp16", "float32")
    assert result.verdict.passed
    stored = {str(tensor.dtype) for tensor in load_file(tmp_path / "out/model.safetensors").values()}
    assert stored == {{"fp16": "torch.float16", "float32": "torch.float32"}[result.dtype]}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == stored.pop().removeprefix("torch.")


def test_a_type_named_by_hand_is_obeyed_with_its_figure(trained_run, make_base, tmp_path):
    run = trained_run(make_base(), **NF4)
    result = merge(run, tmp_path / "out", "bf16", tolerance=Tolerance(nats=1e-9))
    assert (result.dtype, result.verdict.passed) == ("bf16", False)
    said = json.loads((tmp_path / "out/merge.json").read_text())["verdict"]
    assert said["margin_error"] == result.verdict.margin_error > 0
    assert said["passed"] is False
    assert "**not passed**" in (tmp_path / "out/README.md").read_text()


def test_nothing_but_the_trained_weights_gives_the_trained_margins(trained_run, make_base, tmp_path):
    result = merge(trained_run(make_base(), **NF4), tmp_path / "out", "float32", onto="original")
    assert result.onto_trained.margin_error < 1e-5
    assert result.verdict.margin_error > 100 * result.onto_trained.margin_error
    assert result.verdict.learned == result.onto_trained.learned


def test_a_merge_onto_the_original_adds_the_delta_to_its_own_bytes(trained_run, make_base, tmp_path):
    run, base = trained_run(make_base(), **NF4), load_file(make_base() / "model.safetensors")
    merge(run, tmp_path / "out", "float32", onto="original")
    merged, delta = load_file(tmp_path / "out/model.safetensors"), read_run(run).delta
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        wanted = weight + delta.of(module) if module in delta.matrices else weight
        assert torch.equal(merged[name], wanted), name


def test_a_quantized_merge_loads_in_4_bit_and_reports_its_error(trained_run, make_base, tmp_path):
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    run = trained_run(make_base(), **NF4)
    result = merge(run, tmp_path / "out", quantize="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert packed == read_run(run).base.quantized
    assert result.verdict.margin_error > 10 * merge(run, tmp_path / "plain", "float32").verdict.margin_error
    assert result.kept["nf4"] < 1
    merged, _ = scores(model, heldout_examples(run))
    trained, _ = scores(trained_policy(run).model, heldout_examples(run))
    assert result.verdict.logprob_error == pytest.approx((merged - trained).abs().mean().item(), rel=0.02)


def _large_activations(make_base, tmp_path, factor):
    base = tmp_path / "loud"
    shutil.copytree(make_base(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= factor
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def test_auto_leaves_float16_where_activations_come_near_the_end_of_its_range(trained_run, make_base, tmp_path, said):
    quiet = trained_run(_large_activations(make_base, tmp_path, 1.0))
    result = merge(quiet, tmp_path / "quiet", tolerance=Tolerance(nats=1e-9))
    assert not any("activation" in note for note in result.notes)
    (tmp_path / "loud").rename(tmp_path / "before")
    loud = trained_run(_large_activations(make_base, tmp_path, 7e5), **{"train.seed": 1})
    result = merge(loud, tmp_path / "out", tolerance=Tolerance(nats=1e-9))
    assert result.dtype == "float32"
    assert any(note.startswith("fp16 left out: an activation reaches ") for note in result.notes)
    said.clear()
    assert merge(loud, tmp_path / "named", "fp16").dtype == "fp16"
    assert said[0].startswith("fp16 was requested, but an activation reaches ")


def test_the_margins_of_single_completions_are_those_of_their_pairs(make_recipe, tmp_path):
    recipe = make_recipe({"loss.name": "kto", "loss.beta": 0.1, "train.learning_rate": 0.02})
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    verdict = merge(run, tmp_path / "out", "bf16").verdict
    assert (verdict.pairs, verdict.origin) == (4, "held-out pairs")


def test_completions_without_a_partner_are_judged_one_by_one(make_recipe, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if place % 2 else "rejected"], "label": bool(place % 2)}
        for place, row in enumerate(preference_rows(16))
    ]
    parts = {"train": rows[:12], "heldout": rows[12:]}
    recipe = make_recipe({"loss.name": "kto", "loss.beta": 0.1, "train.learning_rate": 0.02})
    recipe["data"] |= {name: str(write_jsonl(tmp_path / f"single-{name}.jsonl", part)) for name, part in parts.items()}
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    result = merge(run, tmp_path / "out", "bf16")
    assert (result.verdict.pairs, result.verdict.origin) == (4, "held-out completions")
    opened = read_run(run)
    replayed = choose_pairs(opened.plan, opened.base_folder, opened.tokenizer, 64)
    assert [contrast.sign for contrast in replayed.contrasts] == [(-1,), (1,), (-1,), (1,)]


def test_a_run_without_held_out_pairs_is_judged_on_training_pairs_and_says_so(make_recipe, tmp_path):
    recipe = make_recipe({"train.learning_rate": 0.02})
    del recipe["data"]["heldout"]
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    verdict = merge(run, tmp_path / "out", "bf16").verdict
    assert (verdict.pairs, verdict.origin) == (12, "training pairs")


@pytest.mark.parametrize("split", ["heldout", "train"])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_data_that_have_changed_since_training_are_said_and_recorded(make_recipe, tmp_path, said, split, loss):
    """All but held-out completions, whose partners are of all the data."""
    recipe = make_recipe({"loss.name": loss, "train.learning_rate": 0.02})
    if split == "train":
        del recipe["data"]["heldout"]
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    knows = None if (loss, split) == ("kto", "heldout") else False
    said.clear()
    assert merge(run, tmp_path / "same", "bf16").verdict.data_changed is knows
    assert not said
    path = Path(recipe["data"][split])
    path.write_text(path.read_text().replace("comes after", "follows"))
    merge(run, tmp_path / "other", "bf16")
    record = json.loads((tmp_path / "other/merge.json").read_text())
    assert record["verdict"]["data_changed"] is (None if knows is None else True)
    card = (tmp_path / "other/README.md").read_text()
    assert ("Their data have changed since training." in card) is (knows is not None)
    assert [line for line in said if "data have changed since training" in line] == [
        f"the {'held-out' if split == 'heldout' else 'training'} data have changed since training; the verdict "
        "uses the changed data"
    ] * (knows is not None)


@pytest.mark.parametrize(("limit", "lines"), [(64, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 2, 3]), (1, [1])])
def test_the_pairs_that_are_replayed_are_spread_over_the_file(trained_run, limit, lines):
    run = read_run(trained_run())
    replayed = choose_pairs(run.plan, run.base_folder, run.tokenizer, limit)
    assert [int(contrast.location.rpartition(":")[2]) for contrast in replayed.contrasts] == lines


def _session(run, tmp_path, **asked) -> Session:
    request = MergeRequest(run=run, out=tmp_path / "out", **asked)
    opened = read_run(run)
    return Session(opened, request, _survey(opened, request))


def test_the_model_before_training_fails_by_all_that_was_learned(trained_run, make_base, tmp_path):
    session = _session(trained_run(make_base(), **NF4), tmp_path)
    verdict = session.judge.judge(session.replay(session.as_trained))
    assert verdict.margin_error == verdict.learned > 1
    assert not verdict.passed
    before, after = session.judge.before, session.judge.after
    assert {flip.location for flip in verdict.flips} == {
        contrast.location
        for contrast, old, new in zip(session.replayed.contrasts, before, after, strict=True)
        if (old > 0) != (new > 0)
    }
    assert all(abs(one.trained) >= abs(two.trained) for one, two in pairwise(verdict.flips))


def test_a_margin_that_is_not_a_number_does_not_pass(trained_run, tmp_path):
    session = _session(trained_run(), tmp_path)
    trained = session.judge.trained
    broken = replay.Hidden(trained.states * torch.nan, trained.head, trained.head_rows, 0.0)
    assert not session.judge.judge(broken).passed


def test_batches_and_tiles_change_nothing(trained_run, make_base, tmp_path, monkeypatch):
    def verdict_on_the_reference():
        session = _session(trained_run(make_base(), **NF4), tmp_path)
        return session.judge.judge(session.replay(session.as_trained))

    whole = verdict_on_the_reference()
    monkeypatch.setattr(replay, "BATCH_TOKENS", 1)
    monkeypatch.setattr(replay, "TILE_WIDTH", 7)
    monkeypatch.setattr(verdict_module, "TILE_POSITIONS", 5)
    monkeypatch.setattr(compared_models, "CACHED_BYTES", 0)
    single = verdict_on_the_reference()
    for name in ("learned", "margin_error", "largest_margin_error", "logprob_error", "kl", "largest_kl"):
        assert getattr(single, name) == pytest.approx(getattr(whole, name), rel=1e-3), name


def test_one_layer_is_in_float32_at_a_time_and_the_stored_weights_are_restored(make_base):
    model = compared_models.load_causal_lm(make_base(dtype=torch.bfloat16), torch.bfloat16)
    before = dict(model.named_parameters())
    seen = []

    def to_float32(name, stored, rows=slice(None)):
        others = {layer for layer in (0, 1) for part in model.model.layers[layer].parameters()
                  if part.dtype == torch.float32}  # fmt: skip
        seen.append((name, others))
        return stored[rows].float()

    rows = [replay.ScoredRow((1, 2, 3), (4, 5)), replay.ScoredRow((1, 2), (9,))]
    replay.replay(model, rows, to_float32, torch.device("cpu"))
    assert all(others <= {int(name.split(".")[2])} for name, others in seen if ".layers." in name)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(part is before[name] for name, part in after.items())
    assert not model.model.embed_tokens._forward_pre_hooks


def test_a_base_in_a_different_dtype_than_the_run_is_loaded_as_its_files_have_it(trained_run, make_base, tmp_path):
    run = trained_run(make_base(dtype=torch.float16), **NF4, **{"model.dtype": "bf16"})
    model = compared_models.load_base(read_run(run).base)
    assert {value.dtype for value in model.parameters()} == {torch.float16}
    assert merge(run, tmp_path / "out", "float32").verdict.logprob_error < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_few_float32_tensors_convert_no_other_and_lose_nothing(trained_run, make_base, tmp_path, family):
    base = tmp_path / "mixed"
    shutil.copytree(make_base(family, dtype=torch.bfloat16), base)
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"):
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
        tensors[name] = tensors[name].float() * (1 + noise / 50)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = trained_run(base, **NF4)
    model = compared_models.load_base(read_run(run).base)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert merge(run, tmp_path / "out", "float32").verdict.logprob_error < 1e-3


def test_no_dequantized_weight_is_kept_while_shards_are_written(trained_run, make_base, tmp_path, monkeypatch):
    session = _session(trained_run(make_base(), **NF4), tmp_path, dtype="bf16")
    assert session.as_trained.dequantized
    write, kept = merge_module.write_weights, []

    def watched(weights, folder):
        kept.append(len(session.as_trained.dequantized))
        write(weights, folder)

    monkeypatch.setattr(merge_module, "write_weights", watched)
    (tmp_path / "out").mkdir()
    session.write(tmp_path / "out")
    assert kept == [0]


def test_what_4_bits_keep_is_summed_in_slices(trained_run, make_base, tmp_path, monkeypatch):
    run = read_run(trained_run(make_base(), **NF4))
    request = MergeRequest(run=run.folder.path, out=tmp_path / "out", quantize="nf4")
    whole = _survey(run, request).kept["nf4"]
    sizes, of = [], LoraDelta.of

    def watched(delta, module, rows=slice(None)):
        sizes.append(of(delta, module, rows).numel())
        return of(delta, module, rows)

    monkeypatch.setattr(LoraDelta, "of", watched)
    monkeypatch.setattr(rounding, "BLOCK_ELEMENTS", 512)
    assert _survey(run, request).kept["nf4"] == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == 512


def test_the_reference_of_a_run_that_started_from_an_adapter_is_that_adapter(make_recipe, trained_run, tmp_path):
    start = trained_run() / "adapter"
    recipe = make_recipe({"adapter": 0})
    recipe["adapter"] = {"start": str(start)}
    recipe["train"]["learning_rate"] = 1e-3
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    short = merge(run, tmp_path / "out", "float32").verdict
    assert 0 < short.learned < merge(trained_run(), tmp_path / "first", "float32").verdict.learned / 2


def test_a_start_adapter_that_has_changed_is_refused(make_recipe, make_base, trained_run, tmp_path):
    first, _ = moved(trained_run(), make_base(), tmp_path)
    recipe = make_recipe()
    recipe["adapter"] = {"start": str(first / "adapter")}
    run = train_plan(make_plan(recipe, output=tmp_path / "second"))
    tensors = load_file(first / "adapter/adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, first / "adapter/adapter_model.safetensors")
    with pytest.raises(MergeError, match="not the adapter that the run started from"):
        merge(run, tmp_path / "merged/out")
    assert not (tmp_path / "merged").exists()


def test_the_tolerance_is_a_share_with_a_floor_or_nats():
    assert Tolerance().in_nats(10.0) == pytest.approx(0.2)
    assert Tolerance().in_nats(1.0) == 0.05
    assert Tolerance.parse("5%").in_nats(10.0) == pytest.approx(0.5)
    assert Tolerance.parse("0.01").in_nats(10.0) == 0.01

"""The checks of a run's first batch: what they compare holds to the bit, and each refuses what it is for."""

from __future__ import annotations

import json
import math
import types
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_example, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel
from transformers import AutoModelForCausalLM

import qpref
from qpref.data.load import load_rows
from qpref.data.order import step_order
from qpref.data.pack import pack
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError, PluginError, PolicyError
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.reference import ReferenceStore
from qpref.recipe.choices import Choice
from qpref.recipe.resolve import make_plan
from qpref.records import LossOutput, Source, TokenizedExample
from qpref.training import invariants, optim
from qpref.training import prepare as prepare_module
from qpref.training.gradient_check import check_gradients
from qpref.training.loss_caller import LossCaller
from qpref.training.objective import Objective
from qpref.training.prepare import Prepared
from qpref.training.prepare import prepare as prepare_plan

FLOAT32 = {"model.quantization": "none", "model.dtype": "float32"}
NF4 = {"model.quantization": "nf4", "model.dtype": "bf16"}
LN2_FLOAT32 = 0.6931471824645996
"""The float32 nearest to the natural logarithm of 2."""


@pytest.fixture
def prepare(make_recipe, tmp_path: Path) -> Callable[..., Prepared]:
    """`prepare({"loss.name": "ipo"})`: a run up to the point where training would start."""

    def make(changes: dict[str, object] | None = None) -> Prepared:
        plan = make_plan(make_recipe(changes), (), tmp_path / "run")
        return prepare_plan(plan, load_rows(plan))

    return make


def first_training_row(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["split"] == "train")


def first_losses(prepared: Prepared) -> list[float]:
    """Each pair's loss in the first training step, as the loop computes it."""
    train = prepared.plan.recipe.train
    optim.seed_step(train.seed, 0)
    prepared.policy.model.train()
    places = step_order(len(prepared.examples), train.batch_size, train.seed, 0)
    batch = pack([prepared.examples[place] for place in places], prepared.policy.device)
    reference = ReferenceStore().logprobs(prepared.policy, batch)
    inputs = prepared.objective.inputs(batch, prepared.objective.score(prepared.policy, batch), reference)
    return prepared.objective(inputs).losses.tolist()


# S1: policy and reference are the same before the first step.


@pytest.mark.parametrize("model", [FLOAT32, NF4], ids=["float32", "nf4"])
def test_first_training_row_of_dpo_is_exactly_ln_2(make_recipe, tmp_path, model):
    qpref.train(make_recipe(model | {"adapter.dropout": 0.1, "train.max_steps": 1}), output=tmp_path / "run")
    assert first_training_row(tmp_path / "run")["loss"] == LN2_FLOAT32


@pytest.mark.parametrize("model", [FLOAT32, NF4], ids=["float32", "nf4"])
def test_first_training_row_of_ipo_is_exactly_the_square_of_1_over_2_beta(make_recipe, tmp_path, model):
    recipe = make_recipe(model | {"loss.name": "ipo", "loss.beta": 0.25, "train.max_steps": 1})
    qpref.train(recipe, output=tmp_path / "run")
    assert first_training_row(tmp_path / "run")["loss"] == 4.0  # (1 / (2 * 0.25))^2


@pytest.mark.parametrize("model", [FLOAT32, NF4], ids=["float32", "nf4"])
def test_every_pair_of_the_first_step_starts_at_ln_2(prepare, model):
    losses = first_losses(prepare(model | {"train.batch_size": 12, "train.tokens_per_microbatch": 5000}))
    assert losses == [LN2_FLOAT32] * 12


def test_every_pair_starts_at_ln_2_where_prompts_are_not_shared(prepare):
    prepared = prepare(NF4 | {"train.batch_size": 12})
    prepared.policy.share_prompts(False)
    assert first_losses(prepared) == [LN2_FLOAT32] * 12


def test_start_adapter_is_its_own_reference(make_base, make_recipe, tmp_path):
    # C22: from a trained adapter the run starts at ln 2 too, since a frozen copy of it is the reference.
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(make_base()), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "start")
    qpref.train(make_recipe({"adapter.start": str(tmp_path / "start"), "train.max_steps": 1}), output=tmp_path / "run")
    assert first_training_row(tmp_path / "run")["loss"] == LN2_FLOAT32


def test_check_start_refuses_an_adapter_that_is_not_fresh(prepare):
    prepared = prepare()
    batch = invariants.first_batch(prepared.examples, prepared.policy)
    for name, parameter in prepared.policy.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with pytest.raises(PolicyError, match=r"policy and reference differ by \d+\.\d+ nats on a token"):
        invariants.check_start(prepared.policy, prepared.objective, batch)


def test_check_start_refuses_one_element_of_one_adapter(prepare):
    prepared = prepare()
    batch = invariants.first_batch(prepared.examples, prepared.policy)
    last = [value for name, value in prepared.policy.trained_parameters().items() if "lora_B" in name][-1]
    with torch.no_grad():
        last[0, 0] = 1.0
    with pytest.raises(PolicyError, match="policy and reference differ"):
        invariants.check_start(prepared.policy, prepared.objective, batch)


def changed(loss: Objective, function: Callable[..., LossOutput] | None = None, **record: object) -> Objective:
    """The objective with another loss function, or with other fields in its loss's record."""
    (caller,) = loss.callers
    plugin = replace(caller.choice.plugin, record=replace(caller.choice.plugin.record, **record))
    return replace(loss, callers=(LossCaller(Choice(plugin, caller.choice.options), function or caller.function),))


def check_start_of(prepared: Prepared, loss: Objective) -> None:
    invariants.check_start(prepared.policy, loss, invariants.first_batch(prepared.examples, prepared.policy))


def test_check_start_refuses_a_loss_that_starts_elsewhere_than_it_says(prepare):
    prepared = prepare()
    with pytest.raises(PolicyError, match=r"an example's loss is 0\.693147; qpref 0\.1\.0 \[loss-dpo\] says 0\.500000"):
        check_start_of(prepared, changed(prepared.objective, starts_at=lambda options: 0.5))


def test_check_start_lets_a_loss_pass_that_names_no_start(prepare):
    prepared = prepare()
    check_start_of(prepared, changed(prepared.objective, starts_at=None))
    check_start_of(prepared, changed(prepared.objective, starts_at=lambda options: None))


def test_check_start_names_the_loss_whose_starts_at_raises(prepare):
    prepared = prepare()
    with pytest.raises(PluginError, match=r"loss 'dpo' \(qpref 0\.1\.0 \[loss-dpo\]\) starts_at raised ZeroDivision"):
        check_start_of(prepared, changed(prepared.objective, starts_at=lambda options: 1 / 0))


@pytest.mark.parametrize("place", [0, 1])
def test_check_start_refuses_a_pair_whose_loss_is_not_a_number(prepare, place):
    prepared = prepare()

    def holed(inputs):
        losses = prepared.objective.callers[0].function(inputs).losses.clone()
        losses[place] = math.nan
        return LossOutput(losses=losses, metrics={})

    with pytest.raises(PolicyError, match="an example's loss is nan"):
        check_start_of(prepared, changed(prepared.objective, holed))


def test_the_start_check_recomputes_what_training_recomputes(prepare):
    # Else it would keep more activations than any step of the run, and fail where training fits.
    prepared = prepare()
    batch = invariants.first_batch(prepared.examples, prepared.policy)

    def kept(num_layers: int) -> int:
        sizes = []
        prepared.policy.recompute_layers(num_layers)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: sizes.append(each.numel()) or each, lambda each: each
        ):
            invariants.check_start(prepared.policy, prepared.objective, batch)
        return sum(sizes)

    assert 0 < kept(2) < 0.5 * kept(0)


def test_start_is_checked_without_the_rows_margin(make_recipe, tmp_path):
    # With a margin m a pair starts at log(1 + exp(m)), which is no constant; the check leaves it out.
    recipe = make_recipe({"train.max_steps": 1})
    lines = [json.loads(line) | {"margin": 0.5} for line in Path(recipe["data"]["train"]).read_text().splitlines()]
    Path(recipe["data"]["train"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    qpref.train(recipe, output=tmp_path / "run")
    assert first_training_row(tmp_path / "run")["loss"] == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-6)


def test_repacked_weights_are_refused(prepare):
    # C31: bitsandbytes marks a weight that it has repacked for AVX512-BF16, whose product has no gradient.
    prepared = prepare(NF4)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    prepared.policy.model.get_submodule(name).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(PolicyError, match=f"repacked the weights of {name}"):
        check_start_of(prepared, prepared.objective)


# S2: every adapted layer gets a gradient.


def backward(prepared: Prepared) -> None:
    batch = invariants.first_batch(prepared.examples, prepared.policy)
    completion_logprobs(prepared.policy, batch).values.sum().backward()


def test_check_gradients_passes_after_a_backward_pass(prepare):
    prepared = prepare(NF4)
    backward(prepared)
    check_gradients(prepared.policy, prepared.examples[0])


@pytest.mark.parametrize("gradient", ["none", "zero"])
def test_check_gradients_names_the_layer_that_got_none(prepare, gradient):
    prepared = prepare()
    backward(prepared)
    name = "model.layers.1.self_attn.v_proj"
    parameter = prepared.policy.trained_parameters()[f"base_model.model.{name}.lora_B.default.weight"]
    parameter.grad = None if gradient == "none" else torch.zeros_like(parameter)
    with pytest.raises(PolicyError, match=f"1 of 14 adapted layers get no gradient, the first is {name}"):
        check_gradients(prepared.policy, prepared.examples[0])


def test_run_stops_at_its_first_step_when_a_layer_gets_no_gradient(make_recipe, tmp_path, monkeypatch):
    real = prepare_module.load_policy

    def with_a_cut(*arguments, **options):
        policy = real(*arguments, **options)
        layer = policy.decoder.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: output.detach())
        return policy

    monkeypatch.setattr(prepare_module, "load_policy", with_a_cut)
    with pytest.raises(PolicyError, match=r"adapted layers get no gradient, the first is .*layers\.0\.mlp"):
        qpref.train(make_recipe(), output=tmp_path / "run")


def test_a_layer_on_which_the_base_does_not_depend_is_said_and_left(make_recipe, tmp_path, said):
    # Gemma 3n's per-layer inputs are multiplied by a scale that is 0 in a fresh model.
    TinyModel(model_type="gemma3n_text").write(tmp_path / "base")
    changes = {"model.base": str(tmp_path / "base"), "train.max_steps": 1}
    qpref.train(make_recipe(changes), output=tmp_path / "run")
    assert "of 31 adapted layers learn nothing, as this base's logits don't depend on them; the first is" in "".join(
        said
    )


def test_layers_that_the_base_runs_without_gradient_are_said_and_left(make_recipe, tmp_path, said):
    # An indexer only chooses the positions that attention reads.
    TinyModel(model_type="deepseek_v32", config={"num_key_value_heads": 4}).write(tmp_path / "base")
    changes = {"model.base": str(tmp_path / "base"), "train.max_steps": 1}
    qpref.train(make_recipe(changes), output=tmp_path / "run")
    assert (
        "learn nothing, as this base's logits don't depend on them; the first is model.layers.0.self_attn.indexer"
        in ("".join(said))
    )


# A model that can't be trained is refused in one sentence.


def test_weights_that_are_not_finite_are_said(prepare, tmp_path):
    TinyModel(model_type="llama").write(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="log-probabilities aren't finite"):
        prepare({"model.base": str(tmp_path / "base")})


def test_a_head_that_does_not_read_the_decoder_is_refused(prepare, tmp_path):
    TinyModel(model_type="electra").write(tmp_path / "base")
    with pytest.raises(PolicyError, match="have 64 numbers and the output head reads 128"):
        prepare({"model.base": str(tmp_path / "base")})


def test_a_token_without_an_embedding_is_refused_with_both_numbers(prepare, tmp_path):
    TinyModel(model_type="llama", config={"vocab_size": 257}).write(tmp_path / "base")
    with pytest.raises(PolicyError, match=r"train.jsonl:1: token id 258 is beyond .* its embedding has 257 rows"):
        prepare({"model.base": str(tmp_path / "base")})


def test_an_encoder_is_refused_for_what_it_sees(prepare, tmp_path):
    TinyModel(model_type="roberta").write(tmp_path / "base")
    with pytest.raises(PolicyError, match="this roberta model sees later tokens when it predicts one"):
        prepare({"model.base": str(tmp_path / "base")})


def test_an_error_inside_the_model_names_the_layer(prepare, monkeypatch):
    def fail(*arguments: object, **keywords: object) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
    with pytest.raises(PolicyError, match=r"fails in model.layers.0.mlp \(LlamaMLP\): IndexError: tuple index"):
        prepare()


# S4: the first row is what a template should make.


def example_of(prompt: list[int], *branches: list[int], truncated: bool = False) -> TokenizedExample:
    return TokenizedExample(
        prompt=array("i", prompt),
        branches=tuple(array("i", branch) for branch in branches),
        truncated=(truncated,) * len(branches),
        weight=1.0,
        margin=0.0,
        source=Source(path="pairs.jsonl", line=1),
    )


@pytest.fixture(scope="module")
def pairs() -> PairTokenizer:
    """bos is <|im_start|>, 257; eos is <|im_end|>, 258, the only stop token."""
    return PairTokenizer.of(make_tokenizer(), "chat", ())


def test_special_tokens_are_what_these_tests_take_them_for(pairs):
    assert (pairs.tokenizer.bos_token_id, pairs.stop_tokens) == (257, (258,))


def test_first_row_with_one_bos_and_stop_tokens_passes(pairs):
    invariants.check_first_row(pairs, example_of([257, 5, 6], [7, 258], [8, 258]))


def test_prompt_of_bos_alone_passes(pairs):
    invariants.check_first_row(pairs, example_of([257], [7, 258], [8, 258]))


def test_double_bos_is_refused(pairs):
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the prompt starts with BOS twice"):
        invariants.check_first_row(pairs, example_of([257, 257, 5], [7, 258], [8, 258]))


@pytest.mark.parametrize("branches", [([7], [8, 258]), ([7, 258], [8])], ids=["chosen", "rejected"])
def test_response_without_a_stop_token_is_refused(pairs, branches):
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: a response doesn't end in a stop token"):
        invariants.check_first_row(pairs, example_of([257, 5], *branches))


def test_response_that_was_truncated_needs_no_stop_token(pairs):
    invariants.check_first_row(pairs, example_of([257, 5], [7], [8], truncated=True))


def test_run_refuses_a_template_that_doubles_bos(make_recipe, tmp_path):
    doubling = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    make_tokenizer(doubling).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="BOS twice"):
        qpref.train(make_recipe({"model.tokenizer": str(tmp_path / "tokenizer")}), output=tmp_path / "run")


# The layout: packed log-probabilities are those of the model's own logits.


def test_check_layout_passes_and_keeps_prompts_shared(prepare):
    prepared = prepare()
    invariants.check_layout(prepared.policy, prepared.examples[0])
    assert prepared.policy.shares_prompts


def test_check_layout_refuses_a_model_that_changes_its_logits(prepare):
    prepared = prepare()
    head = prepared.policy.model.get_output_embeddings()
    real = head.forward
    head.forward = types.MethodType(lambda module, hidden: real(hidden) * 1.25, head)
    with pytest.raises(PolicyError, match=r"log-probabilities differ from the model's own logits: a token's is 0\.\d+"):
        invariants.check_layout(prepared.policy, prepared.examples[0])


@pytest.mark.parametrize("change", [{"scale": 1.25}, {"softcap": 0.2}], ids=["scale", "softcap"])
def test_check_layout_refuses_a_head_that_the_model_does_not_have(prepare, change):
    prepared = prepare()
    prepared.policy.head = replace(prepared.policy.head, **change)
    with pytest.raises(PolicyError, match="log-probabilities differ from the model's own logits"):
        invariants.check_layout(prepared.policy, prepared.examples[0])


def test_check_layout_refuses_a_scaled_bf16_head(prepare):
    prepared = prepare(NF4)
    prepared.policy.head = replace(prepared.policy.head, scale=3.0)
    with pytest.raises(PolicyError, match=r"they are 0\.\d+ nats a token off on average"):
        invariants.check_layout(prepared.policy, prepared.examples[0])


def test_check_layout_leaves_the_mode_as_it_was(prepare):
    prepared = prepare()
    prepared.policy.model.train()
    invariants.check_layout(prepared.policy, prepared.examples[0])
    assert prepared.policy.model.training


# Checks that run out of memory.


def limit_tokens(prepared: Prepared, most: int) -> list[int]:
    """Let passes of more tokens run out of memory, and list the tokens of all passes."""
    passes: list[int] = []

    def check(decoder: object, call: object, named: dict[str, torch.Tensor]) -> None:
        passes.append(named["input_ids"].numel())
        if passes[-1] > most:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    prepared.policy.decoder.register_forward_pre_hook(check, with_kwargs=True)
    return passes


def test_the_layout_check_takes_a_shorter_pair_where_memory_runs_out(prepare, said):
    prepared = prepare()
    path = prepared.policy.attention
    example = make_example(1, 200, 90, 60)
    passes = limit_tokens(prepared, 200)
    invariants.check_layout(prepared.policy, example)
    assert prepared.policy.attention == path
    assert passes[0] > 200
    assert max(passes[2:]) <= 200
    assert len(said) == 2  # halved twice
    assert all(line.startswith("out of memory: a check before training is repeated on ") for line in said)


def test_a_fault_is_still_found_on_a_shorter_pair(prepare, monkeypatch):
    prepared, real = prepare(), invariants.completion_logprobs

    def wrong(policy, batch):
        return replace(found := real(policy, batch), values=found.values + 1.0)

    monkeypatch.setattr(invariants, "completion_logprobs", wrong)
    limit_tokens(prepared, 200)
    with pytest.raises(PolicyError, match="differ from the model's own logits"):
        invariants.check_layout(prepared.policy, make_example(1, 200, 90, 60))


def test_the_start_check_takes_fewer_examples_where_memory_runs_out(prepare, said):
    prepared = prepare()
    batch = pack([make_example(1, 40, 20, 20), make_example(2, 41, 20, 20)], prepared.policy.device)
    passes = limit_tokens(prepared, 100)
    invariants.check_start(prepared.policy, prepared.objective, batch)
    assert passes == [157, 78, 78]
    assert len(said) == 1


def test_checks_that_no_memory_suffices_for_end_with_exit_code_5(prepare):
    prepared = prepare()
    limit_tokens(prepared, 10)
    with pytest.raises(DeviceMemoryError, match="on a few tokens") as caught:
        invariants.check_layout(prepared.policy, prepared.examples[0])
    assert caught.value.exit_code == 5


# An example's company.


def of_pass_size(module: torch.nn.Module, call: object, output: torch.Tensor) -> torch.Tensor:
    """A fault: what is computed together changes what comes out."""
    return output * (1 + output.shape[:-1].numel() / 1000)


def test_a_model_whose_scores_depend_on_their_company_computes_each_response_alone(prepare, caplog):
    prepared = prepare()
    policy, examples = prepared.policy, prepared.examples
    policy.decoder.norm.register_forward_hook(of_pass_size)
    with caplog.at_level("WARNING", logger="qpref"):
        invariants.check_company(policy, examples)
    assert "depend on what is computed beside it" in caplog.text
    alone = completion_logprobs(policy, pack(examples[1:2], policy.device)).values
    beside = completion_logprobs(policy, pack(examples[:4], policy.device))
    lengths = list(beside.lengths)
    assert torch.equal(torch.cat(beside.values.split(lengths)[2:4]), alone)


def test_a_model_without_that_fault_computes_them_together(prepare, caplog):
    prepared = prepare(NF4)
    path = prepared.policy.attention
    caplog.clear()
    with caplog.at_level("WARNING", logger="qpref"):
        invariants.check_company(prepared.policy, prepared.examples)
    assert (prepared.policy.attention, prepared.policy.isolates_rows, caplog.text) == (path, False, "")


def test_a_model_whose_scores_depend_on_earlier_passes_is_refused(prepare):
    prepared = prepare()
    passes: list[None] = []

    def of_earlier(module: torch.nn.Module, call: object, output: torch.Tensor) -> torch.Tensor:
        passes.append(None)
        return output * (1 + len(passes) / 20)

    prepared.policy.decoder.norm.register_forward_hook(of_earlier)
    with pytest.raises(PolicyError, match="depend on the passes before it"):
        invariants.check_company(prepared.policy, prepared.examples)


def test_every_run_checks_its_company(prepare, monkeypatch):
    checked: list[int] = []
    monkeypatch.setattr(invariants, "check_company", lambda policy, examples: checked.append(len(examples)))
    prepared = prepare()
    assert checked == [len(prepared.all_examples)]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_row_beyond_the_learned_positions_is_refused_with_both_numbers(prepare, tmp_path, family):
    TinyModel(model_type=family, config={"max_position_embeddings": 16}).write(tmp_path / "base")
    with pytest.raises(PolicyError, match=r"train.jsonl:1: a row of \d+ tokens, and the base has learned 16 positions"):
        prepare({"model.base": str(tmp_path / "base")})


def test_a_base_without_a_tokenizer_is_refused_for_that(prepare, tmp_path):
    TinyModel(model_type="llama").write(tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(PolicyError, match="tokenizer"):
        prepare({"model.base": str(tmp_path / "base")})


def test_a_config_with_an_unknown_dtype_is_refused(prepare, tmp_path):
    TinyModel(model_type="llama", written={"dtype": "bogus"}).write(tmp_path / "base")
    with pytest.raises(PolicyError, match="bogus"):
        prepare({"model.base": str(tmp_path / "base")})


def test_a_layer_that_reads_a_four_bit_weight_itself_is_refused_with_a_remedy(prepare, tmp_path):
    TinyModel(model_type="mamba").write(tmp_path / "base")
    with pytest.raises(PolicyError, match=r"mixer \(MambaMixer\)") as refused:
        prepare({"model.base": str(tmp_path / "base"), **NF4})
    assert 'quantization = "none"' in str(refused.value)

"""The fused layer is PEFT's layer: the same values and gradients, less kept, and nothing of it in what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import load_worn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qpref.dropout import Draws, TokenDropout, drawing, step_key
from qpref.policy.load import load_policy
from qpref.policy.lora import CUSTOM_MODULES, FusedLinear, FusedLinear4bit, Projected, decoding, projections_of
from qpref.policy.policy import Policy
from qpref.policy.projections import Projections
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe

IN, OUT, RANK, ALPHA = 64, 48, 4, 6
SCALE = {False: ALPHA / RANK, True: ALPHA / RANK**0.5}
"""By rslora (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA")."""


class Net(nn.Module):
    """One linear layer, named as PEFT wants it named."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        return self.layer(x, **keywords)


def base_layer(kind: str, dtype: torch.dtype, bias: bool = True) -> nn.Module:
    """A random layer, the same for the same arguments."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, bias=bias)
    if kind == "dense":
        return dense.to(dtype)
    layer = Linear4bit(IN, OUT, bias=bias, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def adapted(layer: nn.Module, fused: bool, names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """A PeftModel around a copy of `layer`, with adapters that aren't fresh; the same ones for either kind."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], **settings)
    if fused:
        config._register_custom_module(CUSTOM_MODULES)
    model = get_peft_model(Net(copy.deepcopy(layer)), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.requires_grad_(True)
    return model


def weights(model: Any, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    layer = model.base_model.model.layer
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def contiguous(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: contiguous(24),
    "batch": lambda: contiguous(2, 12),
    "one row": lambda: contiguous(1),
    "transposed": lambda: contiguous(12, 2).transpose(0, 1),
    "every second column": lambda: contiguous(2, 12).repeat_interleave(2, dim=-1)[..., ::2],
}


def outcome(model: Any, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The layer's value, and the gradients of a random direction of it."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(direction)
    a, b = weights(model)
    return {"value": y.detach(), "x": x.grad, "A": a.grad, "B": b.grad}


def in_float64(model: Any, x: Tensor, scale: float) -> dict[str, Tensor]:
    """The same by the definition, x W^T + bias + scale x A^T B^T (Hu et al. 2021, eq. 3)."""
    base = model.base_model.model.layer.base_layer
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    x, a, b = (value.detach().double().requires_grad_() for value in (x, *weights(model)))
    y = x @ weight.detach().double().t() + scale * (x @ a.t() @ b.t())
    if base.bias is not None:
        y = y + base.bias.detach().double()
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double())
    return {"value": y.detach(), "x": x.grad, "A": a.grad, "B": b.grad}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Euclidean distance in units of `wanted`'s length."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_values_and_gradients_are_pefts_in_float32(kind, shape, bias, rslora):
    layer, x = base_layer(kind, torch.float32, bias), INPUTS[shape]()
    ours, theirs = (outcome(adapted(layer, fused, use_rslora=rslora), x) for fused in (True, False))
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape
        assert ours[name].dtype == wanted.dtype
        assert apart(ours[name], wanted) <= 1e-5, name


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_values_and_gradients_are_the_definitions_in_float32(kind, rslora):
    model, x = adapted(base_layer(kind, torch.float32), True, use_rslora=rslora), INPUTS["batch"]()
    wanted = in_float64(model, x, SCALE[rslora])
    assert {name: apart(value, wanted[name]) <= 1e-6 for name, value in outcome(model, x).items()} == dict.fromkeys(
        wanted, True
    )


@pytest.mark.parametrize("shape", ["rows", "batch", "transposed"])
@pytest.mark.parametrize(
    ("kind", "held"), [("dense", torch.bfloat16), ("dense", torch.float32), ("nf4", torch.bfloat16)]
)
def test_values_and_gradients_are_as_exact_as_pefts_under_autocast(kind, shape, held):
    layer, x = base_layer(kind, torch.bfloat16), INPUTS[shape]().bfloat16().to(held)
    ours, theirs = (outcome(adapted(layer, fused), x, autocast=True) for fused in (True, False))
    wanted = in_float64(adapted(layer, True), x, SCALE[False])
    for name in wanted:
        assert ours[name].dtype == theirs[name].dtype
        assert apart(ours[name], wanted[name]) <= 1.5 * apart(theirs[name], wanted[name]) < 0.02, name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_an_input_without_a_gradient_gets_none_and_the_adapter_its_own(kind):
    model, x = adapted(base_layer(kind, torch.float32), True), INPUTS["batch"]()
    wanted = outcome(model, x)
    model.zero_grad(set_to_none=True)
    model(x).backward(torch.randn(2, 12, OUT, generator=torch.Generator().manual_seed(3)))
    assert x.grad is None
    assert [torch.equal(value.grad, wanted[name]) for name, value in zip("AB", weights(model), strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_pass_changes_neither_its_input_nor_the_base(kind):
    model, x = adapted(base_layer(kind, torch.float32), True), INPUTS["batch"]()
    base = model.base_model.model.layer.base_layer
    before = [value.clone() for value in (x, base.weight, base.bias)]
    outcome(model, x)
    assert [torch.equal(*pair) for pair in zip(before, (x, base.weight, base.bias), strict=True)] == [True] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", ["rows", "batch"])
def test_gradients_are_those_of_finite_differences(shape, dropout):
    layer = base_layer("dense", torch.float64)
    generator = torch.Generator().manual_seed(4)
    x = INPUTS[shape]()[..., :3, :].double().requires_grad_()
    a, b = (torch.randn(*size, generator=generator).double().requires_grad_() for size in ((2, IN), (OUT, 2)))

    projections = Projections((layer,), (2,), (0.7,), TokenDropout(dropout, "layer", IN) if dropout else None)

    def under_one_mask(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with drawing(draws_for(x)):
            return Projected.apply(x, projections, None, a, b)[0]

    assert torch.autograd.gradcheck(under_one_mask, (x, a, b), fast_mode=True)


# Dropout.


def draws_for(x: Tensor, seed: int = 0) -> Draws:
    """Of rows that are all different tokens."""
    return Draws.of(lambda: torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]), step_key(seed, 0))


def dropping(model: Any) -> Any:
    """The model in training mode, with the dropout that qpref gives an adapter."""
    layer = model.base_model.model.layer
    layer.lora_dropout["default"] = TokenDropout(layer.lora_dropout["default"].p, "layer", layer.in_features)
    return model.train()


def transparent(dropout: float) -> Any:
    """A layer whose output is its scaled, dropped input: a base of zeros, and A and B that change nothing."""
    dense = nn.Linear(IN, IN, bias=False)
    nn.init.zeros_(dense.weight)
    config = LoraConfig(r=IN, lora_alpha=2 * IN, target_modules=["layer"], lora_dropout=dropout)
    config._register_custom_module(CUSTOM_MODULES)
    model = get_peft_model(Net(dense), config)
    for parameter in weights(model):
        parameter.data = torch.eye(IN)
    return dropping(model)


def test_dropout_drops_its_share_and_scales_what_it_keeps():
    rows, share = 2000, 0.3
    x = torch.ones(rows, IN, requires_grad=True)
    with drawing(draws_for(x)):
        y = transparent(share)(x)
    assert {round(value, 5) for value in y.unique().tolist()} == {0.0, round(2 / (1 - share), 5)}
    dropped = (y == 0).double()
    deviation = (share * (1 - share) / rows) ** 0.5
    assert abs(dropped.mean().item() - share) <= 4 * deviation / IN**0.5
    assert (dropped.mean(0) - share).abs().max() <= 5 * deviation  # each column has its own draws
    assert (dropped.mean(1) - share).abs().max() <= 6 * (share * (1 - share) / IN) ** 0.5  # and each row
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y)  # what was dropped is what has no gradient


def test_the_base_is_not_dropped():
    layer, x = base_layer("dense", torch.float32), INPUTS["batch"]()
    model = dropping(adapted(layer, True, lora_dropout=0.9))
    weights(model)[1].data.zero_()
    with drawing(draws_for(x)):
        assert torch.equal(model(x), layer(x))


def test_a_pass_has_the_mask_of_its_tokens_and_step_and_leaves_torchs_generator_alone():
    model, x, found = transparent(0.5), torch.ones(8, IN), []
    state = torch.get_rng_state()
    for seed in (0, 1, 0):
        with drawing(draws_for(x, seed)):
            found.append(model(x))
    first, other, repeated = found
    assert torch.equal(repeated, first)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_in_eval_mode_drops_nothing():
    layer, x = base_layer("dense", torch.float32), INPUTS["batch"]()
    with_dropout, without = dropping(adapted(layer, True, lora_dropout=0.5)).eval(), adapted(layer, True)
    assert torch.equal(with_dropout(x), without(x))


def test_pefts_own_dropout_is_pefts_pass(monkeypatch):
    """A fused one would compute the layer without it."""
    calls = fused_calls(monkeypatch)
    layer, x = base_layer("dense", torch.float32), INPUTS["batch"]()
    model, without = adapted(layer, True, lora_dropout=0.5).train(), adapted(layer, True)
    assert not torch.allclose(model(x), without(x), atol=1e-3)
    assert len(calls) == 1  # of the layer without dropout


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_recomputed_layer_has_the_same_gradients(kind):
    model, x = dropping(adapted(base_layer(kind, torch.float32), True, lora_dropout=0.5)), INPUTS["batch"]()
    found = []
    for run in (model, partial(checkpoint, model, use_reentrant=False)):
        model.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        with drawing(draws_for(x)):
            run(leaf).square().sum().backward()
        found.append([leaf.grad, *(value.grad for value in weights(model))])
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True] * 3


# What is kept for the backward pass.


def kept_bytes(model: Any, x: Tensor, autocast: bool) -> int:
    """Bytes of all that autograd holds on to, the parameters and the input itself apart."""
    held: dict[int, int] = {}
    known = {value.untyped_storage().data_ptr() for value in (x, *model.parameters())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []  # so that no address is given out twice
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: (alive.append(tensor), note(tensor))[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
    ):
        alive.append(model(x))
    return sum(held.values())


ROWS = 512


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_input_one_low_rank_matrix_and_the_16_bit_adapter_are_all_that_is_kept(kind, dropout):
    layer = base_layer(kind, torch.bfloat16)
    x = torch.randn(ROWS, IN).requires_grad_()
    models = [adapted(layer, fused, lora_dropout=dropout).train() for fused in (True, False)]
    with drawing(draws_for(x)):
        ours, theirs = (
            kept_bytes(dropping(model) if fused and dropout else model, x, autocast=True)
            for fused, model in zip((True, False), models, strict=True)
        )
    assert ours == 2 * (ROWS * (IN + RANK) + RANK * (IN + OUT))
    assert (ours < theirs) if dropout else (ours <= theirs)


def test_nothing_is_kept_where_there_is_no_gradient():
    model = adapted(base_layer("dense", torch.float32), True)
    with torch.no_grad():
        assert not model(INPUTS["batch"]()).requires_grad
        assert kept_bytes(model, INPUTS["batch"](), autocast=False) == 0


# Where PEFT's own way is taken.


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each use of the fused function."""
    calls, real = [], Projected.apply
    monkeypatch.setattr(Projected, "apply", lambda *call: (calls.append(call), real(*call))[1])
    return calls


def test_the_fused_function_is_taken_for_one_plain_adapter(monkeypatch):
    calls = fused_calls(monkeypatch)
    adapted(base_layer("dense", torch.float32), True)(INPUTS["batch"]())
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_layer_with_its_adapter_off_is_the_base_to_the_bit(kind):
    layer, x = base_layer(kind, torch.float32), INPUTS["batch"]()
    model = adapted(layer, True)
    with model.disable_adapter():
        assert torch.equal(model(x), layer(x))
    assert not torch.equal(model(x), layer(x))


def both_adapters(model: Any, x: Tensor) -> Tensor:
    model.base_model.set_adapter(["default", "other"])
    return model(x)


def other_adapter(model: Any, x: Tensor) -> Tensor:
    model.base_model.set_adapter("other")
    return model(x)


def each_row_its_own(model: Any, x: Tensor) -> Tensor:
    return model.eval()(x, adapter_names=["default", "other"])


def merged(model: Any, x: Tensor) -> Tensor:
    model.merge_adapter(["default"])
    return model(x)


def merged_and_unmerged(model: Any, x: Tensor) -> Tensor:
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    return model(x)


WAYS = (both_adapters, other_adapter, each_row_its_own, merged, merged_and_unmerged)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_other_uses_of_a_layer_are_pefts(way, monkeypatch):
    layer, x = base_layer("dense", torch.float32), INPUTS["batch"]()
    calls = fused_calls(monkeypatch)
    ours, theirs = (way(adapted(layer, fused, names=("default", "other")), x) for fused in (True, False))
    assert apart(ours, theirs) <= 1e-6
    assert len(calls) == (1 if way in (other_adapter, merged_and_unmerged) else 0)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_adapters_that_are_not_plain_are_pefts(kind, setting, monkeypatch):
    layer, x = base_layer(kind, torch.float32), INPUTS["batch"]()
    calls = fused_calls(monkeypatch)
    ours, theirs = (outcome(adapted(layer, fused, **{setting: True}), x) for fused in (True, False))
    assert {name: torch.equal(ours[name], wanted) for name, wanted in theirs.items()} == dict.fromkeys(theirs, True)
    assert calls == []


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_base_with_a_forward_pass_of_its_own_keeps_it():
    layer, x = Doubled(IN, OUT), INPUTS["batch"]()
    ours, theirs = (adapted(layer, fused) for fused in (True, False))
    assert torch.equal(ours(x), theirs(x))
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(x), layer(x))


def test_with_the_adapter_off_a_gradient_keeps_the_weight_in_4_bits():
    model, x = adapted(base_layer("nf4", torch.bfloat16), True), INPUTS["rows"]().bfloat16().requires_grad_()
    sizes: list[int] = []
    with (
        model.disable_adapter(),
        torch.autograd.graph.saved_tensors_hooks(lambda each: sizes.append(each.numel()) or each, lambda each: each),
    ):
        model(x)
    assert sum(sizes) < IN * OUT


@pytest.mark.parametrize("name", ["default", None], ids=["adapter on", "adapter off"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_generating_on_a_gpu_leaves_4_bit_layers_to_bitsandbytes(kind, name):
    """It has kernels for few rows that read the 4-bit weight as it is."""
    model = adapted(base_layer(kind, torch.bfloat16), True)
    layer = model.base_model.model.layer
    layer.enable_adapters(name is not None)

    def covered(device: str) -> bool:
        x: Any = SimpleNamespace(device=torch.device(device))
        return projections_of([layer], x) is not None

    with torch.no_grad():
        assert covered("cuda")
        assert covered("cpu")
        with decoding():
            assert covered("cuda") == (kind == "dense")
            assert covered("cpu")
        assert covered("cuda")


# In a whole policy.


@pytest.fixture
def load(make_base, make_recipe) -> Callable[..., Policy]:
    def load(**model: str) -> Policy:
        changes = {f"model.{name}": value for name, value in model.items()}
        return load_worn(make_recipe({"model.base": str(make_base(initializer_range=0.2))} | changes))

    return load


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", FusedLinear4bit), ("none", FusedLinear)])
def test_every_adapted_layer_is_a_fused_one(quantization, kind, load):
    policy = load(quantization=quantization)
    layers = [module for module in policy.model.modules() if hasattr(module, "lora_A")]
    assert [type(layer) for layer in layers] == [kind] * 14  # q, k, v, o, gate, up and down of two layers


def test_every_layer_of_a_policy_that_starts_from_an_adapter_is_a_fused_one(load, make_base, make_recipe, tmp_path):
    load().model.save_pretrained(tmp_path / "start")
    recipe = Recipe.model_validate(make_recipe({"adapter.start": str(tmp_path / "start")}))
    policy = load_policy(recipe, resolve_base(recipe.model))
    layers = [module for module in policy.model.modules() if hasattr(module, "lora_A")]
    assert [type(layer) for layer in layers] == [FusedLinear] * 14


def saved_config(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    text = (folder / "adapter_config.json").read_text()
    assert "Fused" not in text
    assert "custom" not in text
    return json.loads(text)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_saved_adapter_is_pefts_and_scores_the_same(quantization, load, make_base, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = load(quantization=quantization)
    config = saved_config(policy.model, tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(make_base(initializer_range=0.2), dtype=torch.float32)
    plain = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert config.keys() == saved_config(plain, tmp_path / "plain").keys()

    fresh = AutoModelForCausalLM.from_pretrained(make_base(initializer_range=0.2), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "ours")
    assert not any(isinstance(module, FusedLinear | FusedLinear4bit) for module in loaded.modules())
    if quantization == "none":
        ids = torch.arange(40)[None]
        policy.use_attention(policy.own_attention)
        with torch.no_grad():
            assert apart(policy.model.eval()(ids).logits, loaded(ids).logits) <= 1e-5


def test_a_float32_layer_under_bf16_autocast_falls_back_to_peft():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    config._register_custom_module(CUSTOM_MODULES)
    torch.manual_seed(0)
    model = get_peft_model(One(), config)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert type(model.base_model.model.layer) is FusedLinear
    assert (found.float() - model(x)).abs().max() <= 0.05


# One rounding of the sum.


def small(model: Any, factor: float = 1e-4) -> Any:
    """The same adapter with a B so small that what it adds is under half a step of bf16 nearly everywhere."""
    weights(model)[1].data.mul_(factor)
    return model


def kept_share(model: Any, x: Tensor) -> float:
    """How much of the adapter's own part is in the layer's value: 1 where nothing is lost on average."""
    layer = model.base_model.model.layer
    a, b = (value.detach().double() for value in weights(model))
    added = ALPHA / RANK * (x.double() @ a.t() @ b.t())
    with torch.no_grad():
        value = model(x).double()
        layer.lora_B["default"].weight.zero_()
        without = model(x).double()
    return (((value - without) * added).sum() / added.square().sum()).item()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_small_adapter_is_not_lost_in_rounding(kind, bias):
    """Under PEFT's two roundings most of it is: the sum falls back to the base's rounded value."""
    layer = base_layer(kind, torch.bfloat16, bias)
    x = torch.randn(4000, IN, generator=torch.Generator().manual_seed(4)).bfloat16()
    ours, theirs = (kept_share(small(adapted(layer, fused)), x) for fused in (True, False))
    assert ours == pytest.approx(1, abs=0.1)
    assert theirs < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_an_adapter_that_is_zero_changes_no_bit(kind, bias, dtype):
    model, x = adapted(base_layer(kind, dtype, bias), True), INPUTS["batch"]().to(dtype)
    weights(model)[1].data.zero_()
    with torch.no_grad():
        value = model(x)
        with model.disable_adapter():
            assert torch.equal(value, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_base_alone_is_the_base_and_passes_gradients_on(kind, dtype):
    layer, x = base_layer(kind, dtype), INPUTS["batch"]().to(dtype)
    model, ours, theirs = adapted(layer, True), x.clone().requires_grad_(), x.clone().requires_grad_()
    with model.disable_adapter():
        value = model(ours)
    wanted = layer(theirs)
    assert apart(value.detach(), wanted.detach()) <= (1e-6 if dtype == torch.float32 else 0.004)
    value.sum().backward()
    wanted.sum().backward()
    assert apart(ours.grad, theirs.grad) <= (1e-6 if dtype == torch.float32 else 0.004)

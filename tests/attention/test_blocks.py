"""Attention in blocks of queries is attention: against float64 by hand, and through whole models."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_worn, make_example, peak_bytes
from torch import Tensor

import qpref
from qpref.attention import blocks
from qpref.attention import register as attention
from qpref.attention import segments as segments
from qpref.attention.layout import Layout, laid_out
from qpref.attention.register import BLOCKS, SEGMENTS
from qpref.data.pack import pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.records import Group
from qpref.training.invariants import check_layout

CPU = torch.device("cpu")
# Prompt and branches: shorter and longer than a block of 16 queries, of one token, of none.
LENGTHS = ((5, (9, 2)), (1, (1, 0)), (17, (40, 33)), (48, (16, 31)), (3, (0, 0)), (1, (64, 1)))


def groups_of(lengths) -> tuple[Group, ...]:
    groups, start = [], 0
    for prompt, branches in lengths:
        groups.append(Group(start=start, prompt=prompt, branches=branches))
        start += prompt + sum(branches)
    return tuple(groups)


GROUPS = groups_of(LENGTHS)


def states(
    heads: int, key_heads: int, width: int, value_width: int, groups=GROUPS, dtype=torch.float32
) -> list[Tensor]:
    """Queries, keys and values as a model makes them: [1, heads, T, width], T before heads in memory."""
    last, generator = groups[-1], torch.Generator().manual_seed(1)
    total = last.start + last.prompt + sum(last.branches)
    sizes = ((heads, width), (key_heads, width), (key_heads, value_width))
    made = [torch.randn(1, total, count, size, generator=generator).to(dtype) for count, size in sizes]
    return [each.transpose(1, 2).requires_grad_() for each in made]


def by_hand(query: Tensor, key: Tensor, value: Tensor, groups, scale: float, window: int | None) -> Tensor:
    """float64, one [T, T] mask over the whole stream."""
    total, places = query.shape[2], torch.full((query.shape[2], query.shape[2]), -1)
    for group in groups:
        end = group.start + group.prompt
        prompt = torch.arange(group.start, end)
        places[group.start : end, group.start : end] = torch.arange(group.prompt)[:, None] - torch.arange(group.prompt)
        for length in group.branches:
            own = torch.arange(end, end + length)
            keys = torch.cat([prompt, own])
            behind = torch.arange(group.prompt, group.prompt + length)[:, None] - torch.arange(len(keys))
            places[own[:, None], keys] = behind
            end += length
    seen = (places >= 0) & (places < (total if window is None else window))
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(each.double().repeat_interleave(repeats, dim=1) for each in (key, value))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def outcome(attend, inputs: list[Tensor], groups, scale: float | None, window: int | None) -> list[Tensor]:
    """The result and the three gradients of a random direction of it."""
    for each in inputs:
        each.grad = None
    result = attend(*inputs, groups, scale, window)
    above = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    result.backward(above.to(result.dtype))
    return [result.detach(), *(each.grad.clone() for each in inputs)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


@pytest.fixture(params=[(16, 1000), (16, 0), (16, 40), (224, 2048)], ids=["kept", "recomputed", "both", "as shipped"])
def sizes(request, monkeypatch) -> None:
    """Blocks of few queries, and up to how many keys the softmax is kept."""
    monkeypatch.setattr(segments, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(segments, "KEPT_KEYS", request.param[1])


@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 200])
@pytest.mark.parametrize(
    "shape", [(4, 2, 16, 16), (3, 3, 8, 8), (6, 1, 20, 12)], ids=["grouped", "plain", "one key head"]
)
def test_blocks_are_attention(shape, window, sizes):
    inputs = states(*shape)
    found = outcome(blocks.attend, inputs, GROUPS, None, window)
    assert worst(found, outcome(by_hand, inputs, GROUPS, shape[2] ** -0.5, window)) <= 1e-5


def test_another_scale(sizes):
    inputs = states(4, 2, 16, 16)
    found = outcome(blocks.attend, inputs, GROUPS, 0.7, None)
    assert worst(found, outcome(by_hand, inputs, GROUPS, 0.7, None)) <= 1e-5


def test_bf16_is_rounded_like_bf16(sizes):
    """The result's rounding to 8 bits of mantissa is 0.0017 of it on average; so is the softmax's. No direction is
    preferred."""
    inputs = states(4, 2, 16, 16, dtype=torch.bfloat16)
    wanted = outcome(by_hand, inputs, GROUPS, 0.25, None)
    for found, exact in zip(outcome(blocks.attend, inputs, GROUPS, 0.25, None), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        error, exact = found.double() - exact.double(), exact.double()
        assert (error.norm() / exact.norm()).item() <= 0.007
        along = (error * exact).sum() / exact.square().sum()
        assert abs(along.item()) <= 0.001


def under_autocast(*call) -> Tensor:
    """As in training: the forward pass under autocast, the backward pass not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return blocks.attend(*call)


@pytest.mark.parametrize("attend", [blocks.attend, under_autocast])
def test_scores_are_not_rounded(attend, sizes):
    """Scores of size 30 in bf16 would be off by 0.06, and with them every share of the attention by so much."""
    inputs = states(4, 2, 16, 16, dtype=torch.bfloat16)
    wanted = outcome(by_hand, inputs, GROUPS, 80**-0.5 * 20, None)
    for found, exact in zip(outcome(attend, inputs, GROUPS, 80**-0.5 * 20, None), wanted, strict=True):
        assert ((found.double() - exact.double()).norm() / exact.double().norm()).item() <= 0.007


@pytest.mark.parametrize("attend", [blocks.attend, under_autocast])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recomputed_softmax_is_the_one_that_was_kept(dtype, attend, monkeypatch):
    inputs = states(4, 2, 16, 16, dtype=dtype)
    kept = outcome(attend, inputs, GROUPS, 80**-0.5, None)
    monkeypatch.setattr(segments, "KEPT_KEYS", 0)
    again = outcome(attend, inputs, GROUPS, 80**-0.5, None)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_no_softmax_is_kept_of_long_segments(monkeypatch):
    inputs = states(4, 2, 16, 16)

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: sizes.append(each.numel()), lambda each: each):
            blocks.attend(*inputs, GROUPS, None, None)
        return sum(sizes)

    plain = sum(each.numel() for each in inputs)
    spans = [(0, prompt) for prompt, _ in LENGTHS] + [(prompt, own) for prompt, both in LENGTHS for own in both]
    scores = sum(segments.kept_scores(*each) for each in spans)
    assert kept() == plain + 4 * scores
    monkeypatch.setattr(segments, "KEPT_KEYS", 0)
    assert kept() == plain


def test_no_softmax_outlives_its_block_where_there_is_no_gradient():
    """Of 64 blocks alike, all of whose shares together are many times what one pass may hold."""
    groups = groups_of(((1, (200,) * 64),))
    inputs = states(4, 2, 8, 8, groups)
    with torch.no_grad():
        peak = peak_bytes(lambda: blocks.attend(*inputs, groups, None, None))
    of_one = 4 * 4 * 200 * 201
    assert 2 * of_one <= peak <= 16 * of_one  # beside what it makes of queries, keys and values
    assert peak_bytes(lambda: blocks.attend(*inputs, groups, None, None)) >= 64 * of_one


def test_a_branch_sees_no_sibling_and_no_other_group():
    """Whatever stands there changes no bit of its result and of its gradients, and has none."""
    groups = groups_of(((9, (30, 25)), (7, (5, 6))))
    inputs = states(4, 2, 8, 8, groups)
    own = slice(39, 64)  # the second branch of the first group

    def of_own() -> list[Tensor]:
        for each in inputs:
            each.grad = None
        result = blocks.attend(*inputs, groups, None, None)
        result[:, own].square().sum().backward()
        return [result.detach()[:, own], *(each.grad.clone() for each in inputs)]

    before = of_own()
    with torch.no_grad():
        for each in inputs:
            each[:, :, 9:39] *= -3  # the first branch
            each[:, :, 64:] += 5  # the second group
    after = of_own()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for grad in after[1:]:
        assert grad[:, :, own].any()
        assert not grad[:, :, 9:39].any()
        assert not grad[:, :, 64:].any()


# Through whole models.

EXAMPLES = [make_example(line, *lengths) for line, lengths in enumerate(((5, 9, 2), (1, 1, 6), (17, 40, 13)), start=1)]


def load(base: Path, dtype: str) -> Policy:
    model = {"base": str(base), "quantization": "none", "dtype": dtype, "device": "cpu"}
    return load_worn({"model": model, "adapter": {"rank": 4, "alpha": 8}})


def scored(policy: Policy, path: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and all gradients of a random direction of them in a row."""
    policy.use_attention(path)
    policy.model.zero_grad(set_to_none=True)
    values = completion_logprobs(policy, pack(EXAMPLES, CPU)).values
    values.backward(torch.randn(values.shape, generator=torch.Generator().manual_seed(2)))
    return values.detach(), torch.cat([value.grad.flatten() for value in policy.trained_parameters().values()])


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "gemma3"])
@pytest.mark.parametrize(("dtype", "tolerance", "grad_tolerance"), [("float32", 1e-5, 1e-5), ("bf16", 0.05, 0.05)])
def test_a_model_scores_as_segment_by_segment(family, dtype, tolerance, grad_tolerance, make_base, monkeypatch):
    monkeypatch.setattr(segments, "QUERY_BLOCK", 16)
    policy = load(make_base(family, initializer_range=0.2), dtype)
    values, grads = scored(policy, BLOCKS)
    wanted, expected = scored(policy, SEGMENTS)
    assert (values - wanted).abs().mean().item() <= tolerance
    assert ((grads - expected).norm() / expected.norm()).item() <= grad_tolerance


@pytest.fixture(params=[False, True], ids=["without bf16 units", "with bf16 units"])
def units(request, monkeypatch) -> bool:
    monkeypatch.setattr(blocks, "has_bf16_units", lambda: request.param)
    return request.param


def test_blocks_are_for_bf16_on_a_cpu_with_units_for_it(units):
    expected = (BLOCKS, SEGMENTS) if units else (SEGMENTS,)
    assert attention.sharing_paths(CPU, torch.bfloat16) == expected
    assert attention.sharing_paths(CPU, torch.float32) == (SEGMENTS,)
    assert BLOCKS not in attention.sharing_paths(torch.device("cuda"), torch.bfloat16)


def test_a_run_takes_blocks_and_says_so(units, make_recipe, tmp_path: Path):
    recipe = make_recipe({"train.max_steps": 2, "model.dtype": "bf16"})
    description = json.loads((qpref.train(recipe, output=tmp_path / "run") / "run.json").read_text())
    assert description["attention"] == (BLOCKS if units else SEGMENTS)


def test_the_first_batch_finds_wrong_blocks(make_base, monkeypatch, caplog):
    policy = load(make_base("llama", initializer_range=0.2), "bf16")
    policy.sharing_paths = (BLOCKS, SEGMENTS)
    real = blocks._scatter
    monkeypatch.setattr(blocks, "_scatter", lambda total, grads, segment: real(total, grads * 1.5, segment))
    check_layout(policy, EXAMPLES[2])
    assert policy.attention == SEGMENTS
    assert "attention qpref_blocks is not used: a layer's result or gradients are off by" in caplog.text


def test_rounding_of_a_deep_model_is_not_taken_for_a_fault(make_base):
    """In six layers of bf16 it adds up to more than a kernel may be off in one: 2 x 0.3 + 1 %."""
    policy = load(make_base("llama", initializer_range=0.2, num_hidden_layers=6), "bf16")
    policy.sharing_paths = (BLOCKS, SEGMENTS)
    grads = [scored(policy, path)[1] for path in policy.sharing_paths]
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() > 0.02
    check_layout(policy, EXAMPLES[2])
    assert policy.attention == BLOCKS


def test_dropout_of_the_attention_is_refused():
    layer = SimpleNamespace(config=SimpleNamespace(layer_types=None))
    keywords = {"dropout": 0.5, "attend": blocks.attend}
    refusal = pytest.raises(attention.CannotShareError, match="its attention has dropout")
    with laid_out(Layout(GROUPS)), refusal:
        attention.shared_prompt_attention(layer, *states(4, 2, 8, 8), None, **keywords)

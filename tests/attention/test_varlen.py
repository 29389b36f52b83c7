"""One variable-length call for all segments says what a call for each says, and a kernel that doesn't is passed over.

The kernels for GPUs don't run here. A stand-in in plain torch, written from their documentation, takes their place, so
that all around them runs: the layout, the gathering and its gradient, transformers, the checks of the first batch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load_worn, make_example
from torch import Tensor

from qpref.attention import register as attention
from qpref.attention import sdpa, varlen
from qpref.attention.determinism import deterministic
from qpref.attention.layout import Layout, laid_out
from qpref.attention.register import BLOCKS, KERNELS, SEGMENTS
from qpref.attention.varlen import KeyLayout, _Gather, key_layout
from qpref.data.pack import pack
from qpref.errors import DeviceMemoryError
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.records import Group, TokenizedExample
from qpref.training.invariants import check_layout

CPU = torch.device("cpu")
BY_HAND = "qpref_by_hand"
FAMILIES = ("llama", "qwen", "mistral", "gemma3")
TOLERANCE = 1e-5


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, scale: float | None, window: int | None
) -> Tensor:
    """Each segment by itself: its last query stands at its last key, and sees `window` keys up to its own."""
    queries, keys = layout.query_ends.tolist(), layout.key_ends.tolist()
    assert queries[-1] == len(query)
    assert keys[-1] == len(key) == len(value)
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    outputs = []
    for place in range(len(queries) - 1):
        q = query[queries[place] : queries[place + 1]]
        k, v = (states[keys[place] : keys[place + 1]] for states in (key, value))
        assert 0 < len(q) <= layout.longest_query
        assert len(q) <= len(k) <= layout.longest_keys
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (behind >= 0) & (behind < (len(k) if window is None else window))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(outputs)


# Prompts and responses shorter and longer than the window of 7, responses of one token on either side and on both.
LENGTHS = ((5, 9, 2), (1, 1, 6), (11, 1, 1), (17, 4, 13), (3, 12, 1), (1, 1, 1), (8, 2, 7))
EXAMPLES = [make_example(line, *lengths) for line, lengths in enumerate(LENGTHS, start=1)]
BATCHES = {"one": EXAMPLES[:1], "one of one token each": EXAMPLES[2:3], "many": EXAMPLES}


Load = Callable[..., Policy]


@pytest.fixture
def load(make_base, monkeypatch) -> Load:
    """`load("llama", first=a_kernel, second=...)`: a policy whose paths are these kernels, then a call each."""

    def load(family: str = "llama", checkpointing: bool = False, **kernels: varlen.Kernel) -> Policy:
        names = {f"qpref_{name}": kernel for name, kernel in (kernels or {"by_hand": by_hand}).items()}
        for name, kernel in names.items():
            monkeypatch.setitem(KERNELS, name, kernel)
        monkeypatch.setattr(attention, "sharing_paths", lambda device, dtype: (*names, SEGMENTS))
        base = make_base(family, initializer_range=0.2)
        return load_worn(
            {
                "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
                "adapter": {"rank": 4, "alpha": 8},
                "train": {"gradient_checkpointing": checkpointing},
            }
        )

    return load


def outcome(policy: Policy, path: str, examples: Sequence[TokenizedExample]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities on a path, and the gradients of a random direction of them."""
    policy.use_attention(path)
    policy.model.zero_grad(set_to_none=True)
    values = completion_logprobs(policy, pack(examples, CPU)).values
    values.backward(torch.randn(values.shape, generator=torch.Generator().manual_seed(2)))
    return values.detach(), {name: value.grad for name, value in policy.trained_parameters().items()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of any entry, as a share of the largest entry of all."""
    largest = max(value.abs().max().item() for value in wanted.values())
    return max((found[name] - value).abs().max().item() for name, value in wanted.items()) / largest


# The whole way through transformers.


def test_the_fastest_path_is_taken_first(load):
    policy = load("llama")
    assert (policy.attention, policy.sharing_paths) == (BY_HAND, (BY_HAND, SEGMENTS))
    assert policy.shares_prompts


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_is_a_call_each_and_whole_rows(family, batch, checkpointing, load):
    calls: list[Any] = []
    policy = load(family, checkpointing, by_hand=lambda *call: (calls.append(call), by_hand(*call))[1])
    values, gradients = outcome(policy, BY_HAND, BATCHES[batch])
    assert len(calls) == 2 * (1 + checkpointing)  # two layers
    for path in (SEGMENTS, policy.own_attention):
        wanted, expected = outcome(policy, path, BATCHES[batch])
        assert (values - wanted).abs().max().item() <= TOLERANCE, path
        assert worst(gradients, expected) <= TOLERANCE, path


def test_windows_of_both_kinds_reach_the_kernel(load):
    windows: list[int | None] = []

    def noting(query, key, value, layout, scale, window):
        windows.append(window)
        return by_hand(query, key, value, layout, scale, window)

    outcome(load("gemma3", by_hand=noting), BY_HAND, EXAMPLES)
    assert windows == [7, None]


@pytest.mark.parametrize("path", ["qpref_varlen_torch"])
def test_a_path_has_a_name_that_transformers_takes_as_it_is(path, load):
    policy = load("llama")
    policy.use_attention(path)
    assert policy.model.get_base_model().config._attn_implementation == path


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_one_call_is_a_call_each_for_any_scale_and_window(scaling, window):
    batch, generator = pack(EXAMPLES, CPU), torch.Generator().manual_seed(3)
    states = [torch.randn(1, heads, batch.num_tokens, 8, generator=generator) for heads in (4, 2, 2)]
    layer = SimpleNamespace(config=SimpleNamespace(layer_types=None))
    with laid_out(Layout(batch.groups)):
        one, each = (
            attention.shared_prompt_attention(
                layer, *states, None, scaling=scaling, sliding_window=window, attend=attend
            )[0]
            for attend in (partial(varlen.attend, by_hand), None)
        )
    assert one.shape == each.shape == (1, batch.num_tokens, 4, 8)
    assert (one - each).abs().max().item() <= TOLERANCE


# The arguments of the two kernels.


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Both kernels by their documentation: query i of a sequence sees keys from i + keys - queries - left to
    i + keys - queries + right, -1 being no end."""
    assert query.is_contiguous()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    left, right = window_size
    assert right == 0
    layout = KeyLayout(torch.empty(0), torch.empty(0), (), cu_seq_q, cu_seq_k, max_q, max_k)
    return by_hand(query, key, value, layout, scale, None if left == -1 else left + 1)


def varlen_attn(*tensors: Any, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
    assert enable_gqa
    return documented(*tensors, scale, window_size)


def older_varlen_attn(*tensors: Any, scale: float | None, window_size: tuple[int, int]) -> Tensor:
    return documented(*tensors, scale, window_size)


def flash_attn_varlen_func(
    *tensors: Any, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], deterministic: bool
) -> Tensor:
    assert causal
    assert deterministic
    return documented(*tensors, softmax_scale, window_size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("function", [varlen_attn, older_varlen_attn, flash_attn_varlen_func])
def test_a_kernel_gets_the_arguments_that_it_documents(function, family, load, monkeypatch):
    if function is flash_attn_varlen_func:
        distribution, kernel = ModuleType("flash_attn"), varlen.flash_attn_kernel
        distribution.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, "flash_attn", distribution)
    else:
        import torch.nn.attention.varlen as torchs

        kernel = varlen.torch_kernel
        monkeypatch.setattr(torchs, "varlen_attn", function)
    policy = load(family, by_hand=kernel)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic(function is flash_attn_varlen_func, torch.device("cuda")):
        values, gradients = outcome(policy, BY_HAND, EXAMPLES)
    wanted, expected = outcome(policy, SEGMENTS, EXAMPLES)
    assert (values - wanted).abs().max().item() <= TOLERANCE
    assert worst(gradients, expected) <= TOLERANCE


# The layout.


def lists(layout: KeyLayout) -> dict[str, Any]:
    named = {each.name: getattr(layout, each.name) for each in fields(layout)}
    shared = [(tokens.tolist(), places.tolist()) for tokens, places in layout.shared]
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in named.items()}
    return plain | {"shared": shared}


def test_layout_of_two_examples_by_hand():
    # Stream: 0 1 | 2 | (a response of one token: nothing fed) and 3 | 4 5 | 6.
    groups = (Group(start=0, prompt=2, branches=(1, 0)), Group(start=3, prompt=1, branches=(2, 1)))
    assert lists(key_layout(groups, CPU)) == {
        "index": [0, 1, 0, 1, 2, 3, 3, 4, 5, 3, 6],
        "own": [0, 1, 4, 5, 7, 8, 10],
        "shared": [([0, 1, 3], [2, 3, 6]), ([3], [9])],
        "query_ends": [0, 2, 3, 4, 6, 7],
        "key_ends": [0, 2, 5, 6, 9, 11],
        "longest_query": 2,
        "longest_keys": 3,
    }


def test_layout_where_only_the_second_response_is_fed():
    assert lists(key_layout((Group(start=0, prompt=2, branches=(0, 1)),), CPU)) == {
        "index": [0, 1, 0, 1, 2],
        "own": [0, 1, 4],
        "shared": [([0, 1], [2, 3])],
        "query_ends": [0, 2, 3],
        "key_ends": [0, 2, 5],
        "longest_query": 2,
        "longest_keys": 3,
    }


def test_layout_of_a_prompt_alone():
    assert lists(key_layout((Group(start=0, prompt=3, branches=(0, 0)),), CPU)) == {
        "index": [0, 1, 2],
        "own": [0, 1, 2],
        "shared": [],
        "query_ends": [0, 3],
        "key_ends": [0, 3],
        "longest_query": 3,
        "longest_keys": 3,
    }


def test_every_gathered_key_is_a_tokens_own_or_one_shared_copy():
    layout = key_layout(pack(EXAMPLES, CPU).groups, CPU)
    assert torch.equal(layout.index[layout.own], torch.arange(len(layout.own)))
    places = torch.cat([layout.own, *(places for _, places in layout.shared)])
    assert torch.equal(places.sort().values, torch.arange(len(layout.index)))
    for tokens, places in layout.shared:
        assert torch.equal(layout.index[places], tokens)
        assert len(tokens.unique()) == len(tokens)


def test_every_layer_is_given_the_same_layout():
    groups = pack(EXAMPLES, CPU).groups
    assert key_layout(groups, CPU) is key_layout(pack(EXAMPLES, CPU).groups, CPU)
    assert key_layout(groups[:2], CPU) is not key_layout(groups, CPU)


# The gathering's gradient.


def gathered_gradient(states: Tensor, layout: KeyLayout, direction: Tensor) -> Tensor:
    leaf = states.clone().requires_grad_()
    _Gather.apply(leaf, layout).backward(direction)
    return leaf.grad


def test_the_gathers_gradient_is_that_of_finite_differences():
    layout = key_layout(pack(EXAMPLES[:3], CPU).groups, CPU)
    states = torch.randn(len(layout.own), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: _Gather.apply(x, layout), states.requires_grad_())


def test_the_gathers_gradient_is_index_selects_and_the_same_each_time():
    layout = key_layout(pack(EXAMPLES, CPU).groups, CPU)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(layout.own), 2, 8, generator=generator)
    direction = torch.randn(len(layout.index), 2, 8, generator=generator)
    found = gathered_gradient(states, layout, direction)
    leaf = states.double().requires_grad_()
    leaf.index_select(0, layout.index).backward(direction.double())
    assert torch.allclose(found.double(), leaf.grad, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(gathered_gradient(states, layout, direction), found) for _ in range(3))


def test_gradients_of_copies_are_added_in_float32():
    # 256 + 1 is 256 in bf16, and so is one more; 258 is a number that it has.
    layout = key_layout((Group(start=0, prompt=1, branches=(1, 1)),), CPU)
    direction = torch.ones(len(layout.index), 1, dtype=torch.bfloat16)
    direction[layout.own[0]] = 256
    found = gathered_gradient(torch.zeros(3, 1, dtype=torch.bfloat16), layout, direction)
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == [258, 1, 1]


# Kernels that the first batch's checks pass over.


def raising(*call: Any) -> Tensor:
    raise RuntimeError("no such kernel for this GPU\nmore lines\n")


def missing(*call: Any) -> Tensor:
    raise ImportError("flash_attn was built for another torch")


def silent(*call: Any) -> Tensor:
    raise NotImplementedError


def scaled(*call: Any) -> Tensor:
    return by_hand(*call) * 1.5


def not_a_number(*call: Any) -> Tensor:
    return by_hand(*call) * torch.nan


def acausal(query, key, value, layout, scale, window) -> Tensor:
    """Every query of a segment sees what its last one sees."""
    last = by_hand(query, key, value, layout, scale, window)
    ends = layout.query_ends.tolist()
    spans = itertools.pairwise(ends)
    return torch.cat([last[stop - 1 : stop].expand(stop - start, -1, -1) for start, stop in spans])


def with_steep_gradients(*call: Any) -> Tensor:
    attended = by_hand(*call)
    return attended.detach() + 1.3 * (attended - attended.detach())


def without_gradients(*call: Any) -> Tensor:
    attended = by_hand(*call)
    return attended.detach() + 0.0 * attended


def seeing_the_sibling(query, key, value, layout, scale, window) -> Tensor:
    return by_hand(query, key, value, layout, scale, window) + 1e-7 * value.sum(0).repeat_interleave(2, dim=0)


BAD_KERNELS = {
    raising: "RuntimeError: no such kernel for this GPU",
    missing: "ImportError: flash_attn was built for another torch",
    silent: "NotImplementedError: ",
    scaled: "sharing a prompt changes log-probabilities: a token's is ",
    not_a_number: "sharing a prompt changes log-probabilities: a token's is nan",
    acausal: "sharing a prompt changes log-probabilities: a token's is ",
    with_steep_gradients: "a layer's result or gradients are off by ",
    without_gradients: "a layer's result or gradients are off by ",
    seeing_the_sibling: "one response sees the other",
}


@pytest.mark.parametrize("path", [SEGMENTS, BLOCKS, *KERNELS])
def test_transformers_takes_the_name_of_every_path_for_ours(path, load):
    load("llama").use_attention(path)


@pytest.mark.parametrize("bad", BAD_KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_kernel_is_passed_over_that_is(bad, load, said):
    policy = load("llama", bad=bad, by_hand=by_hand)
    check_layout(policy, EXAMPLES[0])
    assert policy.attention == BY_HAND
    assert policy.model.get_base_model().config._attn_implementation == BY_HAND
    assert len(said) == 1
    assert said[0].startswith(f"attention qpref_bad is not used: {BAD_KERNELS[bad]}")
    assert "\n" not in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_good_kernel_is_taken_without_a_word(family, load, said):
    policy = load(family)
    check_layout(policy, EXAMPLES[0])
    assert policy.attention == BY_HAND
    assert said == []


def test_two_bad_kernels_leave_a_call_each(load, said):
    policy = load("llama", first=raising, second=scaled)
    check_layout(policy, EXAMPLES[0])
    assert policy.attention == SEGMENTS
    assert [line.partition(" is not used")[0] for line in said] == ["attention qpref_first", "attention qpref_second"]


def test_a_kernel_refuses_dropout_of_the_attention(load, monkeypatch):
    policy = load("llama")
    policy.decoder.eval()
    for layer in policy.decoder.layers:
        monkeypatch.setattr(layer.self_attn._own[0], "attention_dropout", 0.5)
        layer.self_attn.train()  # no pass of ours leaves it so
    with pytest.raises(attention.CannotShareError, match="its attention has dropout"):
        completion_logprobs(policy, pack(EXAMPLES[:1], CPU))


def test_a_fault_of_a_call_each_leaves_whole_rows(load, said, monkeypatch):
    policy = load("llama")

    def broken(groups: Sequence[Group]) -> Iterator[Any]:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sdpa, "segments", broken)
    policy.sharing_paths = (SEGMENTS,)
    check_layout(policy, EXAMPLES[0])
    assert not policy.shares_prompts
    assert said == ["prompts are computed once for each response, not once a pair: RuntimeError: a fault of ours"]


def test_wrong_kernels_and_a_wrong_call_each_leave_whole_rows(load, said, monkeypatch):
    policy, real = load("llama", first=scaled), sdpa.scaled_dot_product_attention
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", lambda *q, **kw: real(*q, **kw) * 1.5)
    check_layout(policy, EXAMPLES[0])
    assert policy.attention == policy.own_attention
    assert not policy.shares_prompts
    assert [line.partition(": ")[0] for line in said] == [
        "attention qpref_first is not used",
        "prompts are computed once for each response, not once a pair",
    ]


@pytest.mark.parametrize("passes", [0, 2], ids=["at the first call", "in the gradients' check"])
def test_running_out_of_memory_is_no_fault_of_a_kernel(passes, load, said):
    calls = []

    def exhausted(*call: Any) -> Tensor:
        calls.append(call)
        if len(calls) > passes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return by_hand(*call)

    policy = load("llama", by_hand=exhausted)
    with pytest.raises(DeviceMemoryError, match="on a few tokens"):
        check_layout(policy, EXAMPLES[0])
    assert all(line.startswith("out of memory: a check before training is repeated on ") for line in said)


def test_the_paths_of_a_gpu_are_the_kernels_then_a_call_each(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    assert attention.sharing_paths(cuda, torch.bfloat16) == (*KERNELS, SEGMENTS)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert attention.sharing_paths(cuda, torch.bfloat16) == ("qpref_varlen_torch", SEGMENTS)
    assert attention.sharing_paths(cuda, torch.float32) == (SEGMENTS,)


def test_a_run_says_which_attention_it_took(make_recipe, tmp_path: Path, monkeypatch):
    import json

    import qpref

    monkeypatch.setitem(KERNELS, BY_HAND, by_hand)
    monkeypatch.setattr(attention, "sharing_paths", lambda device, dtype: (BY_HAND, SEGMENTS))
    folder = qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "run").path
    description = json.loads((folder / "run.json").read_text())
    assert (description["attention"], description["shares_prompts"]) == (BY_HAND, True)

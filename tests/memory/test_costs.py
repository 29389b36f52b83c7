"""Predicted bytes are those that the code keeps: counted on real models, and worked out by hand."""

import math
from array import array
from dataclasses import replace

import pytest
import torch
from conftest import peak_bytes
from matrix.cases import tiny_model
from tiny_models import TinyModel

from qpref.attention import blocks
from qpref.attention.register import BLOCKS
from qpref.attention.segments import KEPT_KEYS, QUERY_BLOCK, kept_scores, segments
from qpref.data.pack import pack
from qpref.memory.activations import activation_bytes, head_bytes, live_bytes
from qpref.memory.costs import adapter_bytes, optimizer_bytes, peak_memory, weight_bytes
from qpref.memory.flops import forward_flops, step_flops
from qpref.memory.known_shapes import FoundConfig, named_config
from qpref.memory.parts import GIB
from qpref.memory.probe import measure_bytes
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape, read_shape
from qpref.memory.stream import Stream
from qpref.policy import matmul
from qpref.policy.experts import PackedExperts
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.source import resolve_base
from qpref.recipe.sections import AdapterSection, Recipe
from qpref.records import Group, Source, TokenizedExample
from qpref.training.optim import make_optimizer

CPU = torch.device("cpu")
MEDIUM = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 32}
LENGTHS = [(50, (61, 50)), (30, (21, 1)), (9, (80, 33))]


def a_recipe(base, dtype="bf16", quantization="none", **tables):
    values = {
        "model": {"base": str(base), "quantization": quantization, "dtype": dtype, "device": "cpu"},
        "adapter": {"rank": 8},
        "data": {"train": "x"},
        "loss": {"name": "dpo"},
        "train": {"gradient_checkpointing": False},
    }
    return Recipe.model_validate({name: values.get(name, {}) | tables.get(name, {}) for name in values | tables})


def load(recipe):
    policy = load_policy(recipe, resolve_base(recipe.model))
    policy.model.train()
    shape = model_shape(recipe.model, recipe.adapter)
    return policy, shape, Setup.of(recipe, "cpu", shape)


def a_batch(lengths=LENGTHS):
    source = Source(path="x", line=1)
    examples = [
        TokenizedExample(
            prompt=array("i", [5 + number] * prompt),  # another each: examples would share it
            branches=tuple(array("i", [6 + index] * length) for index, length in enumerate(branches)),
            truncated=(False,) * len(branches),
            weight=1.0,
            margin=0.0,
            source=source,
        )
        for number, (prompt, branches) in enumerate(lengths)
    ]
    return pack(examples, CPU)


def kept_bytes(policy, batch):
    """Bytes of all that autograd keeps for the backward pass of the batch's scores."""
    kept = []
    total = measure_bytes(lambda: kept.append(completion_logprobs(policy, batch)), CPU)
    assert kept
    return total


# Activations


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("size", [{}, MEDIUM], ids=["tiny", "medium"])
@pytest.mark.parametrize("recomputed", [0, 1, 2], ids=["none", "half", "all"])
def test_activations_are_what_autograd_keeps(make_base, family, dtype, size, recomputed):
    setting = recomputed or False
    recipe = a_recipe(make_base(family, **size), dtype, train={"gradient_checkpointing": setting})
    policy, shape, setup = load(recipe)
    batch = a_batch()
    predicted = activation_bytes(shape, setup, Stream.of(LENGTHS), recomputed)
    # Gemma's layers differ in their windows, so in their masks; in blocks less is kept where a window hides keys.
    off = 0.08 if family == "gemma3" or (family == "mistral" and setup.in_blocks) else 0.001
    assert predicted == pytest.approx(kept_bytes(policy, batch), rel=off)


@pytest.mark.parametrize("kind", ["gemma2", "flint"])
def test_activations_without_a_kernel_are_what_autograd_keeps(tmp_path, kind):
    base = TinyModel(model_type=kind).write(tmp_path)
    policy, shape, setup = load(a_recipe(base, train={"gradient_checkpointing": False}))
    predicted = activation_bytes(shape, setup, Stream.of(LENGTHS), 0)
    # Flint has no rotary positions in layers of full attention.
    assert predicted == pytest.approx(kept_bytes(policy, a_batch()), rel=0.03)


@pytest.mark.parametrize(
    "adapter",
    [{"dropout": 0.1}, {"targets": ["q_proj", "v_proj"]}, {"targets": ["k_proj", "down_proj"]}, {"rank": 32}],
    ids=["dropout", "attention's inputs", "one of each part", "a high rank"],
)
def test_activations_follow_the_adapter(make_base, adapter):
    policy, shape, setup = load(a_recipe(make_base("llama", **MEDIUM), adapter=adapter))
    predicted = activation_bytes(shape, setup, Stream.of(LENGTHS), 0)
    assert predicted == pytest.approx(kept_bytes(policy, a_batch()), rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
def test_activations_and_weights_of_packed_experts_are_as_predicted(family, dtype, adapted, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 8}
    own = {name: size for name, size in sizes.items() if family == "qwen3_moe" or not name.startswith(("moe", "num"))}
    base = TinyModel(model_type=family, config=own).write(tmp_path)
    policy, shape, setup = load(a_recipe(base, dtype, quantization="nf4", adapter={"experts": adapted}))
    predicted = activation_bytes(shape, setup, Stream.of(LENGTHS), 0)
    assert predicted == pytest.approx(kept_bytes(policy, a_batch()), rel=0.05)
    packed = [module for module in policy.decoder.modules() if isinstance(module, PackedExperts)]
    stored = sum(value.numel() * value.element_size() for each in packed for value in each.parameters())
    without = replace(shape, layers=tuple(replace(layer, experts=None) for layer in shape.layers))
    assert weight_bytes(shape, setup) - weight_bytes(without, setup) == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("has_units", [True, False], ids=["bf16 units", "AVX2 alone"])
@pytest.mark.parametrize("dropout", [0, 0.1])
def test_the_peak_of_a_whole_step_is_as_predicted(has_units, dropout, make_base, monkeypatch):
    """By every allocation that torch's profiler sees, temporaries too; on any CPU as on the two kinds."""
    monkeypatch.setattr(matmul, "_has_bf16_units", lambda: has_units)
    monkeypatch.setattr(blocks, "has_bf16_units", lambda: has_units)
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    base = make_base("llama", **size, num_hidden_layers=4)
    train, adapter = {"gradient_checkpointing": True}, {"dropout": dropout}
    policy, shape, setup = load(a_recipe(base, quantization="nf4", train=train, adapter=adapter))
    lengths = [(120, (81, 70))] * 4
    batch, stream = a_batch(lengths), Stream.of(lengths)

    def step():
        completion_logprobs(policy, batch).values.sum().backward()

    step()  # gradients are there from now on
    for recomputed in (1, 3, 4):
        policy.recompute_layers(recomputed)
        part = peak_memory(shape, setup, stream, recomputed)
    assert part.activations + max(part.live, part.head_tile) == pytest.approx(peak_bytes(step), rel=0.06)


@pytest.mark.parametrize("recomputed", [1, 4])
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
def test_the_peak_of_a_step_with_packed_experts_is_as_predicted(recomputed, adapted, tmp_path):
    size = {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts_per_tok": 4, "num_hidden_layers": 4}
    base = TinyModel(model_type="qwen3_moe", config=size).write(tmp_path)
    train = {"gradient_checkpointing": recomputed}
    recipe = a_recipe(base, "float32", quantization="nf4", train=train, adapter={"experts": adapted})
    policy, shape, setup = load(recipe)
    lengths = [(120, (81, 70))] * 4
    batch = a_batch(lengths)

    def step():
        completion_logprobs(policy, batch).values.sum().backward()

    step()
    part = peak_memory(shape, setup, Stream.of(lengths), recomputed)
    assert part.activations + max(part.live, part.head_tile) == pytest.approx(peak_bytes(step), rel=0.06)


def test_the_scores_of_a_long_segment_count(make_base):
    """Beside them all else is small."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 16, "num_key_value_heads": 2}
    policy, shape, setup = load(a_recipe(make_base("llama", **size, max_position_embeddings=4096)))
    policy.use_attention(BLOCKS)
    lengths = [(12 * QUERY_BLOCK, (30, 30))]
    batch = a_batch(lengths)

    def step():
        completion_logprobs(policy, batch).values.sum().backward()

    step()
    part = peak_memory(shape, replace(setup, in_blocks=True), Stream.of(lengths), 0)
    assert part.activations + part.live == pytest.approx(peak_bytes(step), rel=0.06)


def test_the_last_layer_need_not_be_recomputed():
    """Its activations are needed as soon as the backward pass begins."""
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection())
    setup, stream = Setup(device="cuda"), Stream.of([(1024, (768, 768))] * 2)
    needs = [peak_memory(shape, setup, stream, layers).total for layers in range(shape.num_layers + 1)]
    assert needs[:-1] == sorted(needs[:-1], reverse=True)
    assert needs[-1] >= needs[-2]


def test_flash_attention_on_a_gpu_by_hand():
    """SmolLM2-135M without adapters' ranks mattering: H 576, Q 576, K 192, 9 heads, I 1536, rank 1, 30 layers."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=1))
    stream = Stream.of([(100, (51, 31))])  # fed: 100 + 50 + 30; gathered keys: 100 + 150 + 130
    layer = (
        180 * (2 * 576 + 4) * 2  # two norms' inputs, and one over their root mean squares
        + 180 * 2 * 2 * 1536  # gate and up
        + 180 * 2 * 7  # seven low-rank products
        + 2 * (2 * 1152 + 2 * 768 + 3 * 2112)  # A and B of q and o, k and v, gate and up and down, in 16 bits
        + 180 * 2 * (576 + 576)  # queries and the result, which is o's input
        + 380 * 2 * (192 + 192)  # gathered keys and values
        + 180 * 4 * 9  # log-sum-exp
    )
    # Rotary tables; gradients and indices of 51 + 31 scored tokens; the last norm.
    ends = 180 * 2 * 128 + 82 * (2 * 576 + 8) + 180 * (2 * 576 + 4)
    assert activation_bytes(shape, Setup(device="cuda"), stream, 0) == 30 * layer + ends
    recomputed = 29 * 180 * 2 * 576 + layer + ends
    assert activation_bytes(shape, Setup(device="cuda"), stream, 29) == recomputed


def test_a_gpu_without_flash_attention_keeps_repeated_keys_and_masks():
    """SmolLM2-135M: 9 heads share 3 key heads of 64. Fed 100 + 50 + 30; keys of the branches 150 + 130."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=1))
    stream = Stream.of([(100, (51, 31))])
    flash, segmented = (Setup(device="cuda", has_flash=has) for has in (True, False))
    more = 2 * (
        2 * 180 * 576 - 2 * 192 * (100 + 280)  # keys and values of each head, not gathered ones that heads share
        + 2 * 576 * 280  # copied for the branches once more
        + 50 * 150 + 30 * 130  # their masks
        + 180 * 576  # the output projection's own input
    )  # fmt: skip
    kept = [activation_bytes(shape, setup, stream, 0) for setup in (flash, segmented)]
    assert kept[1] - kept[0] == 30 * more
    reserves = [peak_memory(shape, setup, stream, 0).fixed_reserve for setup in (flash, segmented)]
    assert reserves[1] - reserves[0] == 64 * (50 * 150 + 30 * 130) // 2  # bool masks from step to step, an average one


def test_flash_attention_needs_compute_capability_8():
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": "x"}, "loss": {"name": "dpo"}})
    capabilities = (None, (7, 5), (8, 0), (12, 0))
    found = [Setup.of(recipe, "cuda", shape, capability).has_flash for capability in capabilities]
    assert found == [True, False, True, True]


def test_a_head_that_flash_attention_refuses_is_planned_in_segments():
    """Width 264 is above 256, width 60 no multiple of 8."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=1))
    stream, setup = Stream.of([(100, (51, 31))]), Setup(device="cuda")
    for width in (264, 60):
        wide = replace(shape, query_width=9 * width, key_width=3 * width)
        kept = activation_bytes(wide, setup, stream, 0)
        assert kept == activation_bytes(wide, replace(setup, has_flash=False), stream, 0)


def test_flash_attentions_workspace_counts_where_it_is_the_peak():
    """50 pairs of 20 + 2 x 30 tokens on Qwen3-0.6B: 150 segments, padded by 128 rows each, outweigh its small MLP."""
    shape = read_shape(named_config("Qwen3-0.6B"), AdapterSection())
    stream, setup = Stream.of([(20, (30, 30))] * 50), Setup(device="cuda")
    tokens, keys = 50 * 78, 50 * (20 + 2 * 49)
    workspace = 4 * (tokens + 128 * 150) * (2048 + 16) + 2 * 2 * 2048 * keys
    gradients = 2 * ((1024 + 2 * 2048) * tokens + 2 * 1024 * keys)
    less = 2 * 2 * 3072 * tokens  # the MLP's activations
    freed = (2 * 1024 + 4) * tokens + 2 * 1024 * 50 * 60  # the final norm's input, the head's gradient
    assert live_bytes(shape, setup, stream, 0) == workspace + gradients - less - freed


def test_attention_in_blocks_by_hand():
    """The prompt is one block, the first branch one of 100 keys before and 224 of its own, the second two of 150."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=1))
    stream = Stream.of([(100, (225, 301))])
    assert stream.kept_scores == 100 * 100 + 224 * 324 + 150 * 250 + 150 * 400
    flash, blocks = (
        activation_bytes(shape, setup, stream, 0)
        for setup in (Setup(device="cuda"), Setup(device="cpu", in_blocks=True))
    )
    copies, log_sums = (324 + 400 - 224 - 300) * 2 * 2 * 192, 624 * 4 * 9
    assert blocks == flash + 30 * (9 * 2 * stream.kept_scores - copies - log_sums)


def test_long_segments_keep_no_softmax():
    assert Stream.of([(1800, (249, 250))]).kept_scores == Stream.of([(1800, (249, 1))]).kept_scores
    assert Stream.of([(KEPT_KEYS + 1, (9, 9))]).kept_scores == 0


@pytest.mark.parametrize(("before", "own"), [(0, 1), (0, 224), (0, 225), (100, 500), (167, 300), (9, 0), (2000, 49)])
def test_kept_scores_are_those_of_the_blocks(before, own):
    (*_, segment) = segments([Group(start=5, prompt=before or own, branches=(own,) if before else ())])
    blocks = [(block.queries, block.keys) for block in segment.blocks(None)] if own and segment.keeps else []
    assert kept_scores(before, own) == sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks)


def test_a_cpu_without_bf16_units_attends_in_float32():
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    stream = Stream.of([(100, (51, 31))])
    on_cpu, on_gpu = (activation_bytes(shape, Setup(device=device), stream, 0) for device in ("cpu", "cuda"))
    assert on_cpu > on_gpu + 30 * 180 * 4 * 576


# Weights, adapters, optimizer


def stored_bytes(model):
    """Bytes of the model's tensors and of their quantization states, each storage once."""
    found = {}

    def add(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()

    for name, value in model.named_parameters():
        if "lora_" in name:
            continue
        add(value)
        state = getattr(value, "quant_state", None)
        if state is None:
            continue
        add(state.absmax)
        add(state.code)
        if state.nested:
            for tensor in (state.offset, state.state2.absmax, state.state2.code):
                add(tensor)
    return sum(found.values())


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
@pytest.mark.parametrize(
    "model",
    [
        {"quantization": "nf4", "double_quantization": True},
        {"quantization": "nf4", "double_quantization": False},
        {"quantization": "none", "dtype": "float32"},
    ],
    ids=["nf4 doubly", "nf4", "float32"],
)
def test_weights_are_what_is_stored(make_base, family, model):
    policy, shape, setup = load(a_recipe(make_base(family, **MEDIUM), model=model))
    assert weight_bytes(shape, setup) == pytest.approx(stored_bytes(policy.model), rel=0.01)


def test_nf4_by_hand():
    """One matrix of 576 x 576: 5184 blocks of 64, 21 blocks of 256 scales."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    one = replace(
        shape, layers=(replace(shape.layers[0], linears=shape.layers[0].linears[:1]),), embeddings=0, other_parameters=0
    )
    assert weight_bytes(one, Setup(device="cuda", double_quantization=True)) == 165_888 + 64 + 5184 + 21 * 4 + 1028
    assert weight_bytes(one, Setup(device="cuda", double_quantization=False)) == 165_888 + 64 + 5184 * 4
    assert weight_bytes(one, Setup(device="cuda", double_quantization=None)) == 331_776 * 2


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_layers_of_a_familys_own_class_are_planned_as_bitsandbytes_leaves_them(kind, tmp_path):
    policy, shape, setup = load(a_recipe(tiny_model(kind).write(tmp_path), "float32", quantization="nf4"))
    tensors = {id(value): value for name, value in policy.model.named_parameters() if "lora_" not in name}
    tensors |= {id(value): value for value in policy.decoder.buffers()}
    states = [value.quant_state for value in tensors.values() if hasattr(value, "quant_state")]
    stored = sum(value.nbytes for value in tensors.values()) + sum(each.absmax.nbytes + 64 for each in states)
    assert weight_bytes(shape, setup) == pytest.approx(stored, rel=0.01)


def test_layers_with_shared_weights_are_planned_unpacked():
    """Zamba's attention blocks; bitsandbytes leaves tied weights as they are."""
    shape = read_shape(FoundConfig(tiny_model("zamba").configuration(), "made"), AdapterSection())
    shared = {linear.name for linear in shape.linears if linear.name.startswith("shared_transf.")}
    assert {linear.name for linear in shape.linears if not linear.packed} == shared != set()


def test_a_cpu_holds_scales_unpacked():
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    values = {"model": {"base": "x"}, "data": {"train": "x"}, "loss": {"name": "dpo"}}
    doubly = [Setup.of(Recipe.model_validate(values), device, shape).double_quantization for device in ("cpu", "cuda")]
    assert doubly == [False, True]


def test_a_7b_model_takes_a_little_over_four_bits_a_weight():
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection())
    matrices = weight_bytes(replace(shape, embeddings=0, other_parameters=0), Setup(device="cuda"))
    assert 8 * matrices / shape.matmul_parameters == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_adapters_and_optimizer_are_what_a_step_leaves(make_base, optimizer):
    recipe = a_recipe(make_base("llama", **MEDIUM), adapter={"rank": 16}, train={"optimizer": optimizer})
    policy, shape, setup = load(recipe)
    trained = list(policy.trained_parameters().values())
    stepper = make_optimizer(recipe.train, trained, CPU)
    for value in trained:
        value.grad = torch.ones_like(value)
    stepper.step()
    states = [
        state
        for value in trained
        for name, state in stepper.state[value].items()
        if isinstance(state, torch.Tensor) and not name.startswith("qmap") and state.dim()
    ]
    assert adapter_bytes(shape, setup) == sum(value.nbytes + value.grad.nbytes for value in trained)
    assert optimizer_bytes(shape, optimizer) == sum(state.nbytes for state in states)


def test_paged_optimizers_keep_the_state_of_small_matrices():
    """Qwen2.5-7B at rank 16: A and B of I = 18944 are over 100,000 weights, all others are under."""
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection(rank=16))
    small = 28 * 16 * (9 * 3584 + 2 * 512)  # all but down have an A of H; q, o and down a B of H; k and v one of K
    assert optimizer_bytes(shape, "paged_adamw") == 8 * small
    eight = optimizer_bytes(shape, "paged_adamw_8bit")
    assert optimizer_bytes(shape, "adamw_8bit") - eight == 2 * 28 * 16 * 3 * 18944


def test_a_start_adapter_is_kept_twice():
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=2))
    plain, started = (adapter_bytes(shape, Setup(device="cpu", has_start=start)) for start in (False, True))
    assert (plain, started) == (8 * sum(shape.adapter_sizes), 12 * sum(shape.adapter_sizes))


def test_a_heads_adapter_counts():
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection(rank=4, targets=["lm_head"]))
    assert shape.adapter_sizes == [4 * 3584, 4 * 152064]
    assert forward_flops(shape, Stream.of([(9, (9, 9))])) > 0


# Work


def test_flops_by_hand():
    """P 100, R 50 and 30: att = 5000 + 5000 + 1250 + 3000 + 450; N = 30 (2 576^2 + 2 576 192 + 3 576 1536)."""
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(rank=16))
    stream = replace(Stream.of([(100, (50, 30))]), tokens=180)
    blocks = 2 * 106_168_320 * 180 + 4 * 576 * 30 * 14_700
    lora = 2 * 16 * 30 * (1152 + 2 * 768 + 1152 + 3 * 2112) * 180
    head = 2 * 49152 * 576 * 80
    assert shape.matmul_parameters == 106_168_320
    assert forward_flops(shape, stream) == blocks + lora + head
    backward = 2 * 106_168_320 * 180 + 2.5 * 4 * 576 * 30 * 14_700
    expected = blocks * 1.5 + backward + lora * 3.5 + 2 * head + 0.25 * (blocks + head)
    assert step_flops(shape, stream, recomputed=0.5, references=0.25) == pytest.approx(expected, rel=1e-12)


def test_sharing_a_prompt_costs_less():
    groups = [(1600, (150, 150))]
    shared, rows = Stream.of(groups), Stream.of(groups, shared=False)
    assert (shared.tokens, rows.tokens) == (1600 + 2 * 149, 2 * (1600 + 149))
    assert shared.attended_scores < rows.attended_scores


# Shapes of the whole


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [0, 14, 28])
def test_more_tokens_take_more_memory(device, layers):
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection())
    stream = Stream.of([(256, (768, 768))])
    needs = [peak_memory(shape, Setup(device=device), stream.scaled_to(n), layers).total for n in range(512, 9000, 700)]
    assert needs == sorted(set(needs))


def test_the_total_is_the_sum_of_what_is_there_at_once():
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    part = peak_memory(shape, Setup(device="cuda"), Stream.of([(100, (50, 30))]), 10)
    used = part.weights + part.adapters + part.optimizer + part.activations + max(part.live, part.head_tile)
    assert part.total == used + GIB // 4 + math.floor(0.05 * used)  # libraries; fragmentation and margin


def test_the_heads_tile_by_hand():
    """1024 rows of 2**14 columns; 2048 scored positions of width 3584, on a GPU and in bf16."""
    shape = read_shape(named_config("Qwen2.5-7B"), AdapterSection())
    stream = replace(Stream.of([(10, (1024, 1024))]), scored_tokens=2048)
    expected = 2**24 * (4 + 4 + 2) + 16 * 1024 * 3584 + 2048 * 3584 * (4 + 4 + 2)
    assert head_bytes(shape, Setup(device="cuda"), stream) == expected


def test_capped_scores_of_a_block_exist_at_a_time_and_those_of_whole_rows_are_kept():
    shared = read_shape(named_config("gemma-2-2b"), AdapterSection())
    shape, setup = replace(shared, shares_prompts=False), Setup(device="cuda")
    few, many = (activation_bytes(shared, setup, Stream.of([(n, (n, n))]), 0) for n in (500, 1000))
    assert many == pytest.approx(2 * few, rel=0.01)
    few, many = (live_bytes(shared, setup, Stream.of([(n, (n, n))]), 0) for n in (4000, 8000))
    assert many > 1.9 * few
    few, many = (activation_bytes(shape, setup, Stream.of([(n, (n, n))], shared=False), 0) for n in (500, 1000))
    assert many > 2.5 * few
    assert live_bytes(shape, setup, Stream.of([(500, (500, 500))], shared=False), 26) > 0

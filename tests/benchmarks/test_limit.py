"""The limit's formulas against numbers worked out by hand, and against torch's own counting of a tiny model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import limit
from benchmarks.limit import Work
from benchmarks.shapes import SHAPES, Shape
from benchmarks.trl_side import LINEAR

SMALL = Shape(
    name="small",
    hidden_size=2,
    intermediate_size=3,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=1,
    vocab_size=5,
    tied=True,
)
RANK, ROWS, WIDTH = 4, 2, 24


def test_shared_work_is_the_prompt_once_and_responses_that_see_it():
    # Prompt 2, responses 1 and 3: 2 * 2 / 2 + (1 * 2 + 1 / 2) + (3 * 2 + 9 / 2).
    assert limit.shared_work(2, (1, 3)) == Work(tokens=6, attended=15, head_rows=4)


def test_row_work_is_padded_to_the_longest_row():
    assert limit.row_work([(2, 1), (2, 3)]) == Work(tokens=10, attended=25, head_rows=4)
    assert limit.row_work([(2, 1), (2, 3)], compacts_head=False).head_rows == 8


def test_weights_and_widths_of_a_layer():
    # q 2x2, k 1x2, v 1x2, o 2x2, gate 3x2, up 3x2, down 2x3.
    assert limit.block_weights(SMALL) == 4 + 2 + 2 + 4 + 6 + 6 + 6
    assert limit.adapter_widths(SMALL) == 4 + 3 + 3 + 4 + 5 + 5 + 5


def test_weights_of_known_models_are_theirs():
    # Parameters by their model cards, less embeddings, head and norms.
    assert limit.block_weights(SHAPES["135M"]) == 134_515_008 - 49152 * 576 - 61 * 576
    assert limit.block_weights(SHAPES["8B"]) == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096


@pytest.mark.parametrize(
    ("recomputed", "head_products", "flops"),
    [
        # 2 N T = 360, A = 4 * 2 * 15 = 120, lora = 2 * 29 * 6 = 348, head = 2 * 5 * 2 * 4 = 80.
        (0.0, 3, 360 + 120 + 360 + 300 + 3 * 348 + 3 * 80),
        (0.0, 2, 360 + 120 + 360 + 300 + 3 * 348 + 2 * 80),
        (1.0, 3, 2 * (360 + 120) + 360 + 300 + 4 * 348 + 3 * 80),
    ],
)
def test_training_step_by_hand(recomputed, head_products, flops):
    assert limit.training_flops(SMALL, limit.shared_work(2, (1, 3)), 1, recomputed, head_products) == flops


def test_reference_pass_by_hand():
    assert limit.forward_flops(SMALL, limit.shared_work(2, (1, 3))) == 360 + 120 + 80


def test_activations_by_hand():
    # s = 2 * 2 * (2 + 2 + 1 + 3) = 32 bytes a token; a checkpoint is 4.
    assert limit.activation_bytes(SMALL, 6) == 6 * (32 + 32)
    assert limit.activation_bytes(SMALL, 6, 1.0) == 6 * (4 + 32)


def test_limit_is_the_slower_of_products_and_memory():
    assert limit.least_seconds(100, 10, flops_per_second=50, bytes_per_second=10) == 2
    assert limit.least_seconds(100, 40, flops_per_second=50, bytes_per_second=10) == 4


@pytest.fixture(scope="module")
def adapted_model():
    shape = SHAPES["tiny"]
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config)
    model.enable_input_require_grads()  # the first layer's backward pass too, as in the formula
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=LINEAR, task_type="CAUSAL_LM"))


def counted(model: torch.nn.Module, trains: bool) -> int:
    ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        logits = model(input_ids=ids, use_cache=False).logits
        if trains:
            logits.sum().backward()
    return counter.get_total_flops()


# Eager attention computes the whole square, of which a causal one is half.
SQUARE = Work(tokens=ROWS * WIDTH, attended=ROWS * WIDTH**2, head_rows=ROWS * WIDTH)


def test_forward_pass_is_what_torch_counts(adapted_model):
    assert counted(adapted_model, trains=False) == limit.forward_flops(SHAPES["tiny"], SQUARE, RANK)


def test_training_step_is_what_torch_counts(adapted_model):
    # Eager attention keeps its scores, so its backward pass has four products; a fused one makes them again, five.
    again = limit.attention_flops(SHAPES["tiny"], SQUARE) / 2
    expected = limit.training_flops(SHAPES["tiny"], SQUARE, RANK, head_products=2) - again
    assert counted(adapted_model, trains=True) == expected

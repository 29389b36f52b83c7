"""Layers with a state over a packed stream: which are found, and the rows that they compute."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TinyModel

from qpref.attention.fork import LEAST_FILLED, Fork
from qpref.attention.register import reasons_against_sharing
from qpref.attention.states import layers_with_state
from qpref.records import Group

CPU = torch.device("cpu")
LENGTHS = ((5, (3, 0, 9)), (2, (1,)), (5, (4, 4)), (1, (0, 0)))


def groups_of(lengths) -> tuple[Group, ...]:
    groups, start = [], 0
    for prompt, branches in lengths:
        groups.append(Group(start=start, prompt=prompt, branches=branches))
        start += prompt + sum(branches)
    return tuple(groups)


def spans(continued: bool = False) -> list[tuple[int, list[int]]]:
    """Each branch's prompt, by its first token, and its stream indices."""
    found, after = [], 0
    for group in groups_of(LENGTHS):
        after += 0 if continued else group.prompt
        for length in group.branches:
            if length:
                found.append((group.start, list(range(after, after + length))))
            after += length
    return found


def test_rows_hold_every_prompt_and_every_branch_from_its_prompts_end():
    fork = Fork.of(groups_of(LENGTHS), CPU)
    prompts = [row.tolist() for call in fork.prompts for row in call]
    assert sorted(prompts) == [list(range(group.start, group.start + group.prompt)) for group in groups_of(LENGTHS)]
    rows = [
        (prompts[origin][0], row.tolist())
        for call, origins in zip(fork.branches, fork.origins, strict=True)
        for row, origin in zip(call, origins.tolist(), strict=True)
    ]
    unpadded = sorted((prompt, sorted(set(row))) for prompt, row in rows)
    assert unpadded == sorted(spans())


@pytest.mark.parametrize("continued", [False, True])
def test_the_order_leads_from_rows_back_to_the_stream(continued):
    fork = Fork.of(groups_of(LENGTHS), CPU, continued=continued)
    assert bool(fork.prompts) != continued
    rows = torch.cat([call.flatten() for call in (*fork.prompts, *fork.branches)])
    assert rows[fork.order].tolist() == list(range(len(fork.order)))


def test_no_row_of_branches_is_a_decoding_step_or_mostly_padding():
    fork = Fork.of(groups_of(((4, (1,)), (3, (100, 51, 40)))), CPU)
    shapes = [tuple(call.shape) for call in fork.branches]
    assert shapes == [(2, 100), (1, 40), (1, 2)]
    assert LEAST_FILLED == 0.5


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("family", "config", "found"),
    [
        ("qwen3_5_text", {"num_hidden_layers": 4}, {(f"layers.{index}.linear_attn", True) for index in range(3)}),
        ("falcon_h1", {}, {(f"layers.{index}.mamba", True) for index in range(2)}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, {("layers.0.conv", True)}),
        ("nemotron_h", {}, {("layers.0.mixer", True)}),
        ("jamba", {}, {(f"layers.{index}.mamba", False) for index in range(2)}),
        ("llama", {}, set()),
    ],
)
def test_layers_with_a_state_are_found_by_what_they_do(family, config, found, device):
    model = TinyModel(model_type=family, config=config).make().to(device)
    assert {(name, continues) for name, _, continues in layers_with_state(model.get_decoder())} == found


@pytest.mark.parametrize(
    ("family", "reason"),
    [("jamba", "JambaMambaMixer can't continue from the state at a prompt's end"), ("minimax", "linear_attention")],
)
def test_a_layer_that_takes_no_state_is_a_reason_against_sharing(family, reason):
    (found,) = reasons_against_sharing(TinyModel(model_type=family).make().get_decoder())
    assert reason in found

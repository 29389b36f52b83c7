"""Dropout by content: masks are as good as random ones, and depend on what they should depend on."""

from __future__ import annotations

import math
from array import array

import pytest
import torch
from torch import Tensor

from qpref import dropout
from qpref.dropout import Draws, TokenDropout, drawing, step_key, text_key, token_keys
from qpref.errors import PolicyError

TOKENS, WIDTH = 1000, 1200


def keys_of(text: int = 0, tokens: int = TOKENS) -> Tensor:
    """Keys of one text's tokens."""
    return token_keys([text_key(array("i", [text]))], [tokens], torch.arange(tokens))


def dropped(
    p: float, *, text: int = 0, seed: int = 0, step: int = 0, name: str = "layer", tokens: int = TOKENS
) -> Tensor:
    """[tokens, WIDTH] 1 where a number is dropped."""
    module = TokenDropout(p, name, WIDTH)
    bits = Draws.of(lambda: keys_of(text, tokens)[None], step_key(seed, step)).bits[0]
    return (module.drop(torch.ones(tokens, WIDTH), bits) == 0).float()


def standardized(mask: Tensor, p: float) -> Tensor:
    """Mean 0 and variance 1 where each number is dropped with probability p."""
    return (mask - p) / math.sqrt(p * (1 - p))


def assert_normal(scores: Tensor) -> None:
    """Sums of many independent numbers over their standard deviation: as many large ones as a normal variable has."""
    scores = scores.double().flatten()
    count = len(scores)
    assert abs(scores.mean()) <= 5 / math.sqrt(count)
    assert abs(scores.square().mean() - 1) <= 5 * math.sqrt(2 / count) + 0.01
    assert scores.abs().max() <= math.sqrt(2 * math.log(count)) + 3


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_each_token_and_each_column_drop_their_share(p):
    scores = standardized(dropped(p), p)
    assert abs(scores.sum()) <= 4 * math.sqrt(scores.numel())
    assert_normal(scores.sum(0) / math.sqrt(TOKENS))
    assert_normal(scores.sum(1) / math.sqrt(WIDTH))


def test_shares_of_tokens_and_columns_scatter_as_binomial_ones():
    """Chi-square of all of them together; too regular masks fail as unlike ones do."""
    scores = standardized(dropped(0.2), 0.2)
    for dim, terms in ((0, TOKENS), (1, WIDTH)):
        chi_square = (scores.sum(dim).double().square() / terms).sum()
        freedom = scores.shape[1 - dim]
        assert abs(chi_square - freedom) <= 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pairs_of_tokens_and_pairs_of_columns_are_independent(p):
    scores = standardized(dropped(p), p)
    for each in (scores, scores.t()):
        count, terms = each.shape
        products = (each @ each.t() / math.sqrt(terms))[torch.ones(count, count).triu(1).bool()]
        assert_normal(products)


def test_three_columns_and_three_tokens_are_independent():
    scores = standardized(dropped(0.5), 0.5)
    for each in (scores, scores.t()):
        count, terms = each.shape
        with_first = each[:1] * each[1:]
        products = (with_first @ each[1:].t() / math.sqrt(terms))[torch.ones(count - 1, count - 1).triu(1).bool()]
        assert_normal(products)


@pytest.mark.parametrize(
    "change", [{"step": 1}, {"seed": 1}, {"name": "other"}, {"text": 1}], ids=lambda each: next(iter(each))
)
def test_masks_of_another_step_seed_layer_or_text_are_independent(change):
    one, other = (standardized(dropped(0.5, **each), 0.5) for each in ({}, change))
    product = one * other
    assert abs(product.sum()) <= 4 * math.sqrt(product.numel())
    assert_normal(product.sum(0) / math.sqrt(TOKENS))
    assert_normal(product.sum(1) / math.sqrt(WIDTH))


def test_neighbouring_tokens_of_a_text_are_independent():
    """Their keys are a constant apart, which the mixing has to hide."""
    scores = standardized(dropped(0.5), 0.5)
    for distance in (1, 2, 3):
        assert_normal((scores[:-distance] * scores[distance:]).sum(1) / math.sqrt(WIDTH))
        assert_normal((scores[:, :-distance] * scores[:, distance:]).sum(0) / math.sqrt(TOKENS))


def test_a_mask_is_the_same_in_any_company(monkeypatch):
    whole = dropped(0.3)
    assert torch.equal(dropped(0.3, tokens=10), whole[:10])
    monkeypatch.setattr(dropout, "HASHED_NUMBERS", 3 * WIDTH + 1)
    assert torch.equal(dropped(0.3), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_divided_by_its_probability(dtype):
    x = torch.randn(50, WIDTH).to(dtype)
    module = TokenDropout(0.3, "layer", WIDTH)
    bits = Draws.of(lambda: keys_of(tokens=50)[None], 0).bits[0]
    result = module.drop(x, bits)
    kept = result != 0
    assert result.dtype == dtype
    assert torch.equal(result[kept], x.div(1 - 0.3)[kept])
    assert torch.equal(module.drop(x, bits, in_place=True), result)
    assert torch.equal(x, result)


def test_a_gradient_has_the_mask_of_the_values():
    module = TokenDropout(0.4, "layer", 20)
    x = torch.randn(2, 6, 20, dtype=torch.float64, requires_grad=True)
    with drawing(Draws.of(lambda: keys_of(tokens=12).view(2, 6), 0)):
        assert torch.autograd.gradcheck(module, x, fast_mode=True)
        y = module(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)
    assert 0 < (y == 0).sum() < y.numel()


def test_nothing_is_dropped_in_eval_mode_or_with_probability_0():
    x = torch.ones(3, 20)
    assert TokenDropout(0.4, "layer", 20).eval()(x) is x
    assert TokenDropout(0.0, "layer", 20)(x) is x


@pytest.mark.parametrize("shape", [(2, 6), (12,), (2, 1, 6)], ids=str)
def test_tokens_may_be_rows_of_another_shape(shape):
    module, x = TokenDropout(0.4, "layer", 20), torch.ones(2, 6, 20)
    with drawing(Draws.of(lambda: keys_of(tokens=12).view(2, 6), 0)):
        assert torch.equal(module(x.view(*shape, 20)).view_as(x), module(x))


@pytest.mark.parametrize("shape", [(11,), (6, 2), (3, 4), (2, 6, 2)], ids=str)
def test_a_layer_that_reads_other_rows_than_the_tokens_is_refused(shape):
    """An expert's, for example, whose tokens nobody knows."""
    module = TokenDropout(0.4, "layers.0.expert", 20)
    tokens = drawing(Draws.of(lambda: keys_of(tokens=12).view(2, 6), 0))
    with tokens, pytest.raises(PolicyError, match=r"layers.0.expert reads \[.*\] rows in a pass over \[2, 6\] tokens"):
        module(torch.ones(*shape, 20))


def test_a_pass_over_tokens_that_nobody_named_is_refused():
    with pytest.raises(AssertionError, match="that nobody named"):
        TokenDropout(0.4, "layer", 20)(torch.ones(3, 20))


def test_a_text_has_another_key_where_its_prompt_ends_elsewhere():
    texts = [(array("i", [1]), array("i", [2, 3])), (array("i", [1, 2]), array("i", [3])), (array("i", [1, 2, 3]),)]
    assert len({text_key(*text) for text in texts}) == 3


def test_keys_are_those_of_each_text_and_position():
    texts, positions = [text_key(array("i", [number])) for number in range(3)], torch.tensor([0, 1, 2, 3, 0])
    keys = token_keys(texts, [2, 2, 1], positions)
    alone = [token_keys([text], [4], torch.arange(4)) for text in texts]
    assert torch.equal(keys, torch.cat([alone[0][:2], alone[1][2:], alone[2][:1]]))
    assert len(set(keys.tolist())) == 5


def test_random_bits_are_made_once_and_only_where_they_are_asked_for():
    made = []

    def keys() -> Tensor:
        made.append(None)
        return keys_of(tokens=5)[None]

    draws = Draws.of(keys, 0)
    selected = draws.selected(torch.tensor([[4, 0]]))
    assert not made
    assert torch.equal(selected.bits[0], draws.bits[0, [4, 0]])
    assert len(made) == 1


def test_keys_and_masks_are_the_same_on_every_machine():
    """A run may be resumed elsewhere: numbers that were computed once, by Python's own integers."""
    text, bits = 0x0123456789ABCDEF, 2**64 - 1

    def mixed(key: int) -> int:
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & bits
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB & bits
        return key ^ (key >> 31)

    step, module = step_key(7, 3), TokenDropout(0.25, "layer", 9)
    token = [mixed((text + position * dropout.GAMMA & bits) ^ (step & bits)) for position in range(6)]
    own = int.from_bytes(dropout.hashlib.blake2b(b"layer", digest_size=4).digest(), "little") | 1
    columns = [(mixed(number + 1) * own) % 2**32 for number in range(9)]
    wanted = [
        [(((word % 2**32) * column + (word >> 32) + 2**31) % 2**32 < 2**30) * 1.0 for column in columns]
        for word in token
    ]
    found = Draws.of(lambda: token_keys([text], [6], torch.arange(6))[None], step).bits[0]
    assert (module.drop(torch.ones(6, 9), found) == 0).float().tolist() == wanted

"""The tiled head: each token's log-probability and its gradient, against log_softmax of all logits in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qpref.errors import PolicyError
from qpref.policy import vocabulary
from qpref.policy.head import Head
from qpref.policy.logprobs import pair_logprobs
from qpref.policy.token_scores import _ScoreTokens
from qpref.records import TokenLogProbs

ROWS, WIDTH, VOCABULARY = 11, 8, 37
HEADS = {  # with a bias?, scale, cap
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.25, None),
    "cap": (False, 1.0, 3.0),
    "bias, scale and cap": (True, 2.0, 5.0),
}
# Logits that exist at a time, rows at a time: one column or row each, uneven pieces, all at once.
TILES = [(1, 1), (1, 4), (16, 4), (50, 11), (100, 3), (10_000, 1024)]


def make_head(kind: str, dtype: torch.dtype = torch.float64) -> Head:
    has_bias, scale, cap = HEADS[kind]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, dtype=torch.float64, generator=generator).to(dtype) if has_bias else None
    return Head(weight, bias, scale, cap)


def make_rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states, and tokens that include the first and the last of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    tokens[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden.requires_grad_(), tokens


def oracle(hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    """All logits at once, as the models themselves compute them, in float64."""
    logits = hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def grad_of(values: Tensor, hidden: Tensor) -> Tensor:
    """Of a sum in which every row has another factor, so that a swapped row shows."""
    factors = torch.linspace(-1, 2, len(values), dtype=torch.float64)
    return torch.autograd.grad((values * factors).sum(), hidden)[0]


SQUARES, ENTROPY = frozenset({"log_sum_squares"}), frozenset({"entropy"})


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "TILE_ELEMENTS", {"cpu": request.param[0]})
    monkeypatch.setattr(vocabulary, "MAX_ROWS", request.param[1])


@pytest.mark.parametrize("kind", HEADS)
def test_values_are_those_of_log_softmax(kind, tile):
    head, (hidden, tokens) = make_head(kind), make_rows()
    values = _ScoreTokens.apply(hidden, tokens, head)[0]
    assert (values - oracle(hidden, tokens, head)).abs().max() <= 1e-12


@pytest.mark.parametrize("wants_grad", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_sums_of_squares_are_those_of_softmax(kind, wants_grad, tile):
    head, (hidden, tokens) = make_head(kind), make_rows()
    values, squares, _ = _ScoreTokens.apply(hidden if wants_grad else hidden.detach(), tokens, head, SQUARES)
    whole = torch.stack([oracle(hidden, torch.full_like(tokens, word), head) for word in range(VOCABULARY)])
    assert (squares - (2 * whole).logsumexp(0)).abs().max() <= 1e-12
    assert not squares.requires_grad
    assert torch.equal(values, _ScoreTokens.apply(hidden, tokens, head)[0])


@pytest.mark.parametrize("wants_grad", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_entropies_are_those_of_softmax(kind, wants_grad, tile):
    head, (hidden, tokens) = make_head(kind), make_rows()
    values, squares, entropy = _ScoreTokens.apply(hidden if wants_grad else hidden.detach(), tokens, head, ENTROPY)
    whole = torch.stack([oracle(hidden, torch.full_like(tokens, word), head) for word in range(VOCABULARY)])
    assert (entropy + (whole.exp() * whole).sum(0)).abs().max() <= 1e-12
    assert not entropy.requires_grad
    assert not squares.numel()
    assert torch.equal(values, _ScoreTokens.apply(hidden, tokens, head)[0])


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_log_softmax(kind, tile):
    head, (hidden, tokens) = make_head(kind), make_rows()
    found = grad_of(_ScoreTokens.apply(hidden, tokens, head)[0], hidden)
    assert (found - grad_of(oracle(hidden, tokens, head), hidden)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", HEADS)
def test_float32_keeps_float32_accuracy(kind, tile):
    head, (hidden, tokens) = make_head(kind, torch.float32), make_rows(torch.float32)
    values = _ScoreTokens.apply(hidden, tokens, head)[0]
    assert values.dtype == torch.float32
    assert (values - oracle(hidden, tokens, head)).abs().max() <= 1e-5
    assert (grad_of(values, hidden) - grad_of(oracle(hidden, tokens, head), hidden)).abs().max() <= 1e-5


def test_values_need_no_gradient():
    head, (hidden, tokens) = make_head("plain"), make_rows()
    with torch.no_grad():
        values = _ScoreTokens.apply(hidden, tokens, head)[0]
    assert not values.requires_grad
    assert (values - oracle(hidden, tokens, head)).abs().max() <= 1e-12


@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
def test_logits_of_any_size_keep_float32_accuracy(size):
    head, (hidden, tokens) = make_head("plain", torch.float32), make_rows(torch.float32)
    large = (hidden.detach() * size).requires_grad_()
    values = _ScoreTokens.apply(large, tokens, head)[0]
    largest = (large @ head.weight.t()).abs().max().clamp(min=1)
    assert (values - oracle(large, tokens, head)).abs().max() <= 1e-6 * largest
    assert (grad_of(values, large) - grad_of(oracle(large, tokens, head), large)).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_dtype_of_the_hidden_states(dtype):
    head, (hidden, tokens) = make_head("plain", dtype), make_rows(dtype)
    assert grad_of(_ScoreTokens.apply(hidden, tokens, head)[0], hidden).dtype == dtype


def test_a_value_has_no_gradient_in_another_row(tile):
    head, (hidden, tokens) = make_head("bias, scale and cap"), make_rows()
    values = _ScoreTokens.apply(hidden, tokens, head)[0]
    for row in range(ROWS):
        (felt,) = torch.autograd.grad(values[row], hidden, retain_graph=True)
        assert (felt.abs().amax(1) > 0).nonzero().tolist() == [[row]]


def test_a_row_by_itself_has_the_value_that_it_has_among_others(tile):
    head, (hidden, tokens) = make_head("bias, scale and cap"), make_rows()
    together = _ScoreTokens.apply(hidden, tokens, head)[0]
    alone = torch.cat([_ScoreTokens.apply(hidden[i : i + 1], tokens[i : i + 1], head)[0] for i in range(ROWS)])
    assert (together - alone).abs().max() <= 1e-12


def make_adapter(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """What a head's adapter makes of the rows, and its B."""
    generator = torch.Generator().manual_seed(2)
    low, b = (torch.randn(size, 3, dtype=torch.float64, generator=generator) for size in (ROWS, VOCABULARY))
    return low.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def adapted_oracle(hidden: Tensor, tokens: Tensor, head: Head, low: Tensor, b: Tensor) -> Tensor:
    """The adapter as more columns of hidden states and weights."""
    combined = replace(head, weight=torch.cat([head.weight, b], dim=1))
    return oracle(torch.cat([hidden, low], dim=1), tokens, combined)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_an_adapter_scores_and_learns_as_one_matrix_would(kind, tile):
    head, (hidden, tokens), (low, b) = make_head(kind), make_rows(), make_adapter()
    factors = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    values, squares, entropy = _ScoreTokens.apply(hidden, tokens, head, SQUARES | ENTROPY, low, b)
    wanted = adapted_oracle(hidden, tokens, head, low, b)
    assert (values - wanted).abs().max() <= 1e-12
    words = [torch.full_like(tokens, word) for word in range(VOCABULARY)]
    whole = torch.stack([adapted_oracle(hidden, word, head, low, b) for word in words])
    assert (squares - (2 * whole).logsumexp(0)).abs().max() <= 1e-12
    assert (entropy + (whole.exp() * whole).sum(0)).abs().max() <= 1e-12
    found = torch.autograd.grad((values * factors).sum(), (hidden, low, b))
    expected = torch.autograd.grad((wanted * factors).sum(), (hidden, low, b))
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12


def test_float32_gradients_of_a_heads_adapter_keep_float32_accuracy(tile):
    head, (hidden, tokens) = make_head("bias, scale and cap", torch.float32), make_rows(torch.float32)
    low, b = make_adapter(torch.float32)
    values = _ScoreTokens.apply(hidden, tokens, head, frozenset(), low, b)[0]
    found = torch.autograd.grad(values.sum(), (low, b))
    expected = torch.autograd.grad(adapted_oracle(hidden, tokens, head, low, b).sum(), (low, b))
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def large_bf16() -> tuple[Tensor, Tensor, Head, Tensor, Tensor]:
    """1,024 tokens over a vocabulary of 32,000 in bf16 with logits of std 4, and what float64 makes of the same bits.

    Returns:
        hidden, tokens, head, [1024] values, and [1024, 64] probabilities times weights: the gradient's softmax part.
    """
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1024, 64, generator=generator).bfloat16().requires_grad_()
    head = Head(torch.randn(32_000, 64, generator=generator).mul_(0.5).bfloat16(), None, 1.0, None)
    tokens = torch.randint(32_000, (1024,), generator=generator)
    with torch.no_grad():
        scores = (hidden.double() @ head.weight.double().t()).log_softmax(-1)
        values = scores.gather(1, tokens[:, None]).squeeze(1)
        expected = scores.exp_() @ head.weight.double()
    return hidden, tokens, head, values, expected


def test_bf16_sums_over_1024_tokens_are_within_a_thousandth_of_a_nat(large_bf16):
    hidden, tokens, head, wanted, _ = large_bf16
    with torch.autocast("cpu", torch.bfloat16):
        values = _ScoreTokens.apply(hidden, tokens, head)[0]
    assert values.dtype == torch.float32
    assert abs(values.double().sum() - wanted.sum()) <= 1e-3


def test_bf16_gradients_are_within_bf16_rounding(large_bf16):
    hidden, tokens, head, _, expected = large_bf16
    found = torch.autograd.grad(_ScoreTokens.apply(hidden, tokens, head)[0].sum(), hidden)[0].double()
    wanted = head.weight[tokens].double() - expected
    # Rounding to bf16's 8 binary places moves a number by 2^-9 of itself at most. Three roundings: the gradient itself,
    # the probabilities of the slices, and their mean of weights.
    assert ((found - wanted).abs() <= 2**-9 * (wanted.abs() + 2 * head.weight.abs().max().double())).all()
    assert (found - wanted).norm() <= 2**-8 * wanted.norm()


def test_the_product_setting_of_the_process_is_as_before(large_bf16):
    matmul = torch.backends.mkldnn.matmul
    hidden, tokens, head, *_ = large_bf16
    before = matmul.fp32_precision
    assert before != "bf16"
    _ScoreTokens.apply(hidden[:4], tokens[:4], head)
    assert matmul.fp32_precision == before


def test_the_product_setting_of_the_process_is_as_before_after_an_error(large_bf16):
    matmul = torch.backends.mkldnn.matmul
    hidden, tokens, head, *_ = large_bf16
    before = matmul.fp32_precision
    assert before != "bf16"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _ScoreTokens.apply(hidden[:4, :-1], tokens[:4], head)
    assert matmul.fp32_precision == before


def test_float32_products_are_not_rounded_to_bf16():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(64, 256, generator=generator), torch.randn(512, 256, generator=generator)
    logits = Head(weight, None, 1.0, None).logits(hidden, 0, 512)
    assert (logits - hidden.double() @ weight.double().t()).abs().max() <= 1e-4  # bf16 factors are off by 0.1


class PrecisionOfProducts(TorchDispatchMode):
    """Notes the process's setting for float32 products at each of them; a CPU without bf16 units ignores it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16])
def test_products_run_on_bf16_units_where_both_factors_hold_bf16_numbers(left, right):
    head = make_head("plain", right)
    with PrecisionOfProducts() as precision:
        head.logits(make_rows(left)[0], 0, VOCABULARY)
    assert (precision.seen == {"bf16"}) == (left == right == torch.bfloat16)


def test_sides_are_dealt_in_turn():
    values = torch.arange(10.0)
    pairs = pair_logprobs(TokenLogProbs(values=values, lengths=(1, 2, 3, 4)))
    assert pairs.chosen.values.tolist() == [0, 3, 4, 5]
    assert pairs.chosen.total.tolist() == [0, 12]
    assert pairs.rejected.values.tolist() == [1, 2, 6, 7, 8, 9]
    assert pairs.rejected.mean.tolist() == [1.5, 7.5]


def tiny_model(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def test_a_head_knows_what_its_model_does_to_logits():
    from transformers import CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig, RecurrentGemmaConfig

    tiny = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0,
            "eos_token_id": 0}  # fmt: skip
    configs = [
        CohereConfig(**tiny, logit_scale=0.25),
        GraniteConfig(**tiny, logits_scaling=4.0),
        FalconH1Config(**tiny, head_dim=8, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, lm_head_multiplier=0.25),
        Gemma2Config(**tiny, head_dim=8, final_logit_softcapping=3.0),
        RecurrentGemmaConfig(**tiny | {"num_hidden_layers": 3}, lru_width=16, logits_soft_cap=3.0),
    ]
    ids = torch.tensor([[1, 2, 3, 4]])
    for config in configs:
        model = tiny_model(config).eval()
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0] * 50  # far enough for a cap to bend
            model.get_decoder().register_forward_hook(lambda *call, far=hidden: _with_hidden(call[-1], far))
            wanted = model(input_ids=ids).logits[0]
        assert (Head.of(model).logits(hidden, 0, 64) - wanted).abs().max() <= 1e-4, type(config).__name__


def _with_hidden(output, hidden: Tensor):
    output.last_hidden_state = hidden[None]
    return output


def test_a_head_that_is_no_plain_linear_layer_is_refused():
    from transformers import LlamaConfig

    model = tiny_model(LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(PolicyError, match="the output head is a Sequential; qpref needs a plain linear layer"):
        Head.of(model)

"""What is chosen fits, at the border too; the recipe's own numbers stand; advice says what each change saves."""

import math
import re
from array import array
from pathlib import Path

import pytest
import torch

from qpref.data.pack import pack
from qpref.errors import RecipeError
from qpref.memory import limit
from qpref.memory.costs import peak_memory
from qpref.memory.demand import Demand, Workload
from qpref.memory.fit import MOST_TOKENS, USEFUL_TOKENS, fit_memory
from qpref.memory.known_shapes import named_config
from qpref.memory.limit import memory_limit, parse_bytes
from qpref.memory.parts import GIB, count_text
from qpref.memory.probe import Probe, corrected, measure_bytes
from qpref.memory.setup import Setup
from qpref.memory.shape import read_shape
from qpref.memory.stream import Stream
from qpref.recipe.sections import AdapterSection, Recipe
from qpref.records import Source, TokenizedExample

CPU = torch.device("cpu")
PAIR = (256, (768, 768))
LONGEST = 256 + 2 * 767


@pytest.fixture(scope="module")
def shape():
    return read_shape(named_config("Qwen2.5-7B"), AdapterSection())


def demand(shape, device="cuda", *, tokens=None, layers=None, load=None, **setup):
    return Demand(
        shape=shape,
        setup=Setup(device=device, **setup),
        workload=load or data(),
        fixed_tokens=tokens,
        fixed_layers=layers,
    )


def data(batch_size=16, pairs=(PAIR,)):
    return Workload.of(pairs, batch_size)


def need(how, tokens, layers):
    return how.peak(tokens, layers).total


def tight_fit(shape):
    return fit_memory(demand(shape), 5 * GIB)


# The choice


def test_all_is_kept_where_there_is_room(shape):
    fit = fit_memory(demand(shape), 200 * GIB)
    assert (fit.fits, fit.recomputed_layers, fit.tokens_per_microbatch) == (True, 0, MOST_TOKENS["cuda"])


@pytest.mark.parametrize("layers", [0, 1, 13, 27])
def test_the_border_is_exact(shape, layers):
    """A limit that a useful micro-batch just fits is enough; one byte less takes one more recomputed layer."""
    exact = need(demand(shape), USEFUL_TOKENS["cuda"], layers)
    fit = fit_memory(demand(shape), exact)
    assert (fit.recomputed_layers, fit.tokens_per_microbatch) == (layers, USEFUL_TOKENS["cuda"])
    assert fit.memory.total == exact
    short = fit_memory(demand(shape), exact - 1)
    if layers < 27:  # the last layer need not be recomputed
        assert short.recomputed_layers == layers + 1
    else:
        assert short.recomputed_layers >= 27
        assert short.tokens_per_microbatch < USEFUL_TOKENS["cuda"]


def test_the_smallest_limit_is_that_of_the_longest_example(shape):
    exact = min(need(demand(shape), LONGEST, layers) for layers in (27, 28))
    fit = fit_memory(demand(shape), exact)
    assert (fit.fits, fit.tokens_per_microbatch) == (True, LONGEST)
    assert not fit_memory(demand(shape), exact - 1).fits


@pytest.mark.parametrize("gib", [8, 10, 12, 16, 24, 40, 80])
def test_what_is_chosen_fits(shape, gib):
    fit = fit_memory(demand(shape, dropout=0.05), gib * GIB)
    assert fit.fits
    assert fit.memory.total <= gib * GIB
    assert LONGEST <= fit.tokens_per_microbatch <= MOST_TOKENS["cuda"]


def test_more_memory_never_recomputes_more(shape):
    fits = [fit_memory(demand(shape), gib * GIB) for gib in range(8, 48, 4)]
    layers = [fit.recomputed_layers for fit in fits]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > layers[-1]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_micro_batch_is_never_more_than_a_step(shape, batch_size):
    fit = fit_memory(demand(shape, load=data(batch_size=batch_size)), 200 * GIB)
    assert fit.tokens_per_microbatch == batch_size * LONGEST


def test_a_micro_batch_holds_the_longest_example(shape):
    pairs = [(10, (20, 20))] * 50 + [(1000, (4000, 4000))]
    fit = fit_memory(demand(shape, load=data(batch_size=1, pairs=pairs)), 200 * GIB)
    assert fit.tokens_per_microbatch == 1000 + 2 * 3999


def test_a_cpu_takes_smaller_micro_batches():
    small = read_shape(named_config("SmolLM2-135M"), AdapterSection())
    fit = fit_memory(demand(small, "cpu", load=data(pairs=[(50, (60, 60))], batch_size=64)), 64 * GIB)
    assert (fit.tokens_per_microbatch, fit.recomputed_layers) == (MOST_TOKENS["cpu"], 0)


def test_the_recipes_numbers_stand(shape):
    tokens = fit_memory(demand(shape, tokens=2500), 24 * GIB)
    assert (tokens.fits, tokens.tokens_per_microbatch) == (True, 2500)
    layers = fit_memory(demand(shape, layers=28), 24 * GIB)
    assert layers.recomputed_layers == 28
    assert layers.tokens_per_microbatch > USEFUL_TOKENS["cuda"]
    both = fit_memory(demand(shape, tokens=8192, layers=0), 24 * GIB)
    assert (both.fits, both.tokens_per_microbatch, both.recomputed_layers) == (False, 8192, 0)


def test_a_budget_below_the_longest_example_still_has_to_hold_it(shape):
    assert need(demand(shape), 100, 28) == need(demand(shape), LONGEST, 28)


@pytest.mark.parametrize(
    ("train", "tokens", "layers"),
    [
        ({}, None, None),
        ({"tokens_per_microbatch": 700, "gradient_checkpointing": True}, 700, 28),
        ({"gradient_checkpointing": False}, None, 0),
        ({"gradient_checkpointing": 5}, None, 5),
        ({"gradient_checkpointing": 99}, None, 28),
    ],
)
def test_a_demand_keeps_the_recipes_numbers(shape, make_recipe, train, tokens, layers):
    document = make_recipe() | {"train": train}
    recipe = Recipe.model_validate(document)
    found = Demand.of(recipe, shape, Setup.of(recipe, "cpu", shape), data())
    assert (found.fixed_tokens, found.fixed_layers) == (tokens, layers)
    assert (found.setup.dtype_bytes, found.setup.double_quantization) == (4, None)


# Advice


def test_advice_says_what_each_change_saves_most_first(shape):
    fit = fit_memory(demand(shape, tokens=8192, layers=0, double_quantization=False), 5 * GIB)
    assert not fit.fits
    *changes, last = fit.advice
    saved = [float(re.search(r"saves ([\d.]+) GiB", change)[1]) for change in changes]
    assert saved == sorted(saved, reverse=True)
    text = "\n".join(changes)
    for change in (
        '[train] gradient_checkpointing = "auto"',
        '[train] tokens_per_microbatch = "auto"',
        "[adapter] rank 16 -> 8",
        '[train] optimizer = "paged_adamw_8bit"',
        "[model] double_quantization = true",
    ):
        assert change in text
    assert re.fullmatch(r"or a base of about [\d.]+ [mb]illion parameters", last)
    assert any(change.startswith("[data] max_length 1024 -> 512 saves") for change in tight_fit(shape).advice)


def test_advice_names_the_adapters_of_experts():
    adapted, without, halved = (
        demand(read_shape(named_config("Qwen3-30B-A3B"), AdapterSection(rank=rank, experts=experts)))
        for rank, experts in ((16, True), (16, False), (8, True))
    )
    lines = fit_memory(adapted, 5 * GIB).advice
    for change, other in (("[adapter] experts = false", without), ("[adapter] rank 16 -> 8", halved)):
        saved = need(adapted, *adapted.smallest()) - need(other, *other.smallest())
        assert f"{change} saves {saved / GIB:.2f} GiB" in lines
    assert not any("experts" in line for line in fit_memory(without, 5 * GIB).advice)


def test_what_advice_says_of_a_change_is_so(shape):
    """Double quantization, by the difference of the two totals."""
    plain, doubled = (demand(shape, double_quantization=double) for double in (False, True))
    (line,) = (line for line in fit_memory(plain, 5 * GIB).advice if "double_quantization" in line)
    difference = need(plain, LONGEST, 27) - need(doubled, LONGEST, 27)
    assert line == f"[model] double_quantization = true saves {difference / GIB:.2f} GiB"


def test_a_tiny_base_is_told_its_size_in_its_own_unit():
    """Not 0.0 billion: 135 million parameters in a tenth of the memory that they need."""
    tiny = demand(read_shape(named_config("SmolLM2-135M"), AdapterSection()))
    limit = need(tiny, *tiny.smallest()) // 10
    assert fit_memory(tiny, limit).advice[-1] == "or a base of about 13 million parameters"


@pytest.mark.parametrize(
    ("count", "text"),
    [(7_615_616_512, "7.62 billion"), (134_515_008, "135 million"), (12_345, "12.3 thousand"), (64, "64.0")],
)
def test_counts_are_written_with_their_unit(count, text):
    assert count_text(count) == text


def test_a_card_without_bf16_is_advised_fp16(shape):
    """It has neither bf16 nor flash attention."""
    for has_flash, dtype in ((True, "bf16"), (False, "fp16")):
        lines = fit_memory(demand(shape, dtype_bytes=4, has_flash=has_flash), 5 * GIB).advice
        assert any(line.startswith(f'[model] dtype = "{dtype}" saves') for line in lines)


def test_advice_for_a_base_that_isnt_quantized(shape):
    advice = fit_memory(demand(shape, dtype_bytes=4, double_quantization=None), 5 * GIB).advice
    assert advice[0].startswith('[model] quantization = "nf4" saves')
    assert any(line.startswith('[model] dtype = "bf16" saves') for line in advice)
    assert fit_memory(demand(shape), 200 * GIB).advice == ()


# Probes


def probed(how, stream, measured_bytes):
    return corrected(how, Probe(stream=stream, recomputed_layers=14, measured_bytes=measured_bytes))


def test_a_probe_as_predicted_changes_nothing(shape):
    how, stream = demand(shape), Stream.of([PAIR] * 2)
    part = peak_memory(shape, how.setup, stream, 14)
    after = probed(how, stream, part.activations + max(part.live, part.head_tile))
    assert fit_memory(after, 24 * GIB) == fit_memory(how, 24 * GIB)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_probe_that_took_more_recomputes_more(shape, device):
    how, stream, limit = demand(shape, device), Stream.of([PAIR] * 2), (12 if device == "cpu" else 14) * GIB
    before = fit_memory(how, limit)
    part = peak_memory(shape, how.setup, stream, 14)
    expected = part.activations + (max(part.live, part.head_tile) if device == "cuda" else 0)
    after = fit_memory(probed(how, stream, expected * 3 // 2), limit)
    assert after.recomputed_layers > before.recomputed_layers
    assert after.memory.total <= limit
    less = fit_memory(probed(how, stream, expected // 2), limit)
    assert less.recomputed_layers < before.recomputed_layers


def test_measuring_counts_each_kept_tensor_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(7, 5))
    x = torch.ones(3, 7, requires_grad=True)

    def run_once():
        hidden = (x @ weight).exp()  # keeps x, the weight, and the result
        (hidden * hidden.detach()).sum().backward()  # keeps the result once more

    assert measure_bytes(run_once, CPU) == 3 * 7 * 4 + 3 * 5 * 4


def test_a_workload_is_that_of_the_packed_stream():
    lengths = [(50, (61, 50)), (30, (21, 1)), (9, (80, 33))]
    source = Source(path="x", line=1)
    examples = [
        TokenizedExample(
            prompt=array("i", [5] * prompt),
            branches=tuple(array("i", [6] * length) for length in branches),
            truncated=(False, False),
            weight=1.0,
            margin=0.0,
            source=source,
        )
        for prompt, branches in lengths
    ]
    batch, load = pack(examples, CPU), Workload.of(lengths, 2)
    assert load.typical.tokens == batch.num_tokens
    assert load.typical.scored_tokens == batch.score_at.numel()
    assert load.step_tokens == math.ceil(batch.num_tokens / 3 * 2)
    assert load.longest.tokens == pack(examples[:1], CPU).num_tokens
    assert load.longest_lengths == lengths[0]


# The limit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GiB", 24 * 2**30),
        ("24", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("8.5gb", 8_500_000_000),
        ("512MiB", 2**29),
        (" 700 MB ", 700 * 10**6),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "24TB", "-24", "24GiBs", "1e3", "0", "nan", "2,4GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError) as caught:
        parse_bytes(text, "--vram")
    assert caught.value.what == f"--vram: expected a size such as 24GiB or 24GB, got '{text}'"


def test_the_recipes_memory_is_the_limit(make_recipe):
    recipe = Recipe.model_validate(make_recipe({"model.memory": "3GiB"}))
    assert memory_limit(recipe, CPU) == 3 * 2**30


def test_a_cpu_gives_half_of_what_a_container_has_left(make_recipe, monkeypatch):
    monkeypatch.setattr(limit, "cgroup_memory", lambda: (300 * 2**20, 100 * 2**20))
    assert memory_limit(Recipe.model_validate(make_recipe()), CPU) == 100 * 2**20
    monkeypatch.setattr(limit, "cgroup_memory", lambda: (100 * 2**20, 300 * 2**20))
    assert memory_limit(Recipe.model_validate(make_recipe()), CPU) == 0


def test_a_cpu_gives_half_of_what_is_free(make_recipe, monkeypatch):
    monkeypatch.setattr(limit, "cgroup_memory", lambda: None)
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    assert memory_limit(Recipe.model_validate(make_recipe()), CPU) == pytest.approx(free / 2, rel=0.2)

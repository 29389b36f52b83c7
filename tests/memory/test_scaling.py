"""Plans for several GPUs: bytes and seconds worked out by hand on a small shape."""

import math
from dataclasses import replace

import pytest

from qpref.memory.card_speed import ACHIEVED, DENSE_TFLOPS, Speed
from qpref.memory.cards import CARDS, find_card
from qpref.memory.costs import GATHERED_LAYERS, gathered_bytes, layer_weight_bytes, shard_bytes, weight_bytes
from qpref.memory.dealing import Dealing
from qpref.memory.demand import Demand, Workload
from qpref.memory.flops import forward_flops, step_flops
from qpref.memory.known_shapes import named_config
from qpref.memory.links import LINKS
from qpref.memory.parts import GIB
from qpref.memory.scaling import Scaling, which_mode
from qpref.memory.setup import Setup
from qpref.memory.shape import read_shape
from qpref.recipe.sections import AdapterSection

PAIR = (100, [50, 50])
SPEED = Speed(50.0, "--tflops")


@pytest.fixture(scope="module")
def shape():
    return read_shape(named_config("Qwen3-8B"), AdapterSection(rank=8))


def demand_of(shape, lengths=(PAIR,), batch_size=12, **options):
    workload = Workload.of(lengths, batch_size)
    return Demand(shape=shape, setup=Setup(device="cuda"), workload=workload, **options)


def planned(shape, gpus=2, limit=24 * GIB, link="pcie4", lengths=(PAIR,), **options):
    dealing = Dealing.of(lengths, True, 12, gpus)
    return Scaling.of(demand_of(shape, lengths, **options), dealing, limit, gpus, 1, LINKS[link], SPEED)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_layers_and_head_in_equal_parts_and_the_table_stays_on_the_host(shape, ranks):
    """36 layers; vocabulary 151936, not divisible by 3 or by 2 x 3; everything else is on every rank."""
    setup = Setup(device="cuda", num_shards=ranks)
    layer = layer_weight_bytes(shape.layers[0], setup)
    head = 2 * 4096 * math.ceil(151936 / ranks)
    assert shard_bytes(shape, setup) == 36 * math.ceil(layer / ranks) + head + 2 * shape.other_parameters
    assert gathered_bytes(shape, setup) == GATHERED_LAYERS * layer
    whole = Setup(device="cuda")
    assert (shard_bytes(shape, whole), gathered_bytes(shape, whole)) == (weight_bytes(shape, whole), 0)
    assert weight_bytes(shape, whole) == 36 * layer + 2 * (2 * 151936 * 4096 + shape.other_parameters)


def test_the_peak_of_a_rank_holds_its_part_of_the_base_and_the_gathered_layers(shape):
    setup = Setup(device="cuda", num_shards=4)
    weights = replace(demand_of(shape), setup=setup).peak(400, 0).weights
    assert weights == shard_bytes(shape, setup) + gathered_bytes(shape, setup)


def test_scoring_against_shared_rows_of_the_head_needs_the_hidden_states_of_all_ranks(shape):
    alone, shared = (
        replace(demand_of(shape), setup=Setup(device="cuda", num_shards=ranks)).peak(4096, 0).head_tile
        for ranks in (1, 4)
    )
    scored = 4096 / (100 + 2 * 49) * 100
    assert shared - alone > 3 * scored * 4096 * (4 + 4 + 2) * 0.9


def test_many_ranks_score_no_more_rows_together_than_some(shape):
    some, many = (
        replace(demand_of(shape), setup=Setup(device="cuda", num_shards=ranks)).peak(4096, 0).head_tile
        for ranks in (16, 1024)
    )
    assert many <= some


@pytest.mark.parametrize(
    ("batch_size", "ranks", "imbalance"), [(12, 2, 1.0), (12, 3, 1.0), (16, 3, 6 / (16 / 3)), (2, 8, 4.0)]
)
def test_equal_examples_that_the_ranks_do_not_divide_leave_some_waiting(batch_size, ranks, imbalance):
    assert Dealing.of([PAIR], True, batch_size, ranks).imbalance == pytest.approx(imbalance)


def test_examples_of_different_lengths_are_dealt_evenly_but_for_a_few_tokens():
    lengths = [(10 + 7 * number, [5 + 11 * number, 30]) for number in range(40)]
    few, many = (Dealing.of(lengths, True, 64, ranks).imbalance for ranks in (2, 16))
    assert 1 < few < 1.02
    assert few < many < 1.5


def test_a_replicated_step_sends_the_adapters_gradients_alone_and_waits_for_them(shape):
    """Float32, added up once a step: 2 (3 - 1) / 3 times 4 bytes a number."""
    mode = planned(shape, gpus=3).replicated
    assert mode.gradient_bytes == pytest.approx(4 / 3 * 4 * sum(shape.adapter_sizes))
    assert mode.base_bytes == 0
    assert mode.waiting_seconds == pytest.approx(LINKS["pcie4"].seconds(mode.gradient_bytes, 3))


def test_a_shared_base_is_gathered_twice_in_each_micro_batch(shape):
    """36 layers in the forward and in the backward pass; scored states and their float32 results once a step."""
    mode = planned(shape, gpus=2, fixed_tokens=396).sharded
    assert mode.microbatches == 3  # six pairs of 198 tokens, two at a time
    layers = 36 * layer_weight_bytes(shape.layers[0], Setup(device="cuda"))
    states = 2 * 6 * 100  # of both ranks: six pairs, 100 scored tokens each
    vocabulary = states * (2 * 4096 / 2 + (4 * 4096 + 8))
    assert mode.base_bytes == pytest.approx(2 * 3 * layers / 2 + vocabulary)
    assert mode.gradient_bytes == planned(shape).replicated.gradient_bytes


def test_a_table_that_is_the_head_is_looked_up_over_the_link():
    tied = read_shape(named_config("Qwen3-0.6B"), AdapterSection(rank=8))
    untied = replace(tied, embeddings=2 * tied.embeddings)
    one, two = (planned(each, gpus=2, fixed_tokens=396).sharded.base_bytes for each in (untied, tied))
    assert two - one == pytest.approx(2 * 1024 * 2 * 6 * 198)  # bf16 rows of both ranks' tokens


def test_a_fast_link_hides_behind_the_computation_and_a_slow_one_bounds_it(shape):
    """A layer is gathered while the one before it is computed, so only what takes longer than that is waited for."""
    fast, slow = (planned(shape, link=link, fixed_tokens=396).sharded for link in ("nvlink-h100", "ethernet-1g"))
    assert fast.compute_seconds == slow.compute_seconds
    assert fast.waiting_seconds < 0.05 * fast.compute_seconds
    sent = fast.base_bytes + fast.gradient_bytes
    assert slow.waiting_seconds + slow.compute_seconds == pytest.approx(sent / LINKS["ethernet-1g"].bandwidth, rel=0.05)


def test_seconds_of_computing_are_the_steps_operations_on_the_fullest_rank(shape):
    mode = planned(shape, gpus=2).replicated
    stream = demand_of(shape).workload.typical.scaled_to(6 * 198)
    assert mode.compute_seconds == pytest.approx(step_flops(shape, stream, mode.fit.recomputed_layers / 36) / 50e12)
    assert mode.compute_seconds > 2 * forward_flops(shape, stream) / 50e12
    assert mode.efficiency == pytest.approx(mode.compute_seconds / mode.step_seconds)


def test_the_best_mode_fits_and_auto_shares_the_base_only_where_it_must(shape):
    """8 billion parameters in 4 bits, with a head and a table in 16: some 6.2 GiB."""
    roomy, tight, none = (planned(shape, limit=limit) for limit in (24 * GIB, 6 * GIB, 2 * GIB))
    assert roomy.best is roomy.replicated
    assert tight.best is tight.sharded
    assert none.best is None
    demand = demand_of(shape)
    assert [which_mode(demand, limit * GIB, 2) for limit in (24, 6, 2)] == ["replicated", "sharded", "sharded"]
    assert which_mode(demand, 2 * GIB, 1) == "replicated"
    whole = replace(demand, setup=replace(demand.setup, double_quantization=None))
    assert which_mode(whole, 2 * GIB, 2) == "replicated"  # only 4-bit bases are shared


def test_a_speed_is_given_or_a_share_of_the_data_sheets():
    assert Speed.of(None, 12.5) == Speed(12.5, "--tflops")
    assert Speed.of(find_card("RTX 4090"), None).tflops == ACHIEVED * 165.2
    assert "assumed" in Speed.of(find_card("GTX 1070"), None).source
    assert set(DENSE_TFLOPS) <= {card.name for card in CARDS}

"""Links: bytes and seconds of collectives by nccl-tests' formulas, and the one that bounds a ring."""

import pytest

from qpref.errors import RecipeError
from qpref.memory.links import LINKS, Link, slowest_link


@pytest.mark.parametrize(("ranks", "sent"), [(1, 0), (2, 600), (3, 800), (4, 900)])
def test_adding_up_600_bytes_sends_twice_what_gathering_them_does(ranks, sent):
    """2 (N - 1) / N and (N - 1) / N times the bytes."""
    assert Link.sum_bytes(600, ranks) == pytest.approx(sent)
    assert Link.gather_bytes(600, ranks) == pytest.approx(sent / 2)


def test_time_is_bytes_over_bandwidth_and_a_latency_for_each_doubling_of_the_ranks():
    link = LINKS["pcie4"]
    assert link.seconds(14e9, 2) == pytest.approx(1 + link.latency)
    assert link.seconds(14e9, 9) == pytest.approx(1 + 4 * link.latency)
    assert link.seconds(0, 1) == 0


def test_no_link_is_faster_than_its_wire_and_each_names_a_source():
    for link in LINKS.values():
        assert 0.2 * link.wire <= link.bandwidth < link.wire, link
        assert "github.com/" in link.source or link.source.startswith("assumed"), link


@pytest.mark.parametrize(
    ("names", "gpus", "hosts", "expected"),
    [
        ((), 2, 1, "pcie4"),
        ((), 1, 2, "ethernet-10g"),
        ((), 8, 2, "ethernet-10g"),
        (("NVLink-H100",), 8, 1, "nvlink-h100"),
        (("nvlink-h100", "infiniband-400g"), 8, 2, "infiniband-400g"),
        (("infiniband-400g",), 8, 2, "pcie4"),
    ],
)
def test_the_slower_of_the_links_inside_and_between_hosts_bounds_a_ring(names, gpus, hosts, expected):
    assert slowest_link(names, gpus, hosts).name == expected


@pytest.mark.parametrize(
    ("names", "gpus", "hosts", "problem"),
    [
        (("nvlnk",), 2, 1, "--link nvlnk: no link of this name is known; did you mean nvlink"),
        (("ethernet-10g",), 2, 1, "--link ethernet-10g connects hosts, and the plan is for one host"),
        (("pcie4",), 1, 2, "--link pcie4 connects cards, and the plan is for one card in each host"),
        (("pcie4", "pcie5"), 2, 1, "--link pcie4 and --link pcie5 both connect cards"),
    ],
)  # fmt: skip
def test_a_link_that_is_unknown_or_connects_nothing_is_refused(names, gpus, hosts, problem):
    with pytest.raises(RecipeError) as refusal:
        slowest_link(names, gpus, hosts)
    assert refusal.value.what.startswith(problem)

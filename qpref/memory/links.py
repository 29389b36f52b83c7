"""Links between GPUs by name: the bandwidth that collectives get from each, with its source.

The bandwidth is nccl-tests' bus bandwidth: to add a message up, each of N ranks sends 2 (N - 1) / N times its bytes, to
gather it (N - 1) / N times (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). It is less than the wire's own by the
protocol, and on consumer cards since their drivers let no card write into another: every byte passes through the host's
memory. Needs no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qpref.errors import RecipeError

GB = 1e9
Reach = Literal["cards", "hosts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link.

    Attributes:
        title: the wire, for people.
        reach: what it connects: the cards of a host, or hosts.
        wire: bytes per second in one direction, by the wire's specification.
        bandwidth: bus bandwidth that collectives reach, in bytes per second.
        source: source of that.
        latency: assumed seconds of one message.
    """

    name: str
    title: str
    reach: Reach
    wire: float
    bandwidth: float
    source: str
    latency: float

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "bytes_per_second": self.bandwidth, "wire": self.wire, "source": self.source}

    @classmethod
    def sum_bytes(cls, size: float, ranks: int) -> float:
        """Bytes that each rank sends while a message of `size` bytes is added up."""
        return 2 * cls.gather_bytes(size, ranks)

    @staticmethod
    def gather_bytes(size: float, ranks: int) -> float:
        """Bytes that each rank sends while parts of `size` bytes in all are gathered by every rank."""
        return (ranks - 1) / ranks * size

    def seconds(self, sent: float, ranks: int) -> float:
        """Time of a collective in which each rank sends so many bytes; its latency grows as in NCCL's trees."""
        return 0.0 if ranks == 1 else sent / self.bandwidth + math.ceil(math.log2(ranks)) * self.latency


HALF = "assumed: the share of the wire that 8 and 4 RTX 5090 get, 28 and 35 GB/s (github.com/NVIDIA/nccl, issue 1639)"
FIFTH = "assumed: 20 % of the wire goes to NCCL's protocol (github.com/NVIDIA/nccl-tests, issue 212)"
TCP = "assumed: the share of the wire that 100 Gbit/s by TCP get, 4 to 6 GB/s (github.com/NVIDIA/nccl, issue 450)"

MEASURED_TCP = "4 hosts by TCP, 4 to 6 GB/s (github.com/NVIDIA/nccl, issue 450)"

ROWS: tuple[tuple[str, str, Reach, float, float, str, float], ...] = (
    # name, title, what it connects, GB/s of the wire, GB/s of collectives, source of these, microseconds
    ("pcie3", "PCIe 3.0 x16", "cards", 15.75, 7.0, HALF, 20),
    ("pcie4", "PCIe 4.0 x16", "cards", 31.5, 14.0, HALF, 20),
    ("pcie5", "PCIe 5.0 x16", "cards", 63.0, 28.0, "8 RTX 5090, github.com/NVIDIA/nccl, issue 1639", 20),
    ("nvlink", "an NVLink bridge of two RTX 3090", "cards", 56.25, 45.0, FIFTH, 10),
    ("nvlink-a100", "NVLink of A100 SXM", "cards", 300.0, 200.0, "8 A100, github.com/NVIDIA/nccl-tests, issue 149", 10),
    ("nvlink-h100", "NVLink of H100 and H200 SXM", "cards", 450.0, 370.0,
     "without SHARP, github.com/NVIDIA/nccl-tests, issue 212", 10),
    ("ethernet-1g", "Ethernet of 1 Gbit/s", "hosts", 0.125, 0.11, "assumed: the wire less TCP's headers", 50),
    ("ethernet-10g", "Ethernet of 10 Gbit/s", "hosts", 1.25, 1.1, "assumed: the wire less TCP's headers", 50),
    ("ethernet-25g", "Ethernet of 25 Gbit/s", "hosts", 3.125, 1.25, TCP, 50),
    ("ethernet-100g", "Ethernet of 100 Gbit/s", "hosts", 12.5, 5.0, MEASURED_TCP, 50),
    ("infiniband-200g", "InfiniBand HDR", "hosts", 25.0, 20.0, FIFTH, 10),
    ("infiniband-400g", "InfiniBand NDR", "hosts", 50.0, 40.0, FIFTH, 10),
)  # fmt: skip

LINKS = {
    name: Link(name=name, title=title, reach=reach, wire=wire * GB, bandwidth=bandwidth * GB, source=source,
               latency=microseconds * 1e-6)
    for name, title, reach, wire, bandwidth, source, microseconds in ROWS
}  # fmt: skip
DEFAULTS: dict[Reach, str] = {"cards": "pcie4", "hosts": "ethernet-10g"}


def slowest_link(names: Sequence[str], gpus: int, hosts: int) -> Link:
    """Return the link that bounds a ring through all ranks: the slower one of those inside a host and between hosts.

    Args:
        names: of `--link`, for the cards of a host, for hosts, or both; for the rest DEFAULTS are taken.
        gpus: in each host.

    Raises:
        RecipeError: a name is unknown, or two connect the same, or a link connects nothing here.
    """
    counts: dict[Reach, int] = {"cards": gpus, "hosts": hosts}
    needed: list[Reach] = [reach for reach, count in counts.items() if count > 1]
    chosen: dict[Reach, Link] = {}
    for link in map(_find_link, names):
        if link.reach not in needed:
            where = "one host" if link.reach == "hosts" else "one card in each host"
            raise RecipeError(f"--link {link.name} connects {link.reach}, and the plan is for {where}")
        if link.reach in chosen:
            raise RecipeError(f"--link {chosen[link.reach].name} and --link {link.name} both connect {link.reach}")
        chosen[link.reach] = link
    links = [chosen.get(reach) or LINKS[DEFAULTS[reach]] for reach in needed or ["cards"]]
    return min(links, key=lambda link: link.bandwidth)


def _find_link(name: str) -> Link:
    found = LINKS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), LINKS, n=3)
        near = f"; did you mean {' or '.join(close)}?" if close else ""
        raise RecipeError(f"--link {name}: no link of this name is known{near}", f"one of {', '.join(LINKS)}")
    return found

"""Plans for several GPUs, with a base on each or shared by all: memory, bytes over the link, and time of a step.

Each rank computes its part of a step's examples, and the adapters' gradients are added up once at the end. A shared
base is gathered too, a layer at a time, in the forward and in the backward pass of each micro-batch (FSDP2), which
takes no longer than the slower one of gathering and computing. Nothing here loads torch's distributed package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qpref.errors import RecipeError
from qpref.memory.card_speed import Speed
from qpref.memory.costs import gathered_bytes, layer_weight_bytes
from qpref.memory.dealing import Dealing
from qpref.memory.demand import Demand
from qpref.memory.fit import Fit, fit_memory
from qpref.memory.flops import forward_flops, step_flops
from qpref.memory.forecast import Forecast
from qpref.memory.links import Link, slowest_link
from qpref.memory.stream import Stream

ModeName = Literal["replicated", "sharded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to hold the base, on each of `ranks` GPUs.

    Attributes:
        demand: of one rank.
        fit: of one rank.
        microbatches: forward and backward passes of a step on each rank.
        gradient_bytes: bytes that each rank sends in a step to add up the adapters' gradients.
        base_bytes: bytes that each rank sends in a step to gather a shared base, and to score against its head.
        compute_seconds: computation of a step on the fullest rank.
        waiting_seconds: time of a step in which its link works and the rank doesn't.
        even_seconds: computation of a step that were divided evenly.
    """

    name: ModeName
    demand: Demand
    fit: Fit
    microbatches: int
    gradient_bytes: float
    base_bytes: float
    compute_seconds: float
    waiting_seconds: float
    even_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.waiting_seconds

    @property
    def efficiency(self) -> float:
        """Share of the step's time that an even division of its computation would take."""
        return self.even_seconds / self.step_seconds

    def facts(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "fits": fit.fits,
            "memory": fit.memory.facts(),
            "gathered_bytes": gathered_bytes(self.demand.shape, self.demand.setup),
            "tokens_per_microbatch": fit.tokens_per_microbatch,
            "recomputed_layers": fit.recomputed_layers,
            "microbatches": self.microbatches,
            "sent_bytes_per_step": {"gradients": round(self.gradient_bytes), "base": round(self.base_bytes)},
            "seconds_per_step": {"computing": self.compute_seconds, "waiting": self.waiting_seconds},
            "efficiency": self.efficiency,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """A plan for several GPUs.

    Attributes:
        gpus: in each host.
        link: the one that bounds collectives.
        speed: of one card.
        dealing: tokens of the ranks.
    """

    gpus: int
    hosts: int
    link: Link
    speed: Speed
    dealing: Dealing
    replicated: Mode
    sharded: Mode

    @classmethod
    def of(
        cls, demand: Demand, dealing: Dealing, limit_bytes: int, gpus: int, hosts: int, link: Link, speed: Speed
    ) -> Scaling:
        """Plan both modes for a run whose demand on a single device is given."""
        planned = _Planned(demand, dealing, limit_bytes, gpus * hosts, link, speed)
        return cls(
            gpus=gpus,
            hosts=hosts,
            link=link,
            speed=speed,
            dealing=dealing,
            replicated=planned.mode("replicated"),
            sharded=planned.mode("sharded"),
        )

    @property
    def ranks(self) -> int:
        return self.gpus * self.hosts

    @property
    def refusal(self) -> str | None:
        """Why this base can't be shared; None where it can."""
        return _refusal(self.sharded.demand)

    @property
    def best(self) -> Mode | None:
        """The faster mode of those that fit; None where neither does."""
        modes = (self.replicated,) if self.refusal else (self.replicated, self.sharded)
        fitting = [mode for mode in modes if mode.fit.fits]
        return min(fitting, key=lambda mode: mode.step_seconds, default=None)

    def facts(self) -> dict[str, Any]:
        best = self.best
        return {
            "gpus": self.gpus,
            "hosts": self.hosts,
            "link": self.link.facts(),
            "speed": {"tflops": self.speed.tflops, "source": self.speed.source},
            "tokens_of_a_rank": {"fullest": self.dealing.fullest, "mean": self.dealing.mean},
            "replicated": self.replicated.facts(),
            "sharded": self.sharded.facts() | {"refusal": self.refusal},
            "best": best and best.name,
        }


def plan_gpus(
    forecast: Forecast, gpus: int, hosts: int = 1, links: Sequence[str] = (), tflops: float | None = None
) -> Scaling:
    """Plan a forecast's run for several of its cards.

    Args:
        gpus: in each host.
        links: names of `qpref.memory.links`, for the cards of a host and for hosts.
        tflops: of one card; by default a share of what its data sheet says.

    Raises:
        RecipeError: the forecast is for a CPU, or a link is unknown.
    """
    target, demand = forecast.target, forecast.demand
    if target.device != "cuda":
        raise RecipeError(
            "--gpus: the plan is for the CPU", "name the card or its memory: --card 'RTX 3090', --vram 24"
        )
    link, speed = slowest_link(links, gpus, hosts), Speed.of(target.card, tflops)
    batch = forecast.plan.recipe.train.batch_size
    dealing = Dealing.of(forecast.data.lengths, demand.shape.shares_prompts, batch, gpus * hosts)
    return Scaling.of(demand, dealing, target.limit_bytes, gpus, hosts, link, speed)


def which_mode(demand: Demand, limit_bytes: int, ranks: int) -> ModeName:
    """Choose for `shard_base = "auto"`: the whole base on each rank where that fits or can't be shared, else shared.

    Args:
        demand: of a rank with the whole base.
        limit_bytes: that each rank may fill.
    """
    if ranks == 1 or _refusal(demand) is not None:
        return "replicated"
    return "replicated" if demand.peak(*demand.smallest()).total <= limit_bytes else "sharded"


def _refusal(demand: Demand) -> str | None:
    """Say why this base can't be shared; None where it can."""
    if demand.shape.double_quantization is not None:
        return "its files are in 4 bits already"
    if demand.setup.double_quantization is None:
        return "only 4-bit bases are shared"
    reason = demand.shape.against_sharding
    return reason and f"the model {reason}"


@dataclass(frozen=True, slots=True)
class _Planned:
    demand: Demand
    dealing: Dealing
    limit_bytes: int
    ranks: int
    link: Link
    speed: Speed

    def mode(self, name: ModeName) -> Mode:
        whole = self.demand
        workload = replace(whole.workload, step_tokens=math.ceil(self.dealing.fullest))
        setup = replace(whole.setup, num_shards=self.ranks if name == "sharded" else 1)
        demand = replace(whole, workload=workload, setup=setup)
        fit = fit_memory(demand, self.limit_bytes)
        passes = max(1, math.ceil(self.dealing.fullest / fit.tokens_per_microbatch))
        gradients = self.link.sum_bytes(4 * sum(demand.shape.adapter_sizes), self.ranks)
        base, waiting = self._sharing(demand, fit, passes) if name == "sharded" else (0.0, 0.0)
        return Mode(
            name=name,
            demand=demand,
            fit=fit,
            microbatches=passes,
            gradient_bytes=gradients,
            base_bytes=base,
            compute_seconds=self._seconds(fit, self.dealing.fullest),
            waiting_seconds=waiting + self.link.seconds(gradients, self.ranks),
            even_seconds=self._seconds(fit, self.dealing.mean),
        )

    def _seconds(self, fit: Fit, tokens: float) -> float:
        shape = self.demand.shape
        stream = self.demand.workload.typical.scaled_to(tokens)
        return step_flops(shape, stream, fit.recomputed_layers / shape.num_layers) / (self.speed.tflops * 1e12)

    def _sharing(self, demand: Demand, fit: Fit, passes: int) -> tuple[float, float]:
        """Bytes that a rank sends for a shared base in a step, and the time that it waits for them."""
        shape, ranks = demand.shape, self.ranks
        stream = demand.workload.typical.scaled_to(self.dealing.fullest)
        layers = [self.link.gather_bytes(layer_weight_bytes(layer, demand.setup), ranks) for layer in shape.layers]
        vocabulary = self._vocabulary_bytes(demand, stream)
        whole = self._seconds(fit, self.dealing.fullest) / passes / shape.num_layers
        forward = forward_flops(shape, stream) / (self.speed.tflops * 1e12) / passes / shape.num_layers
        waiting = self.link.seconds(vocabulary, ranks)
        for sent in layers:
            gathering = self.link.seconds(sent, ranks)
            waiting += passes * sum(max(0.0, gathering - computing) for computing in (forward, whole - forward))
        return 2 * passes * sum(layers) + vocabulary, waiting

    def _vocabulary_bytes(self, demand: Demand, stream: Stream) -> float:
        """Bytes of scoring: each rank's scored hidden states go to all, which send back float32 rows with two numbers
        each. A table of embeddings that is the head's is looked up by its rows in the same way."""
        shape, dtype = demand.shape, demand.setup.dtype_bytes
        states = self.ranks * stream.scored_tokens
        total = self.link.gather_bytes(dtype * shape.hidden * states, self.ranks)
        total += self.link.sum_bytes((4 * shape.hidden + 8) * states, self.ranks)
        if shape.embeddings == shape.vocabulary * shape.hidden:
            total += self.link.sum_bytes(dtype * shape.hidden * self.ranks * stream.tokens, self.ranks)
        return total

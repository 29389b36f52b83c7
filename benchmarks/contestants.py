"""The contestants and their workloads. To add a row to a table, add a `Contestant` here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.pairs import WORKLOADS, Pair, Workload, growing
from benchmarks.shapes import SHAPES, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One implementation and configuration to measure.

    Attributes:
        checkpointing: activation checkpointing in all layers.
        live_reference: the reference is computed in each step; otherwise its log-probabilities are cached.
        shares_prompts: each pair's prompt is computed once.
        compacts_head: the output head runs on the scored positions only.
        head_products: matrix products with the vocabulary per training step: two where the forward pass computes the
            gradient too, three where the backward pass recomputes the logits.
        pairs_per_step: pairs per optimizer step.
        pairs_per_microbatch: pairs that TRL computes at once; 0 for all of a step's.
        tokens_per_microbatch: qpref's setting.
        without: techniques of qpref that are switched off: keys of `benchmarks.qpref_side.SWITCHES`.
    """

    name: str
    side: Literal["qpref", "trl", "unsloth"]
    loss: Literal["dpo", "kto"] = "dpo"
    checkpointing: bool = False
    live_reference: bool = False
    shares_prompts: bool = False
    compacts_head: bool = True
    head_products: int = 3
    pairs_per_step: int = 1
    pairs_per_microbatch: int = 0
    tokens_per_microbatch: int = 4096
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One contestant's training in its own process.

    Attributes:
        pairs: in training order.
        device: cpu or cuda.
        folder: scratch folder.
    """

    contestant: Contestant
    base: Path
    pairs: Sequence[Pair]
    device: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Timed steps on one workload, after warm-up steps."""

    workload: Workload
    timed: int = 8
    warmup: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Contestants that take turns on the same pairs; ratios are to the first one."""

    name: str
    shape: Shape
    contestants: tuple[Contestant, ...]
    legs: tuple[Leg, ...]


QPREF = Contestant(name="qpref", side="qpref", shares_prompts=True, head_products=2)
QPREF_CHECKPOINTED = replace(QPREF, name="qpref, checkpointing on", checkpointing=True)
TRL_COMPACTED = Contestant(name="TRL compacted", side="trl", checkpointing=True, live_reference=True)
TRL_SHIPPED = replace(TRL_COMPACTED, name="TRL as shipped", compacts_head=False)
TRL_TUNED = replace(TRL_COMPACTED, name="TRL best tuned", checkpointing=False, live_reference=False)
UNSLOTH = Contestant(name="Unsloth", side="unsloth", checkpointing=True, live_reference=True)

DPO = (QPREF, QPREF_CHECKPOINTED, TRL_SHIPPED, TRL_COMPACTED, TRL_TUNED)
KTO = tuple(replace(contestant, loss="kto") for contestant in (QPREF, TRL_TUNED))

ABLATIONS = (
    QPREF,
    replace(QPREF, name="without prompt sharing", shares_prompts=False, without=("prompt sharing",)),
    replace(QPREF, name="without attention in blocks", without=("attention in blocks",)),
    replace(QPREF, name="without a known reference", live_reference=True),
    replace(QPREF, name="with checkpointing", checkpointing=True),
    replace(QPREF, name="without fused LoRA", without=("fused LoRA",)),
)
"""The first row, then each of qpref's techniques switched off. For a new one, add its switch to
`benchmarks.qpref_side.SWITCHES` and name it in `without`."""
BUDGETS = (
    replace(QPREF, name="2 pairs a step, in one micro-batch", pairs_per_step=2),
    replace(QPREF, name="2 pairs a step, each alone", pairs_per_step=2, tokens_per_microbatch=1),
)


def cpu_suite() -> list[Race]:
    """Races behind qpref's claims, in a quarter of an hour: long prompts use 12 of the 30 layers and leave out TRL as
    shipped, which takes longer there than all others together (it is in `ablation_suite`)."""
    shape, chat, long = SHAPES["135M"], Leg(workload=WORKLOADS["chat-like"]), Leg(workload=WORKLOADS["long prompt"])
    shallow = replace(shape, name="135M with 12 layers", num_hidden_layers=12)
    compacted = tuple(contestant for contestant in DPO if contestant is not TRL_SHIPPED)
    return [
        Race(name="DPO", shape=shape, contestants=DPO, legs=(chat,)),
        Race(name="DPO long", shape=shallow, contestants=compacted, legs=(replace(long, warmup=0, timed=5),)),
        Race(name="KTO", shape=shape, contestants=KTO, legs=(chat,)),
    ]


def ablation_suite() -> list[Race]:
    """Races with each technique switched off, and TRL as shipped on long prompts."""
    shape, chat, long = SHAPES["135M"], Leg(workload=WORKLOADS["chat-like"]), Leg(workload=WORKLOADS["long prompt"])
    shallow = replace(shape, name="135M with 12 layers", num_hidden_layers=12)
    return [
        Race(name="ablations", shape=shape, contestants=ABLATIONS, legs=(chat,)),
        Race(name="budget", shape=shape, contestants=BUDGETS, legs=(chat,)),
        Race(
            name="DPO long", shape=shallow, contestants=(QPREF, TRL_SHIPPED), legs=(replace(long, warmup=0, timed=5),)
        ),
    ]


def growth_suite() -> list[Race]:
    """Race of qpref on growing pair lengths; six layers instead of 30, since all layers grow alike."""
    shape = replace(SHAPES["135M"], name="135M with 6 layers", num_hidden_layers=6)
    legs = tuple(Leg(workload=growing(length), timed=1) for length in (512, 1024, 2048, 4096, 8192))
    return [Race(name="growth", shape=shape, contestants=(QPREF, QPREF_CHECKPOINTED), legs=legs)]


def quick(race: Race) -> Race:
    """Shrink a race to a smoke test with the same contestants."""
    lengths = [growing(length) for length in (64, 128)] if race.name == "growth" else [WORKLOADS["tiny"]]
    return replace(race, shape=SHAPES["tiny"], legs=tuple(Leg(workload=one, timed=3) for one in lengths))


def gpu_race(shape: Shape, workload: Workload) -> Race:
    """Race on a GPU: qpref, TRL best tuned with a step's pairs at once and one by one, and Unsloth where installed.

    A batch of TRL's is padded to its longest row, which a large model pays for; one by one, a small model waits for the
    host. The faster of both is TRL best tuned.
    """
    together = replace(TRL_TUNED, pairs_per_step=4)
    contestants = (replace(QPREF, pairs_per_step=4), together,
                   replace(together, name="TRL best tuned, pair by pair", pairs_per_microbatch=1))  # fmt: skip
    if importlib.util.find_spec("unsloth"):
        contestants += (replace(UNSLOTH, pairs_per_step=4),)
    legs = (Leg(workload=workload, timed=5, warmup=2),)
    return Race(name=f"DPO {shape.name}", shape=shape, contestants=contestants, legs=legs)

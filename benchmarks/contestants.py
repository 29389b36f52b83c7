"""Who is measured, and on what. To add a row, add a `Contestant` here; nothing else names them one by one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.pairs import WORKLOADS, Workload, growing
from benchmarks.shapes import SHAPES, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to train on a step's pairs.

    Attributes:
        checkpointing: activations are recomputed in the backward pass, in all layers.
        live_reference: the reference is computed in the step; else its log-probabilities are known.
        shares_prompts: a prompt is computed once a pair.
        compacts_head: the output head runs on scored positions alone.
        head_products: products with the vocabulary in a training step: two where the slope is computed in the forward
            pass, three where the backward pass computes the logits again.
        pairs_per_step: pairs of one optimizer step.
        tokens_per_microbatch: of qpref.
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
    tokens_per_microbatch: int = 4096
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Timed steps on one kind of data, after untimed ones."""

    workload: Workload
    timed: int = 8
    warmup: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Contestants that take turns, step by step, on the same pairs. Ratios are to the first one.

    Attributes:
        gpu_gib: what the GPU's memory is capped at; None for all of it.
    """

    name: str
    shape: Shape
    contestants: tuple[Contestant, ...]
    legs: tuple[Leg, ...]
    gpu_gib: float | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs for each contestant: one step more than is run, since TRL speaks up at the beginnings of steps."""
        steps = 1 + sum(leg.warmup + leg.timed for leg in self.legs)
        return steps * max(contestant.pairs_per_step for contestant in self.contestants)


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
"""Each technique of qpref's first row switched off. The next one goes here: say how to switch it off in
`benchmarks.qpref_side.SWITCHES`, and name that in `without`."""
BUDGETS = (
    replace(QPREF, name="2 pairs a step, in one micro-batch", pairs_per_step=2),
    replace(QPREF, name="2 pairs a step, each alone", pairs_per_step=2, tokens_per_microbatch=1),
)


def cpu_suite() -> list[Race]:
    """What qpref claims, within a quarter of an hour: on long prompts with 12 of the 30 layers, and without TRL as
    shipped, which takes longer there than all the rest (it is in `ablation_suite`)."""
    shape, chat, long = SHAPES["135M"], Leg(workload=WORKLOADS["chat-like"]), Leg(workload=WORKLOADS["long prompt"])
    shallow = replace(shape, name="135M with 12 layers", num_hidden_layers=12)
    compacted = tuple(contestant for contestant in DPO if contestant is not TRL_SHIPPED)
    return [
        Race(name="DPO", shape=shape, contestants=DPO, legs=(chat,)),
        Race(name="DPO long", shape=shallow, contestants=compacted, legs=(replace(long, warmup=0, timed=5),)),
        Race(name="KTO", shape=shape, contestants=KTO, legs=(chat,)),
    ]


def ablation_suite() -> list[Race]:
    """Each technique switched off, and TRL as shipped on long prompts."""
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
    """qpref on ever longer pairs. Six layers instead of 30: what grows with the length is the same in each."""
    shape = replace(SHAPES["135M"], name="135M with 6 layers", num_hidden_layers=6)
    legs = tuple(Leg(workload=growing(length), timed=1) for length in (512, 1024, 2048, 4096, 8192))
    return [Race(name="growth", shape=shape, contestants=(QPREF, QPREF_CHECKPOINTED), legs=legs)]


def quick(race: Race) -> Race:
    """The same contestants on next to nothing: whether the machinery works."""
    lengths = [growing(length) for length in (64, 128)] if race.name == "growth" else [WORKLOADS["tiny"]]
    return replace(race, shape=SHAPES["tiny"], legs=tuple(Leg(workload=one, timed=3) for one in lengths))


def cuda_suite() -> list[Race]:
    """The same on a GPU and larger models, then what fits under the memory of a card."""
    unsloth = (UNSLOTH,) if importlib.util.find_spec("unsloth") else ()
    legs = tuple(Leg(workload=WORKLOADS[name], timed=9, warmup=2) for name in ("chat-like", "long prompt"))
    races = [
        Race(name=f"DPO {name}", shape=SHAPES[name], contestants=(*DPO, *unsloth), legs=legs)
        for name in ("135M", "1B", "3B", "8B")
    ]
    races.append(Race(name="KTO 1B", shape=SHAPES["1B"], contestants=KTO, legs=legs[:1]))
    races.append(Race(name="ablations 1B", shape=SHAPES["1B"], contestants=ABLATIONS, legs=legs[:1]))
    races.append(Race(name="budget 1B", shape=SHAPES["1B"], contestants=BUDGETS, legs=legs[:1]))
    return races + [
        Race(
            name=f"{name} in {gib} GiB",
            shape=SHAPES[name],
            contestants=(QPREF_CHECKPOINTED, contestant),
            legs=(Leg(workload=WORKLOADS["2k pairs"]),),
            gpu_gib=gib,
        )
        for name, gib in (("3B", 8), ("8B", 8), ("8B", 12), ("8B", 16), ("8B", 24))
        for contestant in (QPREF, TRL_SHIPPED, TRL_TUNED, *unsloth)
    ]

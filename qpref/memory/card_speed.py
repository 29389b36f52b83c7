"""Speed of NVIDIA cards: 16-bit tensor products with float32 sums, dense, by their data sheets. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qpref.memory.cards import Card

ACHIEVED = 0.4
"""Assumed share of a card's products that a step reaches: 4-bit weights are dequantized, attention and norms wait for
memory. The speed of your own run (its report's TFLOP/s), given as `--tflops`, replaces it."""
UNKNOWN_TFLOPS = 50.0
"""Assumed for a card that isn't named."""

GA102 = "NVIDIA Ampere GA102 whitepaper"
ADA = "NVIDIA Ada GPU architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper"
SHEET = "NVIDIA's data sheet"

DENSE_TFLOPS: dict[str, tuple[float, str]] = {
    "RTX 3080": (59.5, GA102),
    "RTX 3090": (71.0, GA102),
    "RTX 3090 Ti": (80.0, GA102),
    "RTX 4080": (97.5, ADA),
    "RTX 4090": (165.2, ADA),
    "RTX 5080": (112.6, BLACKWELL),
    "RTX 5090": (209.5, BLACKWELL),
    "T4": (65.0, SHEET),
    "A10": (125.0, SHEET),
    "L4": (121.0, SHEET),
    "L40S": (362.0, SHEET),
    "A100": (312.0, SHEET),
    "H100": (989.0, SHEET),
    "H200": (989.0, SHEET),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Operations per second of one card in training, in TFLOP/s, and their source."""

    tflops: float
    source: str

    @classmethod
    def of(cls, card: Card | None, given: float | None) -> Speed:
        """Take the given speed, else a share of the card's, else UNKNOWN_TFLOPS."""
        if given is not None:
            return cls(given, "--tflops")
        dense = DENSE_TFLOPS.get(card.name) if card is not None else None
        if dense is None:
            return cls(UNKNOWN_TFLOPS, "assumed; --tflops sets it")
        return cls(ACHIEVED * dense[0], f"assumed: {ACHIEVED:.0%} of {dense[0]:g}, {dense[1]}; --tflops sets it")

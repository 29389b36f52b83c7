"""Memory at a step's peak, part by part, with the captions that `qpref plan` and the report print. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

GIB = 2**30
CONTEXT_BYTES, FRAGMENTATION = int(0.6 * GIB), 0.03
"""Assumed: memory of the device's libraries, and the share that the allocator loses to fragmentation."""

CAPTIONS = {
    "weights": "frozen base",
    "adapters": "adapters and their gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward pass",
    "live": "backward pass of one layer",
    "head_tile": "scoring responses",
    "reserve": "assumed: 0.6 GiB of libraries and 3 % fragmentation",
}
"""Part -> caption. Only the larger of `live` and `head_tile` counts: they are never in memory at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes on the device at a step's peak, by part.

    Attributes:
        weights: the frozen base.
        adapters: weights and gradients.
        optimizer: the state that stays on the device.
        activations: tensors that autograd keeps for the backward pass.
        live: gradients and temporaries of the costliest layer's backward pass.
        head_tile: temporaries while responses are scored; freed before the backward pass enters a layer.
        reserve: libraries and fragmentation.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    live: int
    head_tile: int

    @property
    def reserve(self) -> int:
        return CONTEXT_BYTES + int(FRAGMENTATION * self._used)

    @property
    def _used(self) -> int:
        fixed = self.weights + self.adapters + self.optimizer
        return fixed + self.activations + max(self.live, self.head_tile)

    @property
    def total(self) -> int:
        return self._used + self.reserve

    @property
    def uncounted(self) -> str:
        """Name of the part that isn't in the total: the smaller of `live` and `head_tile`."""
        return "live" if self.live < self.head_tile else "head_tile"

    def facts(self) -> dict[str, int]:
        """Bytes by part, as JSON data."""
        return asdict(self) | {"reserve": self.reserve, "total": self.total}

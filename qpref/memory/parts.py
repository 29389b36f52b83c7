"""Memory at a step's peak, part by part, with the captions that `qpref plan` and the report print. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

GIB = 2**30
CONTEXT_BYTES = int(0.4 * GIB)
"""A process's CUDA context, which a GPU's free memory already excludes once torch has started: 300 to 400 MB by
PyTorch's maintainers (github.com/pytorch/pytorch, issues 107667 and 109888). Not part of the reserve."""
LIBRARY_BYTES = {"cuda": int(0.25 * GIB), "cpu": int(0.6 * GIB)}
"""Assumed, until measured. On a GPU: kernels, bitsandbytes' among them, which load into its memory when they are first
called, and 32 MiB for cuBLAS. On a CPU: Python, torch and the products that it compiles."""
FRAGMENTATION, PREDICTION_ERROR = 0.03, 0.02
"""Assumed shares of the memory in use, until measured: what the allocator loses to fragmentation, and how far off the
prediction may be, which is what it is allowed on simulated GPUs. A 24 GB card with 21.7 GiB in use keeps
0.25 + 0.05 * 21.7 = 1.34 GiB in reserve."""

CAPTIONS = {
    "weights": "frozen base",
    "adapters": "adapters and their gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward pass",
    "live": "backward pass of one layer",
    "head_tile": "scoring responses",
    "reserve": "assumed: libraries, 3 % fragmentation, 2 % error of this prediction",
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
        fixed_reserve: of the reserve, libraries (see LIBRARY_BYTES) and the masks that attention caches.
        reserve: that, fragmentation, and a margin for the prediction's error.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    live: int
    head_tile: int
    fixed_reserve: int

    @property
    def reserve(self) -> int:
        return self.fixed_reserve + int((FRAGMENTATION + PREDICTION_ERROR) * self._used)

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
        parts = {name: size for name, size in asdict(self).items() if name != "fixed_reserve"}
        return parts | {"reserve": self.reserve, "total": self.total}


def count_text(count: float, digits: int = 3) -> str:
    """Round a count to significant digits and write it with its unit: `7.62 billion`, `135 million`."""
    units = ((1e9, " billion"), (1e6, " million"), (1e3, " thousand"))
    unit, name = next((each for each in units if count >= each[0]), (1.0, ""))
    value = float(f"{count / unit:.{digits}g}")
    return f"{value:.{max(0, digits - len(str(int(value))))}f}{name}"

"""Settings of torch that belong to the whole process or thread, and that a plugin's code must leave as they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANDOM = "random number state"
DEFAULTS: dict[str, Any] = {"grad mode": True, "inference mode": False, "deterministic algorithms": (False, False),
                            "autocast": (False, False), "anomaly detection": False}  # fmt: skip
"""Settings of a torch that has just been imported; its default dtype is float32."""
OF_THREAD = frozenset({"grad mode", "inference mode", "autocast", "default device", RANDOM})
"""Settings of which each thread has its own, or that training changes."""
AUTOCAST = ("cpu", "cuda")
"""Kinds of devices that autocast is set for, one by one."""


@dataclass(frozen=True, slots=True)
class TorchState:
    """Settings by name, as they were; empty where torch wasn't imported then."""

    settings: Mapping[str, Any]

    @classmethod
    def now(cls, *, random: bool = False) -> TorchState:
        """Read the settings.

        Args:
            random: the random numbers' state too; CUDA's is read where it is in use, without waiting for the GPU.
        """
        torch: Any = sys.modules.get("torch")
        # A plugin that is the first to import torch may be in the middle of that.
        if torch is None or not hasattr(torch, "get_default_device"):
            return cls({})
        settings = {
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "default dtype": torch.get_default_dtype(),
            "number of threads": torch.get_num_threads(),
            "deterministic algorithms": (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            "precision of float32 products": torch.get_float32_matmul_precision(),
            "default device": torch.get_default_device(),
            "autocast": tuple(torch.is_autocast_enabled(kind) for kind in AUTOCAST),
            "anomaly detection": torch.is_anomaly_enabled(),
            "cuDNN flags": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        }
        if random:
            states = [torch.get_rng_state()]
            if torch.cuda.is_initialized():
                states.append(torch.cuda.get_rng_state())
            settings[RANDOM] = states
        return cls(settings)

    def shared(self) -> TorchState:
        """Return the settings that all threads share."""
        return TorchState({name: value for name, value in self.settings.items() if name not in OF_THREAD})

    def restore(self) -> list[str]:
        """Set what has changed since back as it was, and return its names."""
        torch: Any = sys.modules.get("torch")
        now = TorchState.now(random=RANDOM in self.settings).settings
        before = self.settings or (DEFAULTS | {"default dtype": torch.float32} if now else {})
        changed = [name for name, value in before.items() if not _equal(value, now[name])]
        for name in changed:
            _set(torch, name, before[name])
        return changed


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, list):
        return len(value) == len(other) and all(bool((a == b).all()) for a, b in zip(value, other, strict=True))
    return bool(value == other)


def _set(torch: Any, name: str, value: Any) -> None:
    if name == RANDOM:
        torch.set_rng_state(value[0])
        if len(value) > 1:
            torch.cuda.set_rng_state(value[1])
    elif name == "deterministic algorithms":
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    elif name == "cuDNN flags":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = value
    elif name != "inference mode":  # which only the code that has entered it can leave
        setters = {
            "grad mode": torch.set_grad_enabled,
            "default dtype": torch.set_default_dtype,
            "number of threads": torch.set_num_threads,
            "precision of float32 products": torch.set_float32_matmul_precision,
            "default device": lambda device: torch.set_default_device(None if device.type == "cpu" else device),
            "autocast": lambda enabled: [
                torch.set_autocast_enabled(kind, was) for kind, was in zip(AUTOCAST, enabled, strict=True)
            ],
            "anomaly detection": torch.autograd.set_detect_anomaly,
        }
        setters[name](value)

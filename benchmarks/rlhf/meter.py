"""Cost of an arm's process: CPU seconds until each checkpoint, peak memory, and the models that it holds."""

from __future__ import annotations

import gc
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True, kw_only=True)
class Meter:
    """CPU seconds of all threads since it was made, and the adapters saved so far.

    Attributes:
        before: models that were there when it was made.
        labels: scores that the arm has asked of the true reward, and preferences drawn from it.
        saved: a row for each checkpoint.
        models: the most models that were in memory at once, by class, without those that were there before.
    """

    before: WeakSet[PreTrainedModel] = field(default_factory=lambda: WeakSet(models_in_memory()))
    started: float = field(default_factory=time.process_time)
    labels: int = 0
    saved: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, int] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self.started

    def note_saved(self, step: int, adapter: Path, cpu_seconds: float | None = None) -> None:
        """Record a checkpoint once it is on the disk.

        Args:
            cpu_seconds: until it was reached; by default until now.
        """
        seconds = self.cpu_seconds if cpu_seconds is None else cpu_seconds
        self.saved.append({"step": step, "cpu_seconds": seconds, "labels": self.labels, "adapter": str(adapter)})

    def count_models(self) -> None:
        """Keep the count of models if there are more than ever before."""
        found = dict(Counter(type(one).__name__ for one in models_in_memory() if one not in self.before))
        if sum(found.values()) > sum(self.models.values()):
            self.models = found


def models_in_memory() -> list[PreTrainedModel]:
    """Return transformers' models in this process; a model inside another one isn't among them."""
    from transformers import PreTrainedModel

    gc.collect()
    # type(one): isinstance would ask deprecated objects for their __class__, which warns.
    models = [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]
    inside = {id(part) for one in models for part in one.modules() if part is not one}
    return [one for one in models if id(one) not in inside]


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had, its libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

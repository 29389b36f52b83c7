"""Trains by a recipe and counts what goes through torch's collectives: `counted_training.py RECIPE OUTPUT COUNTS`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qpref


class CollectiveBytes(TorchDispatchMode):
    """Counts the bytes of each collective's tensors: the sum's own, or those that a gather fills."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            size = sum(value.nbytes for value in tree_leaves(args[0]) if isinstance(value, Tensor))
            self.counts[name] += size
            self.counts[f"{name} calls"] += 1
        return func(*args, **(kwargs or {}))


def main(recipe: str, output: str, counts: str) -> None:
    with CollectiveBytes() as mode:
        qpref.train(recipe, output=output)
    Path(f"{counts}.{os.environ['RANK']}").write_text(json.dumps(mode.counts))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The adapter for a GPU on fake tensors: a step of qpref's loop counted, and every call that only a GPU takes.

python -m tests.benchmarks.fake_gpu FOLDER
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

# isort: off
from tests.fake_cuda import fake_cuda, names  # before torch
import torch

# isort: on
from benchmarks.gpu import steps
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import Cuda
from benchmarks.shapes import make_base


def main() -> None:
    folder = Path(sys.argv[1])
    context = Context(None, True, folder, folder / "rows.json")  # type: ignore[arg-type]
    shape = context.shape("1B")
    make_base(shape, folder / "bases" / shape.name.replace(" ", "-"), nf4=True)
    found: dict[str, float] = {}
    with fake_cuda.fake_cuda() as meters:
        torch.cuda.init = torch.cuda.memory_stats = dict  # type: ignore[assignment]
        torch.cuda.get_sync_debug_mode = lambda: 0
        torch.cuda.set_sync_debug_mode = lambda mode: meters.syncs.at.clear() if mode else None
        torch.cuda.set_per_process_memory_fraction = lambda share: found.update(capped=share)
        torch.cuda.get_per_process_memory_fraction = lambda: found["capped"]
        context.device = Cuda()
        context.device.cap(8)
        described = context.device.describe()
        contexts = context.device.allocate_contexts()
        config = names_config(folder / "bases" / shape.name.replace(" ", "-"))
        names.use_stand_ins(lambda section: fake_cuda.fake_model(config, torch.bfloat16), dict)
        counted: list[object] = []
        steps.run(context, "1B", [nullcontext(), steps.counted_waits(context, counted)])
        found["waits"] = sum(meters.syncs.at.values())
        found |= context.device.memory()
    print(json.dumps(found | {"described": described, "contexts": contexts}))


def names_config(folder: Path) -> object:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config._attn_implementation = "sdpa"
    return config


if __name__ == "__main__":
    main()

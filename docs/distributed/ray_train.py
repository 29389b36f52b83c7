"""Train on a Ray cluster: Ray starts the processes and tells them of each other, qpref does the rest.

    python docs/distributed/ray_train.py my.toml --workers 16
    python docs/distributed/ray_train.py recipes/quickstart.toml --workers 2 --cpu

Each worker needs qpref, and sees the recipe, its data and the run folder at the same paths. Written for Ray 2.60.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(options: dict[str, Any]) -> None:
    """Train in one worker; Ray has set up the process group and the variables that torchrun would set."""
    import qpref

    # Ray starts all workers again after one is lost; `resume` begins a run that isn't there yet.
    qpref.train(options["recipe"], overrides=options["overrides"], output=options["output"], resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train by a recipe on a Ray cluster.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, help="run folder; default: runs/<the recipe's name>")
    parser.add_argument("--workers", type=int, default=2, help="processes, one for each GPU")
    parser.add_argument("--cpu", action="store_true", help="processes without a GPU, over gloo")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    options = parser.parse_args()
    output = (options.output or Path("runs") / options.recipe.stem).absolute()
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "recipe": str(options.recipe.absolute()),
            "output": str(output),
            "overrides": options.overrides,
        },
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        torch_config=TorchConfig(backend="gloo" if options.cpu else "nccl"),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()

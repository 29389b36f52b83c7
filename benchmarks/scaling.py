"""Measure how the cost of reading, checking, tokenizing and packing grows with the number of pairs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import race
from benchmarks.pairs import Workload, make_pairs, text
from benchmarks.shapes import SHAPES, make_base

SHORT = Workload(name="short", prompt=20, response=15)
BATCH, BUDGET = 16, 4096


def measure(scratch: Path, quick: bool) -> list[dict[str, Any]]:
    """Measure each number of pairs in a process of its own, and return a record for each."""
    base = make_base(SHAPES["tiny"], scratch / "tiny")
    found = []
    for count in (100, 300) if quick else (1_000, 10_000, 100_000):
        rows = _write_rows(scratch / f"{count}.jsonl", count)
        here, there = race.processes("cpu").Pipe()
        process = race.processes("cpu").Process(target=_prepare, args=(base, rows, there))
        process.start()
        there.close()
        found.append({"pairs": count} | here.recv())
        process.join()
    return found


def _write_rows(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for pair in make_pairs(SHORT, count, SHAPES["tiny"].vocab_size):
            sides = {"prompt": pair.prompt, "chosen": pair.chosen[:-1], "rejected": pair.rejected[:-1]}
            file.write(json.dumps({side: text(tokens) for side, tokens in sides.items()}) + "\n")
    return path


def _prepare(base: Path, rows: Path, connection: Connection) -> None:
    """Prepare the rows as for training, and send the cost; the body of a process."""
    import torch

    from benchmarks.meter import CpuMeter
    from qpref.data.load import load_rows, tokenize_rows
    from qpref.data.order import step_order, steps_per_epoch
    from qpref.data.pack import pack, split_by_tokens
    from qpref.data.tokenize import PairTokenizer
    from qpref.policy.source import resolve_base
    from qpref.policy.tokenizer import load_tokenizer, stop_tokens
    from qpref.recipe.resolve import make_plan

    plan = make_plan({"model": {"base": str(base)}, "data": {"train": str(rows)}, "loss": {"name": "dpo"}, "sinks": []})
    recipe, folder = plan.recipe, resolve_base(plan.recipe.model)
    tokenizer = PairTokenizer.of(load_tokenizer(recipe.model, folder), recipe.data.template, stop_tokens(folder))
    meter, seconds = CpuMeter(), dict[str, float]()
    meter.note_loaded()
    meter.start()
    with _stage("read_and_check", seconds):
        checked = load_rows(plan).train
    with _stage("tokenize", seconds):
        examples = tokenize_rows(checked, tokenizer, recipe.data, recipe.train.seed)
    with _stage("pack", seconds):
        for step in range(steps_per_epoch(len(examples), BATCH)):
            places = step_order(len(examples), BATCH, 0, step)
            for members in split_by_tokens([examples[place] for place in places], BUDGET):
                pack(members, torch.device("cpu"))
    connection.send({"stages": seconds} | meter.stop())


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    before = time.process_time()
    yield
    seconds[name] = time.process_time() - before

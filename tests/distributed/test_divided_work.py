"""Work of the start that processes divide, or that the first one of a machine does for all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load_worn, make_example
from processes import run_ranks

from qpref import locks
from qpref.data.load import load_rows
from qpref.data.tokenize import PairTokenizer
from qpref.distributed.world import ALONE, World
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import Recipe
from qpref.training import reference_pass
from qpref.training.prepare import prepare

EXAMPLES = [make_example(line, 3 + line % 5, 2 + line % 7, 3) for line in range(20)]
KNOWN = EXAMPLES[4:9]
"""Examples in the cache of rank 1 alone."""


def policy_of(base: str) -> Policy:
    model = {"base": base, "quantization": "none", "dtype": "float32", "device": "cpu"}
    return load_worn({"model": model, "adapter": {"rank": 4, "alpha": 8}})


def filled(world: World, base: str, caches: str, shared_at_once: int) -> dict[str, Any]:
    """Fill a store, of which the process's own cache knows some rows, and return what it has then."""
    reference_pass.SHARED_AT_ONCE = shared_at_once
    policy, folder = policy_of(base), Path(caches) / str(world.rank)
    if world.rank == 1:
        before = ReferenceStore(ReferenceCache.open(folder, "before"))
        reference_pass.fill(before, policy, KNOWN, 60)
        assert before.cache is not None
        before.cache.close()
    world.wait()
    references = ReferenceStore(ReferenceCache.open(folder, "own"))
    reference_pass.fill(references, policy, EXAMPLES, 60, world)
    assert references.cache is not None
    return {
        "rows": {key.hex(): values.tolist() for key, values in references.rows.items()},
        "computed": references.num_computed,
        "written": len(references.cache.store.folder.joinpath("own.shard").read_bytes()) > 0,
    }


@pytest.mark.parametrize("shared_at_once", [1024, 3])
def test_processes_divide_the_reference_and_have_all_of_it(make_base, tmp_path, shared_at_once):
    base = make_base(initializer_range=0.2)
    results = run_ranks(2, filled, str(base), str(tmp_path), shared_at_once)
    assert results[0]["rows"] == results[1]["rows"]
    assert set(results[0]["rows"]) == {key.hex() for example in EXAMPLES for key in row_keys(example)}
    alone = ReferenceStore()
    reference_pass.fill(alone, policy_of(str(base)), EXAMPLES, 60)
    for key, values in alone.rows.items():
        torch.testing.assert_close(torch.tensor(results[0]["rows"][key.hex()]), values, atol=1e-5, rtol=0)
    computed = [result["computed"] for result in results]
    assert sum(computed) == len(EXAMPLES) - len(KNOWN)  # each once, and those that a cache knows not at all
    assert min(computed) > sum(computed) / 3
    assert all(result["written"] for result in results)


def agreed(world: World, confirmed: list[bool]) -> list[str]:
    """Keep the rows that all processes may keep, of those that this one has after its check; returns their names."""
    restored = {b"first", b"second"}
    references = ReferenceStore()
    if confirmed[world.rank]:
        references.rows = dict.fromkeys([*sorted(restored), f"read by {world.rank}".encode()], torch.ones(1))
    reference_pass._agree_on_rows(world, references, restored)
    return [name.decode() for name in references.rows]


@pytest.mark.parametrize(
    ("confirmed", "kept"), [([True, True], ["first", "second"]), ([True, False], []), ([False, True], [])], ids=str
)
def test_stores_are_the_same_after_each_process_has_checked_its_own_cache(confirmed, kept):
    assert run_ranks(2, agreed, confirmed) == [sorted(kept)] * 2


def opened(world: World, rows: list[str], is_resumed: bool, before: Any) -> dict[str, Any]:
    """Open the cache of one reference, as a run or as the same run resumed, and add a row of the process's own."""
    prepared: Any = SimpleNamespace(
        plan=SimpleNamespace(recipe=Recipe.model_validate({"model": {"base": "b"}, "data": {"train": "d"},
                                                           "loss": {"name": "dpo"}})),
        base=SimpleNamespace(weights={"model.safetensors": "1f"}, config={}),
        policy=SimpleNamespace(device=torch.device("cpu"), attention="sdpa", packed_experts=list, adapts_experts=bool),
        fingerprints={"start adapter": ""},
        world=world,
    )  # fmt: skip
    cache = reference_pass.open_cache(prepared, before if is_resumed and world.is_first else None)
    assert cache is not None
    found = [name for name in rows if name.encode().ljust(16) in cache]
    world.wait()
    cache.add({rows[world.rank].encode().ljust(16): torch.ones(1)})
    description = reference_pass.cache_description(ReferenceStore(cache))
    cache.close()
    return {"found": found, "description": description}


def test_each_process_writes_a_shard_of_its_own_and_finds_it_when_the_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    first = run_ranks(2, opened, ["a", "b"], False, None)
    assert [each["found"] for each in first] == [[], []]
    assert first[0]["description"]["run"] != first[1]["description"]["run"]
    run_ranks(1, opened, ["another run's"], False, None)
    rows = ["a", "b", "another run's", "c"]
    resumed = run_ranks(2, opened, rows, True, first[0]["description"])
    assert [each["found"] for each in resumed] == [["a"], ["b"]]
    assert resumed[0]["description"] == first[0]["description"]
    alone = run_ranks(1, opened, rows, True, first[0]["description"])
    assert alone[0]["found"] == ["a"]
    assert sorted(run_ranks(1, opened, rows, False, None)[0]["found"]) == ["a", "another run's", "b"]


def in_turns(world: World, folder: str) -> None:
    world.wait()
    with locks.in_turn(Path(folder) / "turns" / "work", "works"):
        write_line(folder, "enters")
        time.sleep(0.3)
        write_line(folder, "leaves")


def write_line(folder: str, line: str) -> None:
    descriptor = os.open(Path(folder) / "lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def test_one_process_after_the_other(tmp_path):
    run_ranks(3, in_turns, str(tmp_path))
    assert (tmp_path / "lines").read_text().split() == ["enters", "leaves"] * 3


def test_nobody_waits_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "turns").write_text("a file, where a folder is needed")
    with locks.in_turn(tmp_path / "turns" / "work", "works"), locks.in_turn(tmp_path / "turns" / "work", "works"):
        pass


def prepared(world: World, recipe: dict[str, Any], folder: str) -> dict[str, int]:
    """Prepare a run; returns how many rows this process has tokenized itself, and how many examples it has."""
    counted, tokenize = [0], PairTokenizer.tokenize

    def counting(self: PairTokenizer, rows: Iterable[Any], *limit: Any) -> Iterator[Any]:
        rows = list(rows)
        counted[0] += len(rows)
        return tokenize(self, rows, *limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTokenizer, "tokenize", counting)
        plan = make_plan(recipe, (), Path(folder))
        examples = prepare(plan, load_rows(plan), world).examples
    return {"tokenized": counted[0], "examples": len(examples)}


def test_the_first_process_of_a_machine_tokenizes_for_all(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    results = run_ranks(2, prepared, make_recipe(), str(tmp_path / "run"))
    count = results[0]["examples"]
    assert sorted(result["tokenized"] for result in results) == [0, count]
    uncached = run_ranks(2, prepared, make_recipe({"data.cache": False}), str(tmp_path / "run"))
    assert uncached == [{"tokenized": count, "examples": count}] * 2


def test_a_process_alone_divides_nothing():
    window: list[Any] = [(example, None) for example in EXAMPLES]
    assert reference_pass._dealt(window, ALONE) == ([], EXAMPLES)
    assert reference_pass.run_of("f" * 32, 0) == "f" * 32
    others = {reference_pass.run_of("f" * 32, rank) for rank in range(1, 9)}
    assert len(others) == 8
    assert all(reference_pass.SHARD.fullmatch(f"{each}.shard") for each in others)

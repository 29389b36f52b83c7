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
from gguf_files import write_gguf
from processes import fork_ranks

from qpref import fsio, locks, publish
from qpref.data.load import load_rows
from qpref.data.tokenize import PairTokenizer
from qpref.distributed.world import ALONE, World
from qpref.policy.convert import convert_gguf
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
    references = ReferenceStore(ReferenceCache.open(folder, "own"))
    reference_pass.fill(references, policy, EXAMPLES, 60, world)
    return {
        "rows": {key.hex(): values.tolist() for key, values in references.rows.items()},
        "computed": references.num_computed,
        "written": (folder / "own.shard").stat().st_size > 0,
    }


def agreed(world: World, confirmed: tuple[bool, bool]) -> list[str]:
    """Keep the rows that all processes may keep, of those that this one has after its check; returns their names."""
    restored = {b"first", b"second"}
    references = ReferenceStore()
    if confirmed[world.rank]:
        references.rows = dict.fromkeys([*sorted(restored), f"read by {world.rank}".encode()], torch.ones(1))
    reference_pass._agree_on_rows(world, references, restored)
    return sorted(name.decode() for name in references.rows)


def shared(world: World) -> dict[str, list[float]]:
    """Share rows of which one is in all processes' stores, as their batches have rounded it."""
    references = ReferenceStore(rows={b"all have it": torch.tensor([1.0, world.rank])})
    references.rows[f"of {world.rank}".encode()] = torch.tensor([float(world.rank)])
    references.share(world, [b"all have it", b"of 0", b"of 1"])
    return {key.decode(): values.tolist() for key, values in references.rows.items()}


def opened(world: World, before: Any = None, new: str = "new") -> dict[str, Any]:
    """Open the cache of one reference, for a new run or a resumed one; read its rows, and add one."""
    document = {"model": {"base": "b"}, "data": {"train": "d"}, "loss": {"name": "dpo"}}
    run: Any = SimpleNamespace(
        plan=SimpleNamespace(recipe=Recipe.model_validate(document)),
        base=SimpleNamespace(weights={"model.safetensors": "1f"}, config={}),
        policy=SimpleNamespace(device=torch.device("cpu"), attention="sdpa", packed_experts=list, adapts_experts=bool),
        fingerprints={"start adapter": ""},
        world=world,
    )
    cache = reference_pass.open_cache(run, before)
    assert cache is not None
    found = [name for name in ROWS if name.encode().ljust(16) in cache]
    world.wait("the others")
    cache.add({new.encode().ljust(16): torch.ones(1)})
    description = reference_pass.cache_description(ReferenceStore(cache))
    cache.close()
    return {"found": found, "description": description}


def reopened(world: World) -> list[dict[str, Any]]:
    """A run's cache, and the same when the run is resumed after another one has written."""
    first = opened(world, new=ROWS[world.rank])
    world.wait("the others")
    if world.is_first:
        opened(ALONE, new="other")
    world.wait("the others")
    return [first, opened(world, first["description"] if world.is_first else None)]


def in_turns(world: World, folder: str) -> None:
    world.wait("the others")
    for _ in range(3):
        with locks.in_turn(Path(folder) / "turns" / "work", "works"):
            write_line(folder, "enters")
            time.sleep(0.1)
            write_line(folder, "leaves")


def write_line(folder: str, line: str) -> None:
    descriptor = os.open(Path(folder) / "lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def tokenized(world: World, recipe: dict[str, Any], folder: str) -> dict[str, int]:
    """Prepare a run; returns how many rows this process has tokenized itself, and how many examples it has."""
    counted, tokenize = [0], PairTokenizer.tokenize

    def counting(self: PairTokenizer, rows: Iterable[Any], *limit: Any) -> Iterator[Any]:
        rows = list(rows)
        counted[0] += len(rows)
        return tokenize(self, rows, *limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTokenizer, "tokenize", counting)
        plan = make_plan(recipe, (), Path(folder))
        examples = prepare(plan, load_rows(plan), world).all_examples
    return {"tokenized": counted[0], "examples": len(examples)}


def converted(world: World, gguf: str) -> dict[str, list[str]]:
    """Convert a GGUF file in rank 1, whose files rank 0 reads then."""
    path = Path(gguf)
    for rank in (1, 0):
        if world.rank == rank:
            folder = convert_gguf(path, fsio.sha256_file(path), has_own_tokenizer=False)
        world.wait("the others")
    return {"damaged": [publish.damaged_file(folder) or ""], "files": sorted(each.name for each in folder.iterdir())}


def everything(world: World, base: str, folder: str, recipe: dict[str, Any], uncached: dict[str, Any]) -> Any:
    in_turns(world, folder)
    return {
        "filled": [filled(world, base, f"{folder}/{size}", size) for size in (1024, 3)],
        "agreed": [agreed(world, each) for each in CONFIRMED],
        "shared": shared(world),
        "converted": converted(world, f"{folder}/tiny.gguf"),
        "reopened": reopened(world),
        "tokenized": [tokenized(world, each, f"{folder}/run") for each in (recipe, uncached)],
    }


ROWS = ["a", "b", "new", "other"]
CONFIRMED = [(True, True), (True, False), (False, True)]
_found: dict[str, Any] = {}


@pytest.fixture
def results(make_base, make_recipe, tmp_path_factory) -> dict[str, Any]:
    """What two processes have found, and the folder and the base that they used; they are started once."""
    if not _found:
        folder, base = tmp_path_factory.mktemp("divided"), str(make_base(initializer_range=0.2))
        write_gguf(folder / "tiny.gguf")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QPREF_CACHE", str(folder / "cache"))
            recipes = make_recipe(), make_recipe({"data.cache": False})
            ranks = fork_ranks(2, everything, base, str(folder), *recipes, limit=500)
        _found.update({name: [rank[name] for rank in ranks] for name in ranks[0]}, folder=folder, base=base)
    return _found


@pytest.mark.parametrize("index", [0, 1], ids=["in one part", "in many parts"])
def test_processes_divide_the_reference_and_have_all_of_it(results, index):
    first, second = (rank[index] for rank in results["filled"])
    assert first["rows"] == second["rows"]
    assert set(first["rows"]) == {key.hex() for example in EXAMPLES for key in row_keys(example)}
    alone = ReferenceStore()
    reference_pass.fill(alone, policy_of(results["base"]), EXAMPLES, 60)
    for key, values in alone.rows.items():
        torch.testing.assert_close(torch.tensor(first["rows"][key.hex()]), values, atol=1e-5, rtol=0)
    computed = first["computed"], second["computed"]
    assert sum(computed) == len(EXAMPLES) - len(KNOWN)  # each once, and those that a cache knows not at all
    assert min(computed) > sum(computed) / 3
    assert first["written"]
    assert second["written"]


def test_stores_are_the_same_after_each_process_has_checked_its_own_cache(results):
    assert results["agreed"] == [[["first", "second"], [], []]] * 2


def test_all_processes_have_the_same_bits_of_a_row_that_several_have_computed(results):
    assert results["shared"] == [{"all have it": [1.0, 0.0], "of 0": [0.0], "of 1": [1.0]}] * 2


def test_each_process_writes_a_shard_of_its_own_and_finds_it_when_the_run_is_resumed(results, monkeypatch):
    (first, resumed), (other_first, other_resumed) = results["reopened"]
    assert (first["found"], other_first["found"]) == ([], [])
    assert first["description"]["run"] != other_first["description"]["run"]
    assert (resumed["found"], other_resumed["found"]) == (["a"], ["b"])
    assert resumed["description"] == first["description"]
    monkeypatch.setenv("QPREF_CACHE", str(results["folder"] / "cache"))
    assert opened(ALONE)["found"] == ROWS
    assert opened(ALONE, first["description"])["found"] == ["a", "new"]  # of rank 0 alone, which has written twice


def test_a_process_whose_rank_is_not_0_converts_a_base(results):
    """transformers writes no file there."""
    for each in results["converted"]:
        assert each["damaged"] == [""]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(each["files"])


def test_one_process_after_the_other(results):
    assert (results["folder"] / "lines").read_text().split() == ["enters", "leaves"] * 6


def test_the_first_process_of_a_machine_tokenizes_for_all(results):
    cached, uncached = zip(*results["tokenized"], strict=True)
    count = cached[0]["examples"]
    assert sorted(each["tokenized"] for each in cached) == [0, count]
    assert uncached == ({"tokenized": count, "examples": count},) * 2


def test_nobody_waits_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "turns").write_text("a file, where a folder is needed")
    with locks.in_turn(tmp_path / "turns" / "work", "works"), locks.in_turn(tmp_path / "turns" / "work", "works"):
        pass


def test_a_process_alone_divides_nothing():
    window: list[Any] = [(example, None) for example in EXAMPLES]
    assert reference_pass._dealt(window, ALONE) == ([], EXAMPLES)
    assert reference_pass.run_of("f" * 32, 0) == "f" * 32
    others = {reference_pass.run_of("f" * 32, rank) for rank in range(1, 9)}
    assert len(others) == 8
    assert all(reference_pass.SHARD.fullmatch(f"{each}.shard") for each in others)

"""A reference is computed once for all runs of it, and a run never notices what others write meanwhile."""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Outcome, outcome, preference_rows, write_jsonl
from edited_runs import edit_facts, reseal

import qpref
from qpref import fsio, shards
from qpref.data.pack import num_fed_tokens, pack
from qpref.distributed.world import ALONE
from qpref.errors import DiskError
from qpref.policy import reference, reference_cache
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import ReferenceCache, check_key
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe
from qpref.records import Source, TokenizedExample
from qpref.training import checkpoint, invariants, optim, reference_check, reference_pass

NUM_EXAMPLES = 16
"""Of `make_recipe`'s data, training and held-out."""
ALL_KNOWN = "reference: 32 of 32 responses are in the cache (100 %)"


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where the references' folders are, of this test alone."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@dataclass
class Notes:
    """What runs did: log lines of all, reference passes by the module that asked, examples that the stores computed."""

    said: list[str] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    stores: list[ReferenceStore] = field(default_factory=list)

    @property
    def num_computed(self) -> int:
        return sum(store.num_computed for store in self.stores)

    def clear(self) -> None:
        for each in (self.said, self.passes, self.stores):
            each.clear()


@pytest.fixture
def notes(monkeypatch) -> Iterator[Notes]:
    made = Notes()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            made.said.append(record.getMessage())

    def noting(module: Any) -> Callable[..., Any]:
        return lambda policy: (made.passes.append(module.__name__.rpartition(".")[2]), as_reference(policy))[1]

    def opened(*parts: Any) -> ReferenceStore:
        made.stores.append(ReferenceStore(*parts))
        return made.stores[-1]

    for module, name in ((reference, "as_reference"), (invariants, "as_start"), (reference_check, "as_reference")):
        monkeypatch.setattr(module, name, noting(module))
    monkeypatch.setattr(reference_pass, "ReferenceStore", opened)
    listener, log = Listener(), logging.getLogger("qpref")
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    yield made
    log.setLevel(level)
    log.removeHandler(listener)


ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the cache that `known` lays out is kept from test to test."""
    return tmp_path_factory.mktemp("kept") / "reference"


@pytest.fixture
def known(kept, cache, make_recipe, tmp_path) -> Path:
    """The shard of a run of `make_recipe()`, which has all its rows."""
    if not kept.exists():
        qpref.train(make_recipe(), output=tmp_path / "known")
        shutil.copytree(cache, kept)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(kept, cache)
    (shard,) = cache.glob("*/*.shard")
    return shard


def rewrite(shard: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change every row of a shard, with good checksums, and leave its check rows."""
    write_rows(shard, {key: change(values) for key, values in rows_in(shard).items()})


def rows_in(shard: Path) -> dict[bytes, torch.Tensor]:
    """A shard's rows, without its check rows."""
    rows = ReferenceCache.open(shard.parent, "reader", {shard.name: shard.stat().st_size})
    return {key: rows.get(key) for key in rows.store._index if key != check_key(shard.name)}


def write_rows(shard: Path, rows: dict[bytes, torch.Tensor]) -> None:
    """Make a shard hold these rows and the check rows that it had."""
    assert rows
    store = ReferenceCache.open(shard.parent, "reader", {shard.name: shard.stat().st_size}).store
    records = {check_key(shard.name): store.get(check_key(shard.name))}
    records |= {key: reference_cache.to_bytes(values) for key, values in rows.items()}
    shard.write_bytes(b"".join(shards.record(key, content) for key, content in records.items()))


# Later runs.


def test_a_first_run_computes_each_row_once_and_writes_it_down(make_recipe, tmp_path, notes, cache):
    qpref.train(make_recipe({"train.epochs": 2}), output=tmp_path / "run")
    assert notes.num_computed == NUM_EXAMPLES
    (shard,) = cache.glob("*/*.shard")
    assert {key: values.tolist() for key, values in rows_in(shard).items()} == {
        key: values.tolist() for key, values in notes.stores[0].rows.items()
    }
    assert len(ReferenceCache.open(shard.parent, "reader")) == 2 * NUM_EXAMPLES
    described = json.loads((tmp_path / "run" / "run.json").read_text())["reference_cache"]
    assert described == {"run": shard.stem, "seen": {}}


OTHER_RUNS = {
    "beta": {"loss.beta": 0.3},
    "loss": {"loss.name": "ipo"},
    "learning rate": {"train.learning_rate": 1e-4},
    "seed": {"train.seed": 7},
    "adapter": {"adapter.rank": 2, "adapter.dropout": 0.1},
    "batches": {"train.batch_size": 6, "train.tokens_per_microbatch": 150},
    "layers checkpointed": {"train.gradient_checkpointing": True},
}


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_a_run_computes_nothing_but_its_check_batch_after_one_with_another(
    other, make_recipe, tmp_path, known, notes, cache
):
    qpref.train(make_recipe(OTHER_RUNS[other]), output=tmp_path / "second")
    assert notes.num_computed == 0
    assert notes.passes == ["invariants", "reference_check"]
    assert ALL_KNOWN in notes.said
    assert "reference: one recomputed batch agrees with the cache, 0.0000 nats a token apart on average" in notes.said
    assert len(list(cache.glob("*/*.shard"))) == 1


def test_rows_are_found_in_another_file_and_order_and_only_new_ones_computed(make_recipe, tmp_path, known, notes):
    rows = preference_rows(14)[::-1]  # two more, which come in the first batches or the last
    moved = write_jsonl(tmp_path / "moved.jsonl", rows)
    qpref.train(make_recipe({"data.train": str(moved), "train.tokens_per_microbatch": 1}), output=tmp_path / "second")
    assert notes.num_computed == 2
    assert "reference: 32 of 36 responses are in the cache (89 %)" in notes.said


def test_a_third_run_reads_what_two_before_it_wrote(make_recipe, tmp_path, notes, cache):
    for name, count in (("first", 6), ("second", 12)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", preference_rows(count))
        qpref.train(make_recipe({"data.train": str(data)}), output=tmp_path / name)
    assert len(list(cache.glob("*/*.shard"))) == 2
    notes.clear()
    qpref.train(make_recipe(), output=tmp_path / "third")
    assert notes.num_computed == 0


def test_a_cached_reference_trains_the_same_adapter_to_the_bit(make_recipe, tmp_path, known):
    other = {"loss.beta": 0.3}
    cached = qpref.train(make_recipe(other), output=tmp_path / "cached").path
    alone = qpref.train(make_recipe(other | {"reference.cache": False}), output=tmp_path / "alone").path
    assert (cached / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()


def test_a_loss_without_a_reference_opens_no_cache(make_recipe, tmp_path, notes, cache):
    folder = qpref.train(make_recipe({"loss.name": "simpo"}), output=tmp_path / "run").path
    assert not cache.exists()
    assert json.loads((folder / "run.json").read_text())["reference_cache"] is None


def test_a_run_without_a_cache_neither_writes_nor_reads_one(make_recipe, tmp_path, known, notes, cache):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    folder = qpref.train(make_recipe({"reference.cache": False}), output=tmp_path / "run").path
    assert notes.num_computed == NUM_EXAMPLES
    assert json.loads((folder / "run.json").read_text())["reference_cache"] is None
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_disk_that_refuses_the_cache_is_warned_of_once_and_the_run_goes_on(make_recipe, tmp_path, notes, monkeypatch):
    real = fsio.AppendLog.append

    def append(log: fsio.AppendLog, data: bytes, durable: bool = True) -> None:
        if log._path.suffix == ".shard":
            raise DiskError(f"{log._path}: cannot be written: No space left on device")
        real(log, data, durable)

    monkeypatch.setattr(fsio.AppendLog, "append", append)
    folder = qpref.train(make_recipe(), output=tmp_path / "run").path
    monkeypatch.undo()
    refused = [line for line in notes.said if "the cache is no longer written" in line]
    assert sum("/reference/" in line for line in refused) == 1
    alone = qpref.train(make_recipe({"reference.cache": False}), output=tmp_path / "alone").path
    assert (folder / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()


def test_a_disk_that_is_full_at_the_end_costs_the_cache_and_not_the_adapter(make_recipe, tmp_path, notes, monkeypatch):
    real = fsio.AppendLog.append

    def append(log: fsio.AppendLog, data: bytes, durable: bool = True) -> None:
        if log._path.suffix == ".shard" and not data:
            raise DiskError(f"{log._path}: cannot be written: No space left on device")
        real(log, data, durable)

    monkeypatch.setattr(fsio.AppendLog, "append", append)
    folder = qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "run").path
    assert (folder / ADAPTER).is_file()
    assert any("the cache may have lost its last records" in line for line in notes.said)


def test_a_run_goes_on_where_the_cache_cannot_be_made(make_recipe, tmp_path, notes, cache):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("in the way")
    folder = qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "run").path
    assert (folder / ADAPTER).is_file()
    assert any("the reference is not cached" in line for line in notes.said)
    assert json.loads((folder / "run.json").read_text())["reference_cache"] is None


def test_a_start_adapter_that_is_scaled_otherwise_is_another_reference(make_recipe, tmp_path, notes):
    start = qpref.train(
        make_recipe({"train.max_steps": 2, "train.learning_rate": 0.02}), output=tmp_path / "start"
    ).path
    recipe = make_recipe({"train.max_steps": 1, "adapter.start": str(start / "adapter")})
    qpref.train(recipe, output=tmp_path / "one")
    settings = start / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 8.5}))
    reseal(start)
    notes.clear()
    qpref.train(recipe, output=tmp_path / "two")
    assert "reference: 0 of 32 responses are in the cache (0 %)" in notes.said


def test_filling_before_training_leaves_nothing_to_compute_in_it(make_recipe, tmp_path, notes):
    qpref.train(make_recipe({"reference.fill": "before"}), output=tmp_path / "run")
    assert "reference: scoring 16 examples before training" in notes.said
    assert notes.num_computed == NUM_EXAMPLES


def test_a_run_that_starts_shrinks_what_others_left(make_recipe, tmp_path, monkeypatch, cache):
    old = cache / "another" / "old.shard"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(1000))
    qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "roomy")
    assert old.exists()
    monkeypatch.setenv("QPREF_REFERENCE_CACHE_BYTES", "500")
    qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "tight")
    assert not old.exists()
    assert len(list(cache.glob("*/*.shard"))) == 1  # the reference in use is kept, over the limit as it is


def test_what_a_run_can_use_itself_is_kept_over_the_limit(make_recipe, tmp_path, monkeypatch, known, notes):
    monkeypatch.setenv("QPREF_REFERENCE_CACHE_BYTES", "1")
    qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "run")
    assert notes.num_computed == 0


# Which reference it is.


RECIPE = {
    "model": {"base": "x"},
    "data": {"train": "y"},
    "loss": {"name": "dpo"},
}
POLICY = SimpleNamespace(
    device=torch.device("cpu"), attention="qpref_segments", packed_experts=list, adapts_experts=bool
)
WEIGHTS = {"model.safetensors": "1f"}
CONFIG = {"rope_theta": 1e4, "hidden_size": 64}


@dataclass(frozen=True)
class Base:
    """As a `BaseFolder`, without a folder."""

    path: Path = Path("x")
    weights: dict[str, str] = field(default_factory=lambda: WEIGHTS)
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)


def folder(
    recipe: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    start: str = "",
) -> Path:
    """Of the reference of a recipe, a base and a policy with these changes."""
    changes = recipe or {}
    document = {table: RECIPE.get(table, {}) | changes.get(table, {}) for table in RECIPE.keys() | changes.keys()}
    used = SimpleNamespace(**vars(POLICY) | (policy or {}))
    prepared = SimpleNamespace(
        plan=SimpleNamespace(recipe=Recipe.model_validate(document)),
        base=Base(**base or {}),
        policy=used,
        fingerprints={"start adapter": start},
        world=ALONE,
    )
    cache = reference_pass.open_cache(prepared, None)
    cache.close()
    return cache.store.folder


CHANGES: dict[str, dict[str, Any]] = {
    "a weight file": {"base": {"weights": {"model.safetensors": "2f"}}},
    "a weight file more": {"base": {"weights": WEIGHTS | {"more.safetensors": "1f"}}},
    "rope_theta": {"base": {"config": CONFIG | {"rope_theta": 1e6}}},
    "quantization": {"recipe": {"model": {"quantization": "none"}}},
    "double quantization": {"recipe": {"model": {"double_quantization": False}}},
    "dtype": {"recipe": {"model": {"dtype": "float32"}}},
    "device": {"policy": {"device": torch.device("cuda")}},
    "attention": {"policy": {"attention": "sdpa"}},
    "packed experts": {"policy": {"packed_experts": lambda: ["model.layers.0.mlp.experts.down_proj"]}},
    "experts that qpref computes": {"policy": {"adapts_experts": lambda: True}},
    "start adapter": {"start": "1f"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_reference_is_another_with_another(change):
    assert folder(**CHANGES[change]) != folder()


def test_a_reference_is_the_same_whatever_is_trained_on_it():
    free = {
        "adapter": {"rank": 2, "dropout": 0.5},
        "data": {"train": "z", "max_length": 600},
        "loss": {"name": "ipo", "beta": 0.7},
        "train": {"learning_rate": 1e-3, "batch_size": 2, "seed": 3, "tokens_per_microbatch": 7},
        "reference": {"fill": "before"},
    }
    assert folder(free, base={"path": Path("elsewhere")}) == folder()


def test_a_base_whose_config_was_changed_is_recomputed(make_recipe, make_base, tmp_path, notes, cache):
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    qpref.train(make_recipe({"model.base": str(base)}), output=tmp_path / "first")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (base / "config.json").write_text(json.dumps(config))
    notes.clear()
    qpref.train(make_recipe({"model.base": str(base)}), output=tmp_path / "second")
    assert notes.num_computed == NUM_EXAMPLES
    assert len(list(cache.iterdir())) == 2


# A cache that says something else.


@pytest.mark.parametrize("error", [2e-3, -0.5, float("nan")])
def test_rows_with_other_numbers_are_put_aside_once_and_computed_again(error, make_recipe, tmp_path, known, notes):
    rewrite(known, lambda values: values + error)
    cached = qpref.train(make_recipe(), output=tmp_path / "second").path
    assert sum("are put aside" in line for line in notes.said) == 1
    assert notes.num_computed == NUM_EXAMPLES
    notes.clear()
    alone = qpref.train(make_recipe({"reference.cache": False}), output=tmp_path / "alone").path
    assert (cached / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()
    described = json.loads((cached / "run.json").read_text())["reference_cache"]
    assert described["seen"] == {}


def test_rows_that_are_off_by_rounding_are_read(make_recipe, tmp_path, known, notes):
    rewrite(known, lambda values: values + 2e-4)
    qpref.train(make_recipe(), output=tmp_path / "second")
    assert "reference: one recomputed batch agrees with the cache, 0.0002 nats a token apart on average" in notes.said
    assert notes.num_computed == 0


def test_one_bad_row_of_the_check_batch_is_enough(make_recipe, tmp_path, known, monkeypatch, notes):
    checked, real = [], invariants.first_batch
    monkeypatch.setattr(invariants, "first_batch", lambda *call: (checked.append(real(*call)), checked[-1])[1])
    qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / "first")
    key = row_keys(checked[0].examples[-1])[-1]
    write_rows(known, {each: values + 0.5 * (each == key) for each, values in rows_in(known).items()})
    notes.clear()
    qpref.train(make_recipe(), output=tmp_path / "second")
    assert notes.num_computed == NUM_EXAMPLES


def load(recipe: dict[str, Any]) -> Policy:
    read = Recipe.model_validate(recipe)
    return load_policy(read, resolve_base(read.model))


def make_example(line: int) -> TokenizedExample:
    draw = random.Random(line)
    prompt, *branches = (array("i", (draw.randrange(256) for _ in range(draw.randint(2, 20)))) for _ in range(3))
    return TokenizedExample(
        prompt=prompt,
        branches=tuple(branches),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=Source(path="made", line=line),
    )


EXAMPLES = [make_example(line) for line in range(12)]


def test_a_batch_of_old_and_new_rows_keeps_the_old_values_and_writes_down_the_new(make_recipe, tmp_path):
    policy = load(make_recipe())
    keys = [key for example in EXAMPLES[:3] for key in row_keys(example)]
    cache = ReferenceCache.open(tmp_path, "one")
    cache.add({keys[0]: torch.full((len(EXAMPLES[0].branches[0]),), -1.0)})  # one branch alone, and easily told apart
    cache.close()
    references = ReferenceStore(ReferenceCache.open(tmp_path, "two"))
    said = references.logprobs(policy, pack(EXAMPLES[:3], policy.device)).values
    references.cache.close()
    assert references.num_computed == 3
    assert said[: len(EXAMPLES[0].branches[0])].unique().tolist() == [-1.0]
    own = ReferenceCache.open(tmp_path, "reader", {"two.shard": (tmp_path / "two.shard").stat().st_size})
    assert list(own.store._index) == keys[1:]


def test_comparing_with_the_cache_leaves_the_adapter_on(make_recipe, tmp_path):
    policy = load(make_recipe())
    references = ReferenceStore(ReferenceCache.open(tmp_path / "shards", "one"))
    batch = pack(EXAMPLES[:2], policy.device)
    references.logprobs(policy, batch)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    said = completion_logprobs(policy, batch).values
    reference_check.check_cache(references, policy, batch)  # by the reference, not by the adapter as it stands
    assert torch.equal(completion_logprobs(policy, batch).values, said)
    references.cache.close()


# Killed, and resumed while others write.


STEPS = {"adapter.dropout": 0.1, "train.epochs": 2, "train.log_every": 1, "train.eval_every": 2}
"""6 steps of 4 pairs; all 12 are first met in steps 1 to 3, and the 4 held-out ones before step 1."""


def die_after_save(step: int, patch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_checkpoint

    def save(folder: Path, current: checkpoint.Checkpoint, keep: int) -> Path:
        path = real(folder, current, keep)
        if current.step == step:
            raise Killed
        return path

    patch.setattr(checkpoint, "save_checkpoint", save)


def die_before_step(step: int, patch: pytest.MonkeyPatch) -> None:
    real = optim.seed_step

    def seed_step(seed: int, current: int) -> None:
        if current == step - 1:
            raise Killed
        real(seed, current)

    patch.setattr(optim, "seed_step", seed_step)


def tear(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(bytes(range(30)))


@pytest.fixture(scope="module")
def unbroken_once() -> list[Outcome]:
    return []


@pytest.fixture
def unbroken(unbroken_once, make_recipe, tmp_path) -> Outcome:
    """What a run of these steps leaves that never stopped, and that found no row in the cache."""
    if not unbroken_once:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QPREF_CACHE", str(tmp_path / "another"))
            unbroken_once.append(outcome(qpref.train(make_recipe(STEPS), output=tmp_path / "unbroken").path))
    return unbroken_once[0]


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize(
    ("save_every", "step", "die"), [(1, 1, die_after_save), (2, 4, die_before_step)], ids=["saved", "rows ahead"]
)
def test_a_killed_run_ends_as_if_it_never_stopped_whatever_others_wrote_meanwhile(
    save_every, step, die, torn, make_recipe, tmp_path, unbroken, known, notes
):
    other = known.rename(tmp_path / known.name)
    recipe = make_recipe(STEPS | {"train.save_every": save_every})
    with pytest.MonkeyPatch.context() as patch:
        die(step, patch)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    (own,) = known.parent.glob("*.shard")
    before = own.read_bytes()
    rewrite(other.rename(known), lambda values: values - 1)  # so that reading it could not go unnoticed
    if torn:
        tear(own)

    notes.clear()
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken
    assert own.read_bytes().startswith(before)
    assert len(ReferenceCache.open(own.parent, "reader", {own.name: own.stat().st_size})) == 2 * NUM_EXAMPLES
    passed_over = [line for line in notes.said if "not whole records" in line]
    assert passed_over == ([f"{own}: 30 of {len(before) + 30} bytes are not whole records and are ignored"] * torn)


def test_a_killed_run_goes_on_with_the_rows_that_it_saw_at_its_start(make_recipe, tmp_path, monkeypatch, notes, cache):
    qpref.train(make_recipe({"train.tokens_per_microbatch": 1}), output=tmp_path / "first")
    recipe = make_recipe(STEPS | {"train.save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        die_after_save(1, patch)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    notes.clear()
    qpref.train(recipe, output=tmp_path / "run", resume=True)
    assert notes.num_computed == 0
    assert notes.passes == ["reference_check"]


ODD_DESCRIPTIONS = (5, [], {}, {"run": "a"}, {"run": "../a", "seen": {}}, {"run": "a", "seen": {"b.shard": -1}},
                    {"run": "a", "seen": {"b.shard": None}}, {"run": None, "seen": {}},
                    {"run": "a", "seen": {"../../b.shard": 100}}, {"run": "a", "seen": ["b.shard"]})  # fmt: skip


def test_a_cache_description_that_no_run_writes_is_ignored(make_recipe, tmp_path, unbroken):
    recipe = make_recipe(STEPS | {"train.save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        die_after_save(1, patch)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    for number, odd in enumerate(ODD_DESCRIPTIONS):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"run-{number}")
        edit_facts(folder, reference_cache=odd)
        assert outcome(qpref.train(recipe, output=folder, resume=True).path) == unbroken, odd
    assert not [path for path in tmp_path.rglob("*.shard") if path.parents[1].name not in ("reference", "tokens")]


def test_a_run_without_a_cache_resumes(make_recipe, tmp_path, unbroken, cache):
    recipe = make_recipe(STEPS | {"train.save_every": 1, "reference.cache": False})
    with pytest.MonkeyPatch.context() as patch:
        die_after_save(2, patch)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken
    assert not cache.exists()


# All before training.


def test_filling_scores_what_is_not_known_the_longest_first(make_recipe, monkeypatch):
    policy, references, batches = load(make_recipe()), ReferenceStore(), []
    references.logprobs(policy, pack(EXAMPLES[:3], policy.device))
    monkeypatch.setattr(reference_pass, "pack", lambda some, device: (batches.append(some), pack(some, device))[1])
    limit = 3 * max(num_fed_tokens(example) for example in EXAMPLES[3:])
    reference_pass.fill(references, policy, EXAMPLES, limit)
    assert references.num_computed == len(EXAMPLES)
    longest_first = sorted(EXAMPLES[3:], key=lambda example: -num_fed_tokens(example))
    assert [example for members in batches for example in members] == longest_first
    assert len(batches[0]) == 3
    for members, after in itertools.zip_longest(batches, batches[1:]):
        assert len(members) * num_fed_tokens(members[0]) <= limit
        assert after is None or (len(members) + 1) * num_fed_tokens(members[0]) > limit
    alone = ReferenceStore()
    alone.logprobs(policy, pack(EXAMPLES, policy.device))
    for key, values in alone.rows.items():
        assert torch.allclose(references.rows[key], values, atol=1e-5)


def test_filling_takes_an_example_that_is_over_the_limit_by_itself(make_recipe):
    policy, references = load(make_recipe()), ReferenceStore()
    reference_pass.fill(references, policy, EXAMPLES[:3], 1)
    assert reference_pass.count_known(references, EXAMPLES) == (6, 24)


def test_filling_reads_what_the_cache_knows(make_recipe, tmp_path):
    policy, first = load(make_recipe()), ReferenceStore(ReferenceCache.open(tmp_path, "one"))
    reference_pass.fill(first, policy, EXAMPLES, 100)
    first.cache.close()
    second = ReferenceStore(ReferenceCache.open(tmp_path, "two"))
    assert reference_pass.count_known(second, EXAMPLES) == (24, 24)
    reference_pass.fill(second, policy, EXAMPLES, 100)
    assert second.num_computed == 0

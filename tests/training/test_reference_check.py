"""A cached reference is read where this machine confirms it, whatever its rounding, and put aside where it is wrong."""

from __future__ import annotations

import random
import tomllib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from qpref.data.pack import num_fed_tokens, pack, split_by_tokens
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import CheckRows, ReferenceCache, check_key
from qpref.records import TokenizedExample
from qpref.training import reference_check, reference_sample
from qpref.training.reference_check import check_cache, measured_rounding
from tests.conftest import load_worn, make_example

EXAMPLES = [make_example(line, 8 + line, 10 + line % 5, 6 + line % 7) for line in range(16)]
BUDGETS = (128, 256, 512, 1024, 4096)
SECTIONS = {"bf16": {"quantization": "nf4", "dtype": "bf16"}, "float32": {"quantization": "nf4", "dtype": "float32"}}


def policy_of(base: Path, **model: Any) -> Policy:
    """A base under a trained adapter, which its reference doesn't see."""
    return load_worn({"model": {"base": str(base)} | model})


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base(initializer_range=0.2)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def rounding_by_batch(policy: Policy) -> Iterator[None]:
    """A machine whose products depend on the batch, as bf16 ones do on a CPU with AMX: each hidden state is off by up
    to two steps of bf16, differently for each length of the stream and each number of threads."""

    def round_by_batch(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        generator = torch.Generator().manual_seed(hidden.shape[1] * 10 + torch.get_num_threads())
        noise = torch.rand(hidden.shape, generator=generator, dtype=torch.float32) * 2 - 1
        output.last_hidden_state = (hidden * (1 + noise / 64)).to(hidden.dtype)
        return output

    handle = policy.decoder.register_forward_hook(round_by_batch)
    try:
        yield
    finally:
        handle.remove()


def write(
    policy: Policy,
    folder: Path,
    examples: Sequence[TokenizedExample] = EXAMPLES,
    *,
    name: str = "first",
    budget: int = 512,
) -> None:
    """Fill a cache as a run does."""
    references = ReferenceStore(ReferenceCache.open(folder, name))
    check_cache(references, policy, pack(examples[:2], policy.device))
    for members in split_by_tokens(examples, budget):
        references.logprobs(policy, pack(members, policy.device))
    references.cache.close()


def num_read(policy: Policy, folder: Path, examples: Sequence[TokenizedExample] = EXAMPLES, *, first: int = 0) -> int:
    """Rows that a later run, whose first batch is another, reads from a cache."""
    references = ReferenceStore(ReferenceCache.open(folder, f"reader-{first}"))
    check_cache(references, policy, pack(examples[first : first + 2], policy.device), examples)
    return sum(key in references.cache for example in examples for key in row_keys(example))


@contextmanager
def nothing(policy: Policy) -> Iterator[None]:
    yield


MACHINES: dict[str, Callable[[Policy], Any]] = {"this machine": nothing, "rounding by batch": rounding_by_batch}


# Right ones.


def count_accepted(
    policy: Policy,
    tmp_path: Path,
    examples: Sequence[TokenizedExample],
    budgets: Sequence[int] = BUDGETS,
    firsts: Sequence[int] = (0, 9),
    orders: Sequence[int] = (1, -1),
) -> tuple[int, int]:
    """Caches that are read in full, and all: every writer's threads, budget and order with every reader's."""
    accepted = total = 0
    for writers_threads, budget, order in product((1, 2), budgets, orders):
        folder = tmp_path / f"{writers_threads}-{budget}-{order}"
        with threads(writers_threads):
            write(policy, folder, examples[::order], budget=budget)
        for readers_threads, first in product((1, 2), firsts):
            with threads(readers_threads):
                accepted += num_read(policy, folder, examples, first=first) == 2 * len(examples)
            total += 1
    return accepted, total


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", SECTIONS)
def test_a_right_reference_is_read_whatever_the_threads_budget_and_order(dtype, machine, base, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_sample, "SAMPLE_TOKENS", 80 if dtype == "bf16" else 0)  # a few rows in each of many
    policy = policy_of(base, **SECTIONS[dtype])
    with MACHINES[machine](policy):
        assert count_accepted(policy, tmp_path, EXAMPLES) == (80, 80)


# Wrong ones.


def another_base(policy: Policy, base: Path, tmp_path: Path, **model: Any) -> Policy:
    return changed_base(
        base, tmp_path, lambda name, value: torch.randn_like(value) * 0.2 if value.dim() > 1 else value, model
    )


def one_tensor_off(policy: Policy, base: Path, tmp_path: Path, **model: Any) -> Policy:
    name = "model.layers.1.self_attn.v_proj.weight"
    return changed_base(base, tmp_path, lambda each, value: value * 1.02 if each == name else value, model)


def other_quantization(policy: Policy, base: Path, tmp_path: Path, **model: Any) -> Policy:
    return policy_of(base, **model | {"quantization": "none"})


def changed_base(base: Path, tmp_path: Path, change: Callable[[str, Any], Any], model: dict[str, Any]) -> Policy:
    torch.manual_seed(1)
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, value) for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return policy_of(folder, **model)


WRONG_WRITERS = {"another base": another_base, "one tensor 2 % off": one_tensor_off, "quantization": other_quantization}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", SECTIONS)
@pytest.mark.parametrize("wrong", WRONG_WRITERS)
def test_another_reference_s_cache_is_put_aside(wrong, dtype, machine, base, tmp_path, said):
    policy = policy_of(base, **SECTIONS[dtype])
    writer = WRONG_WRITERS[wrong](policy, base, tmp_path, **SECTIONS[dtype])
    with MACHINES[machine](writer):
        write(writer, tmp_path / "cache")
    with MACHINES[machine](policy):
        assert num_read(policy, tmp_path / "cache") == 0
        (line,) = said
        assert "put aside" in line
        assert num_read(policy, tmp_path / "cache", first=3) == 0


def adapter_left_on(policy: Policy) -> dict[bytes, torch.Tensor]:
    return scored(policy, EXAMPLES, EXAMPLES)


def other_template(policy: Policy) -> dict[bytes, torch.Tensor]:
    """The answers after prompts with other control tokens around the same words."""
    with as_reference(policy):
        return scored(policy, EXAMPLES, [replace_prompt(example, [7, 9, *example.prompt, 11]) for example in EXAMPLES])


def another_row(policy: Policy) -> dict[bytes, torch.Tensor]:
    """Each row has the numbers of the next, as long as it is."""
    with as_reference(policy):
        right = scored(policy, EXAMPLES, EXAMPLES)
    numbers = torch.cat(list(right.values()))
    return {key: numbers.roll(-place - 7)[: len(values)] for place, (key, values) in enumerate(right.items())}


def scored(
    policy: Policy, named: Sequence[TokenizedExample], used: Sequence[TokenizedExample]
) -> dict[bytes, torch.Tensor]:
    keys = [key for example in named for key in row_keys(example)]
    with torch.no_grad():
        policy.model.eval()
        batch = pack(used, policy.device)
        values = completion_logprobs(policy, batch).values
    return dict(zip(keys, values.split(list(batch.lengths)), strict=True))


def replace_prompt(example: TokenizedExample, prompt: list[int]) -> TokenizedExample:
    return replace(example, prompt=array("i", prompt))


WRONG_ROWS = {"adapter left on": adapter_left_on, "template": other_template, "another row's": another_row}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", SECTIONS)
@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_wrong_rows_are_put_aside_though_the_check_rows_are_right(wrong, dtype, machine, base, tmp_path, said):
    policy = policy_of(base, **SECTIONS[dtype])
    with MACHINES[machine](policy):
        references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "first"))
        check_cache(references, policy, pack(EXAMPLES[:2], policy.device))
        references.cache.add(WRONG_ROWS[wrong](policy))
        references.cache.close()
        for first in (0, 5, 10):
            assert num_read(policy, tmp_path / "cache", first=first) == 0
    assert len(said) == 3


@pytest.mark.parametrize(("factor", "num_kept"), [(2.8, 32), (3.2, 0)])
def test_rows_of_the_first_batch_may_differ_by_three_times_the_rounding(factor, num_kept, base, tmp_path):
    """And by exactly that much: the first batch's present scores are known."""
    policy = policy_of(base, **SECTIONS["bf16"])
    with rounding_by_batch(policy):
        references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "first"))
        check_cache(references, policy, pack(EXAMPLES[:2], policy.device))
        with as_reference(policy):
            rows = scored(policy, EXAMPLES, EXAMPLES)
            present = scored(policy, EXAMPLES[5:7], EXAMPLES[5:7])
            rounding = measured_rounding(EXAMPLES[5:7], policy)
        references.cache.add(rows | {key: values + factor * rounding for key, values in present.items()})
        references.cache.close()
        assert num_read(policy, tmp_path / "cache", first=5) == num_kept


def test_the_stand_in_for_a_machine_rounds_as_the_real_one(base):
    """Between 0.01 and 0.1 nats a token, as measured on a Xeon with AMX (0.045)."""
    policy = policy_of(base, **SECTIONS["bf16"])
    with rounding_by_batch(policy), as_reference(policy):
        assert 0.01 < measured_rounding(EXAMPLES[:2], policy) < 0.1


# What stands around it.


def test_a_shard_is_put_aside_alone(base, tmp_path, said):
    policy = policy_of(base, **SECTIONS["float32"])
    write(one_tensor_off(policy, base, tmp_path, **SECTIONS["float32"]), tmp_path / "cache", EXAMPLES[:8], name="wrong")
    references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "right"))
    check_cache(references, policy, pack(EXAMPLES[8:10], policy.device))
    references.logprobs(policy, pack(EXAMPLES[4:], policy.device))
    references.cache.close()
    assert num_read(policy, tmp_path / "cache") == 24
    assert len(said) == 2


def test_a_shard_without_check_rows_is_put_aside(base, tmp_path, said):
    policy = policy_of(base, **SECTIONS["float32"])
    write(policy, tmp_path / "cache")
    (shard,) = (tmp_path / "cache").iterdir()
    shard.rename(shard.with_name("moved.shard"))
    assert num_read(policy, tmp_path / "cache") == 0
    assert len(said) == 1


@pytest.mark.parametrize("tokens", [[], [320], [-1], [2**31 - 1]])
def test_check_rows_that_no_model_could_score_are_put_aside(tokens, base, tmp_path, said):
    policy = policy_of(base, **SECTIONS["float32"])
    cache = ReferenceCache.open(tmp_path / "cache", "first")
    with as_reference(policy):
        batch = pack(EXAMPLES[:1], policy.device)
        rows = reference_rows(replace_prompt(EXAMPLES[0], tokens), completion_logprobs(policy, batch).values)
    cache.check_rows = rows
    cache.add({key: torch.zeros(3) for key in row_keys(EXAMPLES[0])})
    cache.close()
    assert num_read(policy, tmp_path / "cache") == 0
    assert len(said) == 1


TENSORS = {
    "tokens": torch.arange(1, 13, dtype=torch.int32),
    "lengths": torch.tensor([[2, 4, 6]], dtype=torch.int32),
    "values": torch.zeros(10),
}
NOT_A_NUMBER = torch.full((12,), float("nan"))
HOSTILE = {
    "lengths in one dimension": {"lengths": torch.tensor([2, 4, 6], dtype=torch.int32)},
    "lengths in three": {"lengths": torch.tensor([[[2], [4], [6]]], dtype=torch.int32)},
    "one length": {"lengths": torch.tensor(12, dtype=torch.int32)},
    "lengths in floats": {"lengths": torch.tensor([[2.0, 4, 6]])},
    "a negative length": {"lengths": torch.tensor([[-2, 8, 6]], dtype=torch.int32), "values": torch.zeros(14)},
    "an empty branch": {"lengths": torch.tensor([[6, 0, 6]], dtype=torch.int32), "values": torch.zeros(6)},
    "lengths that don't sum up": {"lengths": torch.tensor([[1, 4, 6]], dtype=torch.int32)},
    "a huge length": {"lengths": torch.tensor([[2, 2**31 - 1, 6]], dtype=torch.int32)},
    "no branch": {"lengths": torch.tensor([[12]], dtype=torch.int32), "values": torch.zeros(0)},
    "no row": {"lengths": torch.zeros(0, 3, dtype=torch.int32)},
    "tokens in two dimensions": {"tokens": torch.ones(12, 2, dtype=torch.int32)},
    "tokens in floats": {"tokens": torch.ones(12)},
    "tokens that aren't numbers": {"tokens": NOT_A_NUMBER},
    "tokens over 32 bits": {"tokens": torch.full((12,), 2**40)},
    "complex tokens": {"tokens": torch.ones(12, dtype=torch.complex64)},
    "a negative token": {"tokens": torch.full((12,), -1, dtype=torch.int32)},
    "values in two dimensions": {"values": torch.zeros(10, 3)},
    "one value": {"values": torch.tensor(1.0)},
    "truth values": {"values": torch.zeros(10, dtype=torch.bool)},
    "values in integers": {"values": torch.zeros(10, dtype=torch.int64)},
    "too few values": {"values": torch.zeros(9)},
    "values that aren't numbers": {"values": NOT_A_NUMBER[:10]},
}


def write_check_rows(folder: Path, content: bytes, name: str = "first") -> None:
    """A shard with check rows by somebody else, and a row of `EXAMPLES`."""
    cache = ReferenceCache.open(folder, name)
    key, *_ = row_keys(EXAMPLES[0])
    cache.store.add({check_key(f"{name}.shard"): content, key: bytes(4 * len(EXAMPLES[0].branches[0]))})
    cache.close()


def test_the_tensors_that_the_hostile_ones_are_made_from_are_check_rows():
    assert CheckRows.from_bytes(save(TENSORS), 12) is not None
    assert CheckRows.from_bytes(save(TENSORS), 11) is None


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_check_rows_are_put_aside(hostile, base, tmp_path, said):
    write_check_rows(tmp_path / "cache", save(TENSORS | HOSTILE[hostile]))
    assert num_read(policy_of(base, **SECTIONS["float32"]), tmp_path / "cache") == 0
    assert len(said) == 1


def check_bytes(*rows: TokenizedExample) -> bytes:
    return CheckRows(rows, torch.zeros(sum(len(branch) for row in rows for branch in row.branches))).to_bytes()


@pytest.mark.parametrize("rows", [1, 2000])
def test_check_rows_that_would_take_long_are_not_scored(rows, base, tmp_path, said, monkeypatch):
    policy = policy_of(base, **SECTIONS["float32"])
    row = replace_prompt(EXAMPLES[0], [1] * (10_000 if rows == 1 else 5))
    policy.plain_model.config.max_position_embeddings = 20_000
    write_check_rows(tmp_path / "cache", check_bytes(*[row] * rows))
    with scored_batches(monkeypatch) as sizes:
        assert num_read(policy, tmp_path / "cache") == 0
    assert max(sizes) < 100
    assert len(said) == 1
    monkeypatch.setattr(policy.plain_model.config, "max_position_embeddings", 512)


@contextmanager
def scored_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in tokens of the batches that are scored for their check rows."""
    sizes: list[int] = []
    real = reference_check._scores

    def scores(examples: Sequence[TokenizedExample], policy: Policy) -> torch.Tensor:
        sizes.append(sum(num_fed_tokens(example) for example in examples))
        return real(examples, policy)

    with monkeypatch.context() as patch:
        patch.setattr(reference_check, "_scores", scores)
        yield sizes


def test_tokens_without_an_embedding_and_positions_without_one_are_not_scored(base, tmp_path, said, monkeypatch):
    """A head may have more rows than the embedding. On a GPU, an index out of range ends the process."""
    policy = policy_of(base, **SECTIONS["float32"])
    policy.plain_model.set_input_embeddings(torch.nn.Embedding(300, 64))
    write_check_rows(tmp_path / "cache", check_bytes(replace_prompt(EXAMPLES[0], [310])))
    write_check_rows(tmp_path / "cache", check_bytes(replace_prompt(EXAMPLES[0], [1] * 510)), name="other")
    with scored_batches(monkeypatch) as sizes:
        assert num_read(policy, tmp_path / "cache") == 0
    assert len(sizes) == 1  # this run's own
    assert "of 2 earlier runs" in said[0]


def test_the_longest_row_of_the_model_is_scored(base, tmp_path, monkeypatch):
    policy = policy_of(base, **SECTIONS["float32"])
    branches = max(map(len, EXAMPLES[0].branches))
    write_check_rows(tmp_path / "cache", check_bytes(replace_prompt(EXAMPLES[0], [319] * (512 - branches))))
    with scored_batches(monkeypatch) as sizes:
        num_read(policy, tmp_path / "cache")
    assert len(sizes) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("bad")])
@pytest.mark.parametrize("work", ["_scores", "measured_rounding", "completion_logprobs"])
def test_a_check_that_memory_does_not_suffice_for_puts_the_rows_aside(work, error, base, tmp_path, said, monkeypatch):
    policy = policy_of(base, **SECTIONS["float32"])
    if work == "measured_rounding":
        wrong = one_tensor_off(policy, base, tmp_path, **SECTIONS["float32"])
        write(wrong, tmp_path / "cache")
    else:
        write(policy, tmp_path / "cache")

    def fail(*call: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(reference_check, work, fail)
    assert num_read(policy, tmp_path / "cache") == 0
    assert len(said) == 1


def write_many(policy: Policy, folder: Path, count: int) -> None:
    """Shards of one row each, every one with check rows of its own."""
    for number in range(count):
        references = ReferenceStore(ReferenceCache.open(folder, f"run-{number:03}", {}))
        examples = [make_example(100 + number, 5, 4, 4)]
        check_cache(references, policy, pack(examples, policy.device))
        references.logprobs(policy, pack(examples, policy.device))
        references.cache.close()


def test_however_many_shards_there_are_few_batches_are_scored(base, tmp_path, monkeypatch, said):
    policy = policy_of(base, **SECTIONS["float32"])
    write(policy, tmp_path / "cache", name="zz-largest")
    write_many(policy, tmp_path / "cache", 40)
    examples = [*EXAMPLES, *(make_example(100 + number, 5, 4, 4) for number in range(40))]
    with scored_batches(monkeypatch) as sizes:
        read = num_read(policy, tmp_path / "cache", examples)
    assert len(sizes) == reference_check.MAX_BATCHES  # the largest shard's check rows are the run's own too
    assert read == 2 * len(EXAMPLES) + 2 * (reference_check.MAX_BATCHES - 1)
    assert said == []


def test_a_resumed_run_checks_its_own_shard_first(base, tmp_path, said):
    """Left out, it would be removed."""
    policy = policy_of(base, **SECTIONS["float32"])
    own = [make_example(500, 5, 4, 4)]
    write(policy, tmp_path / "cache", own, name="zz-own")
    write_many(policy, tmp_path / "cache", reference_check.MAX_BATCHES + 1)
    others = [make_example(100 + number, 5, 4, 4) for number in range(reference_check.MAX_BATCHES + 1)]
    references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "zz-own"))
    check_cache(references, policy, pack(EXAMPLES[:2], policy.device), [*others, *own])
    assert all(key in references.cache for key in row_keys(own[0]))
    references.cache.close()
    assert said == []


def test_shards_without_a_row_of_the_run_are_not_checked(base, tmp_path, monkeypatch):
    policy = policy_of(base, **SECTIONS["float32"])
    write(policy, tmp_path / "cache")
    write_many(policy, tmp_path / "cache", 5)
    with scored_batches(monkeypatch) as sizes:
        assert num_read(policy, tmp_path / "cache") == 2 * len(EXAMPLES)
    assert len(sizes) == 1


def test_rows_of_a_wrong_shard_are_read_from_a_right_one(base, tmp_path, said):
    """Each holds all rows, and the first in order is wrong."""
    policy = policy_of(base, **SECTIONS["float32"])
    wrong = one_tensor_off(policy, base, tmp_path, **SECTIONS["float32"])
    write(wrong, tmp_path / "wrong", name="a")
    write(policy, tmp_path / "cache", name="b")
    write(wrong, tmp_path / "other", name="c")
    for folder in ("wrong", "other"):
        (shard,) = (tmp_path / folder).glob("*.shard")
        shard.rename(tmp_path / "cache" / shard.name)
    assert num_read(policy, tmp_path / "cache") == 2 * len(EXAMPLES)
    assert "of 1 earlier runs" in said[0]


@pytest.mark.parametrize("values", [torch.zeros(1), torch.zeros(400), torch.zeros(0)])
@pytest.mark.parametrize("index", [0, 9])
def test_rows_of_another_length_are_not_read(index, values, base, tmp_path):
    """In the first batch, and in another, where nobody compares them."""
    policy = policy_of(base, **SECTIONS["float32"])
    rows = dict.fromkeys(row_keys(EXAMPLES[index]), values)
    assert right_after(policy, tmp_path, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_not_read(value, base, tmp_path):
    policy = policy_of(base, **SECTIONS["float32"])
    lengths = map(len, EXAMPLES[9].branches)
    rows = {key: torch.full((length,), value) for key, length in zip(row_keys(EXAMPLES[9]), lengths, strict=True)}
    assert right_after(policy, tmp_path, rows)


def right_after(policy: Policy, tmp_path: Path, rows: dict[bytes, torch.Tensor]) -> bool:
    """Whether a run that finds these rows, under right check rows, has the right scores."""
    references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "first"))
    check_cache(references, policy, pack(EXAMPLES[:2], policy.device), EXAMPLES)
    references.cache.add(rows)
    references.cache.close()
    references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "second"))
    check_cache(references, policy, pack(EXAMPLES[:2], policy.device), EXAMPLES)
    batch = pack(EXAMPLES, policy.device)
    found = references.logprobs(policy, batch).values
    references.cache.close()
    return torch.equal(found, ReferenceStore().logprobs(policy, batch).values)


def test_a_run_whose_own_shard_is_put_aside_begins_it_again(base, tmp_path, said):
    """Resumed on another machine, say; and other runs read what it adds."""
    policy = policy_of(base, **SECTIONS["float32"])
    wrong = one_tensor_off(policy, base, tmp_path, **SECTIONS["float32"])
    write(wrong, tmp_path / "cache", name="own")
    reader = ReferenceCache.open(tmp_path / "cache", "reader")
    before = [reader.get(key) for key in row_keys(EXAMPLES[0])]
    write(policy, tmp_path / "cache", name="own")
    assert len(said) == 1
    assert num_read(policy, tmp_path / "cache") == 2 * len(EXAMPLES)
    assert len(said) == 1
    for key, values in zip(row_keys(EXAMPLES[0]), before, strict=True):
        assert torch.equal(reader.get(key), values)  # mapped before, and as it was


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_one_branch_and_an_own_attention_are_confirmed(shared, base, tmp_path, said):
    policy = policy_of(base, **SECTIONS["float32"])
    policy.share_prompts(shared)
    singles = [make_example(line, 8 + line, 10 + line % 5) for line in range(8)]
    write(policy, tmp_path / "cache", singles)
    references = ReferenceStore(ReferenceCache.open(tmp_path / "cache", "second"))
    check_cache(references, policy, pack(EXAMPLES[:2], policy.device), singles)  # now with mismatched partners
    assert all(key in references.cache for example in singles for key in row_keys(example))
    assert said == []


def reference_rows(example: TokenizedExample, values: torch.Tensor) -> CheckRows:
    return CheckRows((example,), values)


def test_checking_leaves_the_number_of_threads_as_it_was(base, tmp_path):
    policy = policy_of(base, **SECTIONS["float32"])
    with threads(2):
        write(policy, tmp_path / "cache")
        assert torch.get_num_threads() == 2


# On a real model.


@pytest.mark.soak
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", SECTIONS)
def test_a_real_model_s_right_references_are_read(dtype, machine, tmp_path):
    policy, examples = real_policy(dtype)
    with MACHINES[machine](policy):
        assert count_accepted(policy, tmp_path, examples, budgets=(256,), firsts=(5,), orders=(-1,)) == (4, 4)


def real_policy(dtype: str) -> tuple[Policy, list[TokenizedExample]]:
    """The quickstart's model, and eight short rows of random tokens."""
    model = tomllib.loads(Path("recipes/quickstart.toml").read_text())["model"]
    policy = load_worn({"model": model | SECTIONS[dtype]})
    draw = random.Random(0)
    examples = [make_example(line, draw.randint(5, 40), draw.randint(4, 40), draw.randint(4, 40)) for line in range(8)]
    return policy, examples

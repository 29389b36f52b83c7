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
from safetensors.torch import load_file, save_file

from qpref.data.pack import pack, split_by_tokens
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import CheckRows, ReferenceCache
from qpref.records import TokenizedExample
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
    references = ReferenceStore(ReferenceCache.open(folder, "second"))
    check_cache(references, policy, pack(examples[first : first + 2], policy.device))
    return sum(key in references.cache for example in examples for key in row_keys(example))


@contextmanager
def nothing(policy: Policy) -> Iterator[None]:
    yield


MACHINES: dict[str, Callable[[Policy], Any]] = {"this machine": nothing, "rounding by batch": rounding_by_batch}


# Right ones.


def count_accepted(
    policy: Policy, tmp_path: Path, examples: Sequence[TokenizedExample], firsts: Sequence[int] = (0, 1, 5, 9)
) -> tuple[int, int]:
    """Caches that are read in full, and all: every writer's threads, budget and order with every reader's."""
    accepted = total = 0
    for writers_threads, budget, order in product((1, 2), BUDGETS, (1, -1)):
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
def test_a_right_reference_is_read_whatever_the_threads_budget_and_order(dtype, machine, base, tmp_path):
    policy = policy_of(base, **SECTIONS[dtype])
    with MACHINES[machine](policy):
        assert count_accepted(policy, tmp_path, EXAMPLES) == (160, 160)


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


def test_the_stand_in_for_a_machine_rounds_as_the_real_one(base):
    """Between 0.02 and 0.1 nats a token, as measured on a Xeon with AMX (0.045)."""
    policy = policy_of(base, **SECTIONS["bf16"])
    with rounding_by_batch(policy), as_reference(policy):
        assert 0.02 < measured_rounding(EXAMPLES[:2], policy) < 0.1


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
        assert count_accepted(policy, tmp_path, examples, firsts=(0, 9)) == (80, 80)


def real_policy(dtype: str) -> tuple[Policy, list[TokenizedExample]]:
    """The quickstart's model, and sixteen short rows of random tokens."""
    model = tomllib.loads(Path("recipes/quickstart.toml").read_text())["model"]
    policy = load_worn({"model": model | SECTIONS[dtype]})
    draw = random.Random(0)
    examples = [make_example(line, draw.randint(5, 40), draw.randint(4, 40), draw.randint(4, 40)) for line in range(16)]
    return policy, examples

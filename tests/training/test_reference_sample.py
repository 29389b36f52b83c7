"""One wrong row among cached ones is found with the chance that is stated, at a cost that doesn't grow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reference_check import EXAMPLES, num_read, policy_of, rounding_by_batch, write

from qpref.data.pack import num_fed_tokens
from qpref.policy.policy import Policy
from qpref.policy.reference import row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.training import reference_sample
from qpref.training.reference_sample import largest_rounding, sample

MACHINES: dict[str, Callable[[Policy], Any]] = {
    "this machine": lambda policy: nullcontext(),
    "rounding by batch": rounding_by_batch,
}
BUDGET = 128
ALL = 2 * len(EXAMPLES)


@pytest.fixture(scope="module")
def policy(make_base) -> Policy:
    return policy_of(make_base(initializer_range=0.2), quantization="nf4", dtype="float32")


def write_wrong(policy: Policy, folder: Path, wrong: bytes, by: float) -> None:
    """Fill a cache whose writer had one row wrong in its memory, so that its checksum is right."""
    add = ReferenceCache.add

    def add_wrong(cache: ReferenceCache, rows: dict[bytes, torch.Tensor]) -> None:
        add(cache, {key: values + by if key == wrong else values for key, values in rows.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceCache, "add", add_wrong)
        write(policy, folder)


@pytest.mark.parametrize("by", [2.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_single_wrong_row_is_found_where_all_rows_are_sampled(policy, tmp_path, machine, by):
    """Beyond the check rows, which are the first two, and the first batch, which is read right."""
    with MACHINES[machine](policy):
        write_wrong(policy, tmp_path, row_keys(EXAMPLES[11])[1], by)
        assert num_read(policy, tmp_path, first=5) == 0


def test_it_is_found_within_a_small_mean(policy, tmp_path):
    """A mean over all rows would be a hundredth of this, below the tolerance."""
    write_wrong(policy, tmp_path, row_keys(EXAMPLES[11])[1], 5e-3)
    assert num_read(policy, tmp_path, first=5) == 0


def test_right_rows_are_read(policy, tmp_path):
    write_wrong(policy, tmp_path, b"", 0.0)
    assert num_read(policy, tmp_path, first=5) == ALL


def drawn(cache: ReferenceCache, policy: Policy, budget: int = BUDGET) -> list[int]:
    """Lines of the examples of a run's sample; every batch fits."""
    batches = list(sample(cache, EXAMPLES, policy, budget))
    for batch in batches:
        assert len(batch) == 1 or sum(num_fed_tokens(each, policy.shares_prompts) for each in batch) <= budget
    return [example.source.line for batch in batches for example in batch]


def test_each_example_is_drawn_with_the_stated_chance(policy, tmp_path, monkeypatch):
    write(policy, tmp_path)
    monkeypatch.setattr(reference_sample, "SAMPLE_TOKENS", 2 * BUDGET)
    counts, sizes = [0] * len(EXAMPLES), []
    for number in range(400):
        lines = drawn(ReferenceCache.open(tmp_path, f"{number:032x}"), policy)
        sizes.append(len(lines))
        for line in lines:
            counts[line] += 1
    assert lines == drawn(ReferenceCache.open(tmp_path, f"{number:032x}"), policy)  # a resumed run draws the same
    chance = sum(sizes) / 400 / len(EXAMPLES)
    assert 0.2 < chance < 0.6
    deviation = (chance * (1 - chance) / 400) ** 0.5
    assert all(abs(count / 400 - chance) < 4 * deviation for count in counts)


def test_the_sample_takes_no_more_than_its_tokens(policy, tmp_path, monkeypatch):
    write(policy, tmp_path)
    monkeypatch.setattr(reference_sample, "SAMPLE_TOKENS", 200)
    batches = list(sample(ReferenceCache.open(tmp_path, "second"), EXAMPLES * 50, policy, BUDGET))
    assert 0 < sum(num_fed_tokens(each, policy.shares_prompts) for batch in batches for each in batch) <= 200


def test_rows_that_are_unknown_or_the_runs_own_are_not_drawn(policy, tmp_path):
    write(policy, tmp_path, EXAMPLES[:6], name="first")
    write(policy, tmp_path, EXAMPLES[6:10], name="second")
    cache = ReferenceCache.open(tmp_path, "second")
    assert sorted(drawn(cache, policy)) == [0, 1, 2, 3, 4, 5]
    cache.close()


def test_rounding_is_that_of_the_worst_row():
    together = torch.zeros(5)
    alone, many = torch.tensor([0.1, 0.1, 0.4, 0.2, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5])
    assert largest_rounding([together, alone, many], [2, 2, 1]) == pytest.approx(0.5)
    assert largest_rounding([together, alone, together], [2, 2, 1]) == pytest.approx(0.3)

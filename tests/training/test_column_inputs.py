"""Numbers of rows on their way to a loss: beside each example, whatever it is packed with and whoever reads it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_example, make_tokenizer

from qpref.data.load import fingerprint
from qpref.data.mismatch import with_mismatched
from qpref.data.pack import pack
from qpref.data.singles import singles_of
from qpref.data.token_cache import TokenCache
from qpref.data.tokenize import PairTokenizer
from qpref.records import Message, PreferencePair, Source, TokenLogProbs
from qpref.training.inputs import paired_inputs, unpaired_inputs
from qpref.training.whole_batch import Rows, WholeBatch

CPU = torch.device("cpu")
EXAMPLES = [
    replace(make_example(line, 2, 1 + line, 3), columns={"score": line / 8, "length": -line}) for line in range(1, 7)
]


def pair(**changes) -> PreferencePair:
    made = PreferencePair(
        prompt=(Message(role="user", content="Why?"),),
        chosen=(Message(role="assistant", content="It is so."),),
        rejected=(Message(role="assistant", content="No idea."),),
        source=Source(path="pairs.x", line=1),
    )
    return replace(made, **changes)


def test_a_micro_batch_and_the_rows_of_a_step_have_the_numbers_of_their_examples_in_float32():
    batch, rows = pack(EXAMPLES[::-1], CPU), Rows.of(tuple(EXAMPLES[::-1]), CPU)
    for found in (batch.columns, rows.columns):
        assert list(found) == ["score", "length"]
        assert torch.equal(found["score"], torch.tensor([6, 5, 4, 3, 2, 1]) / 8)
        assert torch.equal(found["length"], torch.tensor([-6.0, -5.0, -4.0, -3.0, -2.0, -1.0]))
    assert torch.equal(rows.cut(range(1, 3)).columns["length"], torch.tensor([-5.0, -4.0]))
    assert pack([make_example(1, 2, 2)], CPU).columns == {}


def test_a_loss_of_a_whole_step_gets_each_example_with_its_own_numbers():
    """The order is the one of a micro-batch, by length, not that of the step."""
    objective = SimpleNamespace(needs_mismatched=False, needs=frozenset())
    policy = SimpleNamespace(shares_prompts=True, device=CPU)
    scorer = SimpleNamespace(objective=objective, policy=policy, references=None)
    whole = WholeBatch.of(scorer, EXAMPLES)
    assert [each.source.line for each in whole.rows.examples] != [each.source.line for each in EXAMPLES]
    assert (-whole.rows.columns["length"]).tolist() == [each.source.line for each in whole.rows.examples]


def test_losses_read_the_numbers_under_the_columns_names():
    batch = pack(EXAMPLES, CPU)
    scores = TokenLogProbs(values=torch.zeros(len(batch.score_token)), lengths=batch.lengths)
    assert paired_inputs(batch, scores, None, prompts=False).columns is batch.columns
    singles = [replace(each, branches=each.branches[:1], truncated=(False,), label=True) for each in EXAMPLES]
    batch = pack(singles, CPU)
    scores = TokenLogProbs(values=torch.zeros(len(batch.score_token)), lengths=batch.lengths)
    assert unpaired_inputs(batch, scores, None, (6, 0), None).columns is batch.columns


def test_a_mismatched_partner_changes_no_number():
    singles = [replace(each, branches=each.branches[:1], truncated=(False,), label=True) for each in EXAMPLES]
    assert [each.columns for each in with_mismatched(singles, 0, 64)] == [each.columns for each in EXAMPLES]


def test_both_halves_of_a_pair_have_its_numbers():
    assert [single.columns for single in singles_of([pair(columns={"hour": 12.0})])] == [{"hour": 12.0}] * 2


@pytest.fixture
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_empty_cache")
def test_cached_token_ids_have_the_numbers_of_the_row_that_is_read_not_of_the_one_that_was_written():
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [])
    (fresh,) = tokenizer.tokenize([pair(columns={"score": 1.0})])
    assert fresh.columns == {"score": 1.0}
    for number in (2.0, 3.0):
        cache = TokenCache.open(tokenizer)
        assert cache is not None
        (found,) = cache.tokenize([pair(columns={"score": number})])
        assert (found.columns, found.branches) == ({"score": number}, fresh.branches)


def test_a_run_cannot_be_resumed_on_other_numbers():
    changed = [*EXAMPLES[:-1], replace(EXAMPLES[-1], columns={"score": 6 / 8, "length": -6.5})]
    renamed = [replace(each, columns={"scores": each.columns["score"], "length": each.columns["length"]})
               for each in EXAMPLES]  # fmt: skip
    assert len({fingerprint(examples) for examples in (EXAMPLES, changed, renamed)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_over_each_sequence_adds_what_each_token_has(dtype):
    """`total` is the sum of the log-probabilities, to the bit."""
    torch.manual_seed(0)
    values, weights = torch.randn(7, dtype=dtype), torch.arange(7, dtype=dtype)
    scores = TokenLogProbs(values=values, lengths=(3, 1, 0, 3))
    expected = [weights[:3].sum(), weights[3], 0.0, weights[4:].sum()]
    assert scores.sum(weights).tolist() == [float(each) for each in expected]
    assert torch.equal(scores.sum(values), scores.total)
    by_hand = [float((values * weights)[start:stop].sum()) for start, stop in ((0, 3), (3, 4), (4, 4), (4, 7))]
    assert scores.sum(values * weights).tolist() == by_hand

"""A remembered row has the ids that it was tokenized to, under its own weight and place, and no other row has them."""

import itertools
import logging
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tokenizer

from qpref.data.token_cache import ROWS_AT_ONCE, TokenCache, _key, root
from qpref.data.tokenize import PairTokenizer
from qpref.records import Finding, Message, PreferencePair, Source, UnpairedExample


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))


def turn(role, content, **extra):
    return Message(role=role, content=content, extra=extra)


def pair(line, chosen="It is so.", **changes):
    row = PreferencePair(
        prompt=(turn("user", f"Why {line}?"),),
        chosen=(turn("assistant", chosen),),
        rejected=(turn("assistant", f"No idea about {line}."),),
        weight=1.0 + line,
        margin=0.5,
        source=Source(path="pairs.x", line=line + 1),
    )
    return replace(row, **changes)


class Counting:
    """A tokenizer that counts the rows it is given."""

    def __init__(self, tokenizer):
        self.inner, self.num_rows = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def tokenize(self, rows, limit=None):
        rows = list(rows)
        self.num_rows += len(rows)
        return self.inner.tokenize(rows, limit)


def pair_tokenizer(**changes):
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return PairTokenizer.of(tokenizer, "chat", [])


def through_cache(rows, limit=None, tokenizer=None):
    """What a new run gets, and how many rows it had to tokenize."""
    counting = Counting(tokenizer or pair_tokenizer())
    return list(TokenCache.open(counting).tokenize(rows, limit)), counting.num_rows


ROWS = [
    pair(0),
    pair(1, chosen="<|im_end|>"),
    pair(2),
    pair(3, number=0),
    replace(pair(3, chosen="Another one."), number=1),
    UnpairedExample(
        prompt=(turn("system", "Be brief."), turn("user", "Why?")),
        completion=(turn("assistant", "So."),),
        label=False,
        weight=3.0,
        source=Source(path="pairs.x", line=9),
    ),
]


def test_a_second_run_reads_what_the_first_tokenized():
    plain = list(pair_tokenizer().tokenize(ROWS))
    assert any(isinstance(one, Finding) for one in plain)
    first, num_first = through_cache(ROWS)
    second, num_second = through_cache(ROWS)
    assert first == second == plain
    assert (num_first, num_second) == (len(ROWS), sum(isinstance(one, Finding) for one in plain))


def test_order_is_kept_over_many_rows_of_which_some_are_known():
    rows = [pair(number) for number in range(2 * ROWS_AT_ONCE + 3)]
    through_cache(rows[::3])
    found, count = through_cache(rows)
    assert found == list(pair_tokenizer().tokenize(rows))
    assert count == len(rows) - len(rows[::3])


def test_weight_margin_label_and_place_are_the_rows_own():
    through_cache([pair(0)])
    moved = pair(0, weight=9.0, margin=2.0, number=4, source=Source(path="other.x", line=77))
    (found,), count = through_cache([moved])
    assert count == 0
    assert (found.weight, found.margin, found.number, found.source) == (9.0, 2.0, 4, moved.source)


CHANGES = {
    "prompt": {"prompt": (turn("user", "Why 1?"),)},
    "role": {"prompt": (turn("system", "Why 0?"), turn("user", "Why 0?"))},
    "response": {"chosen": (turn("assistant", "It is not so."),)},
    "sides changed": {"chosen": pair(0).rejected, "rejected": pair(0).chosen},
    "tools": {"tools": ({"type": "function", "function": {"name": "f"}},)},
    "extra": {"chosen": (turn("assistant", "It is so.", name="Ann"),)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_content_is_another_row(change):
    through_cache([pair(0)])
    assert through_cache([replace(pair(0), **change)])[1] == 1


def test_another_prompt_limit_is_another_row():
    long = pair(0, prompt=(turn("user", "Why? " * 40),))
    (whole,), _ = through_cache([long])
    (cut,), count = through_cache([long], limit=30)
    assert count == 1
    assert cut.prompt_cut
    assert len(cut.prompt) <= 30 < len(whole.prompt)
    assert through_cache([long], limit=30) == ([cut], 0)


@pytest.mark.parametrize(
    "change",
    [{"chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}, {"eos_token": "<s>"}],
)
def test_another_tokenizer_has_a_cache_of_its_own(change):
    through_cache([pair(0)])
    assert through_cache([pair(0)], tokenizer=pair_tokenizer(**change))[1] == 1
    assert len(list(root().iterdir())) == 2


def test_other_stop_tokens_have_a_cache_of_their_own():
    through_cache([pair(0)])
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [7])
    assert through_cache([pair(0)], tokenizer=tokenizer)[1] == 1


def test_a_disk_without_room_is_a_warning(tmp_path, monkeypatch, said):
    Path(tmp_path / "cache").write_text("a file, so no folder can be made there")
    assert TokenCache.open(pair_tokenizer()) is None
    assert any("token ids are not cached" in line for line in said)


def test_the_cache_is_bounded(monkeypatch):
    for number in range(3):
        through_cache([pair(number)])
    monkeypatch.setenv("QPREF_TOKEN_CACHE_BYTES", "0")
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", [7])
    through_cache([pair(0)], tokenizer=tokenizer)
    shards = list(root().glob("*/*.shard"))
    assert len(shards) == 1


def test_torn_shards_cost_their_rows_alone(caplog):
    rows = [pair(number) for number in range(4)]
    through_cache(rows)
    (shard,) = root().glob("*/*.shard")
    shard.write_bytes(shard.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING, logger="qpref"):
        found, count = through_cache(rows)
    assert found == list(pair_tokenizer().tokenize(rows))
    assert count == 1


def test_rows_of_one_place_are_tokenized_together():
    together = [pair(0, number=0), replace(pair(0, chosen="Another."), number=1)]
    through_cache(together[:1])
    found, count = through_cache(together)
    assert count == 2
    assert [one.number for one in found] == [0, 1]
    for left, right in itertools.pairwise(found):
        assert left.source == right.source


def test_the_order_of_a_tools_keys_is_content():
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    turned = {"function": {"description": "d", "name": "f"}, "type": "function"}
    through_cache([pair(0, tools=(tool,))])
    assert through_cache([pair(0, tools=(turned,))])[1] == 1


def test_a_template_that_writes_the_date_is_not_remembered():
    dated = pair_tokenizer(
        chat_template=make_tokenizer().chat_template + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    )
    assert TokenCache.open(dated) is None


def test_rows_of_one_line_of_two_files_are_distinguished():
    rows = [pair(0), pair(0, chosen="Not so.", source=Source(path="other.x", line=1)), pair(0, chosen="Third.")]
    found, _ = through_cache(rows)
    assert found == list(pair_tokenizer().tokenize(rows))
    assert len({bytes(one.branches[0]) for one in found}) == 3


HOSTILE = {
    "nothing": [],
    "one word": [0],
    "no parts": [0, 0],
    "more parts than the row has": [0, 4, 1, 1, 1, 1, 5, 5, 5, 5],
    "fewer parts": [0, 2, 1, 1, 5, 5],
    "a negative count": [0, -3, 1, 1, 1, 5, 5, 5],
    "a negative length": [0, 3, 2, -1, 2, 5, 5, 5],
    "an empty response": [0, 3, 2, 0, 1, 5, 5, 5],
    "a negative id": [0, 3, 1, 1, 1, 5, -5, 5],
    "more ids than it says": [0, 3, 1, 1, 1, 5, 5, 5, 5],
    "fewer ids": [0, 3, 1, 1, 1, 5, 5],
    "lengths beyond its end": [0, 3, 1],
    "masks of a row without any": [0, 5, 1, 1, 1, 1, 1, 5, 5, 5, 1, 1],
}
HOSTILE_MASKS = {
    "a mask of another length": [0, 5, 1, 2, 1, 1, 1, 5, 5, 5, 5, 1, 1],
    "nothing counts": [0, 5, 1, 1, 1, 1, 1, 5, 5, 5, 0, 1],
    "one mask": [0, 4, 1, 1, 1, 1, 5, 5, 5, 1],
}


@pytest.mark.parametrize("words", HOSTILE.values(), ids=HOSTILE)
def test_a_record_that_qpref_has_not_written_is_not_read(words):
    """Others write to a shared cache; the record's checksum is right."""
    cache = TokenCache.open(pair_tokenizer())
    cache.store.add({_key(pair(0), None): array("i", words).tobytes()})
    cache.store.close()
    found, count = through_cache([pair(0)])
    assert found == list(pair_tokenizer().tokenize([pair(0)]))
    assert count == 1


@pytest.mark.parametrize("words", HOSTILE_MASKS.values(), ids=HOSTILE_MASKS)
def test_a_mask_that_qpref_has_not_written_is_not_read(words):
    row = pair(0)
    row = replace(row, chosen=(replace(row.chosen[0], masked=((0, 2),)),))
    cache = TokenCache.open(pair_tokenizer())
    cache.store.add({_key(row, None): array("i", words).tobytes()})
    cache.store.close()
    found, count = through_cache([row])
    assert found == list(pair_tokenizer().tokenize([row]))
    assert count == 1

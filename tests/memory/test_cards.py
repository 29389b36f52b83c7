"""Cards are found in any spelling, and torch is promised no more memory than it was seen to have."""

import pytest

from qpref.errors import RecipeError
from qpref.memory.cards import CARDS, capability_notes, find_card
from qpref.memory.parts import CONTEXT_BYTES

GIB = 2**30
ONE_OF, BY_SIZE = "write one of these, or --vram SIZE", "plan by its free memory: --vram 12GiB"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("rtx3060 12 gb", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060 (12 GiB)", "RTX 3060 12GB"),
        ("3060-12G", "RTX 3060 12GB"),
        ("3060ti", "RTX 3060 Ti 8GB"),
        ("RTX4070TiSuper", "RTX 4070 Ti SUPER 16GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop 16GB"),
        ("RTX 4090 mobile", "RTX 4090 Laptop 16GB"),
        ("RTX 4090", "RTX 4090 24GB"),
        ("Tesla T4", "T4 16GB"),
        ("nvidia a10g", "A10G 24GB"),
        ("A10", "A10 24GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("A6000", "RTX A6000 48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 96GB"),
    ],
)
def test_a_card_is_found_in_any_spelling(text, title):
    assert find_card(text).title == title


def test_each_card_is_found_by_its_own_name():
    assert [find_card(card.title) for card in CARDS] == list(CARDS)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("RTX 3060", "more than one card has this name", f"{ONE_OF}: RTX 3060 8GB, RTX 3060 12GB"),
        ("A100", "more than one card has this name", f"{ONE_OF}: A100 40GB, A100 80GB"),
        ("RTX 6000", "more than one card has this name",
         f"{ONE_OF}: Quadro RTX 6000 24GB, RTX 6000 Ada 48GB, RTX PRO 6000 96GB"),
        ("RTX 3060 10GB", "this card has no 10 GB", f"{ONE_OF}: RTX 3060 8GB, RTX 3060 12GB"),
        ("RTX 4095", "no card of this name is known; the closest names are RTX 4090", BY_SIZE),
        ("", "no card of this name is known", BY_SIZE),
        ("24GB", "no card of this name is known", BY_SIZE),
    ],
)  # fmt: skip
def test_a_name_that_isnt_one_cards_lists_the_candidates(text, what, hint):
    with pytest.raises(RecipeError) as caught:
        find_card(text)
    assert (caught.value.what, caught.value.hint) == (f"--card {text}: {what}", hint)


SEEN = {
    "RTX 4090": 23.52, "RTX 3060 12GB": 11.75, "T4": 14.56, "A10G": 22.19, "RTX 6000 Ada": 44.43, "L40": 44.40,
    "RTX 5090": 31.37, "A100 40GB": 42_298_834_944 / GIB, "A100 80GB": 79.14,
}  # fmt: skip
"""Total capacity, in GiB, by torch on Linux; the sources stand in `cards`."""


@pytest.mark.parametrize("name", SEEN)
def test_no_more_memory_is_promised_than_torch_was_seen_to_have(name):
    card = find_card(name)
    promised = card.usable_bytes() + CONTEXT_BYTES
    assert 0.975 * SEEN[name] * GIB < promised <= (SEEN[name] + 0.005) * GIB  # rounded to 0.01 GiB by torch


def test_error_correction_takes_what_the_box_has_and_the_driver_does_not():
    assert find_card("T4").ecc_bytes == GIB
    assert find_card("A10G").ecc_bytes == (24 * 1024 - 23028) * 2**20
    assert [card.title for card in CARDS if card.ecc_bytes and card.total_bytes > card.box_gib * GIB * 0.97] == []
    assert find_card("H100 80GB").ecc_bytes == find_card("RTX 4090").ecc_bytes == 0


def test_every_card_has_a_source_for_its_memory():
    assert all(card.total_source and card.driver_source for card in CARDS)
    assert all(0 < card.usable_bytes(desktop=True) < card.total_bytes <= card.box_gib * GIB * 1.02 for card in CARDS)


@pytest.mark.parametrize(
    ("capability", "dtype", "notes"),
    [((8, 6), "bf16", 0), ((8, 0), "bf16", 0), ((7, 5), "fp16", 0), ((7, 5), "bf16", 1), ((7, 0), "fp16", 1),
     ((6, 1), "bf16", 2), ((12, 0), "bf16", 0), ((7, 5), "float32", 0)],
)  # fmt: skip
def test_a_note_for_each_thing_that_a_card_lacks(capability, dtype, notes):
    assert len(list(capability_notes("it", capability, dtype))) == notes

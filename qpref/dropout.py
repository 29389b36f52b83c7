"""LoRA's dropout as a function of content: seed, optimizer step, token, layer input and column decide what is dropped.

torch draws masks from a generator, so that they depend on all draws before: on micro-batches, their order, and the
process that computes them. Here every number of an input has a hash,

    h[t, c] = (factor[t] * column[c] + offset[t]) mod 2^32,

and is dropped where h < p 2^32. That is multiply-add-shift hashing (Dietzfelbinger 1996, "Universal hashing and k-wise
independent random variables via integer arithmetic without primes"): two columns of a token, or two tokens in a column,
are independent of each other. Factor and offset are 64 bits that SplitMix64's finalizer (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators") makes of the token's key and the step's. A token's key is a hash of
its text (the prompt; for a response, prompt and response) and its position. So a prompt has one mask, however many
responses share it. Masks are computed wherever they are needed, and never kept.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn

from qpref.errors import PolicyError

GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment: the distance of the keys of a text's tokens."""
HASHED_NUMBERS = 2**22
"""Numbers whose hashes exist at a time, 4 bytes each."""


def text_key(*ids: array[int]) -> int:
    """Hash token ids to a signed 64-bit key; their division into arrays counts too."""
    digest = hashlib.blake2b(digest_size=8)
    for each in ids:
        digest.update(len(each).to_bytes(8, "little") + each.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def token_keys(texts: Sequence[int], lengths: Sequence[int], positions: Tensor) -> Tensor:
    """Compute the keys of the tokens of several texts, one text after the other: [T] int64.

    Args:
        texts: key of each text.
        lengths: tokens of each, T in total.
        positions: [T] int64, of each token in its text.
    """
    starts = [text for text, length in zip(texts, lengths, strict=True) for _ in range(length)]
    return torch.tensor(starts, dtype=torch.int64) + positions * _signed(GAMMA)


def step_key(seed: int, step: int) -> int:
    """Hash a run's seed and an optimizer step to a signed 64-bit key."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "little", signed=True)


class Draws:
    """Random bits of the tokens that a pass computes, made when a layer first drops something."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._bits: Tensor | None = None

    @classmethod
    def of(cls, keys: Callable[[], Tensor], step: int) -> Draws:
        """Draw for tokens with these keys: [1, T] int64 of a stream, [B, L] of rows; under a step's key."""
        return cls(lambda: _mixed(keys() ^ step).unsqueeze(-1).view(torch.int32))

    @property
    def bits(self) -> Tensor:
        """[1, T, 2] or [B, L, 2] int32: a factor and an offset for each token."""
        if self._make is not None:
            self._bits, self._make = self._make(), None
        assert self._bits is not None
        return self._bits

    def selected(self, indices: Tensor) -> Draws:
        """Draws of a stream's tokens in another order, [rows, length] int64."""
        return Draws(lambda: self.bits[0, indices])


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


def current() -> Draws | None:
    """Return the draws of the pass that is being computed; None outside of one."""
    return _current.get()


class drawing:
    """Context of a pass with these draws, or of its repetition; for any number of uses."""

    def __init__(self, draws: Draws | None) -> None:
        self._draws = draws
        self._tokens: list[Token[Draws | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_current.set(self._draws))

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())


def drawing_selected(indices: Tensor) -> drawing:
    """Context of a layer that reads a stream's tokens in another order, [rows, length] int64."""
    draws = _current.get()
    return drawing(None if draws is None else draws.selected(indices))


class TokenDropout(nn.Module):
    """Stands in for a LoRA layer's nn.Dropout.

    Attributes:
        p: probability of a number to be dropped.
        name: of the input; inputs of one name have one mask.
        columns: [width] int32.
    """

    columns: Tensor

    def __init__(self, p: float, name: str, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.p, self.name = p, name
        own = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") | 1
        columns = _mixed(torch.arange(1, width + 1)) * own
        self.register_buffer("columns", columns.view(torch.int32)[::2].contiguous().to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        dropped: Tensor = _Dropped.apply(x, self, self.bits_of(x))  # type: ignore[no-untyped-call]
        return dropped

    def bits_of(self, x: Tensor) -> Tensor:
        """[T, 2] int32 random bits of the rows of an input [..., width].

        Raises:
            PolicyError: its rows aren't the tokens of the pass that is being computed.
        """
        draws = _current.get()
        assert draws is not None, f"{self.name}: a pass with dropout over tokens that nobody named"
        bits, rows, tokens = draws.bits, list(x.shape[:-1]), list(draws.bits.shape[:-1])
        if _without_ones(rows) not in (_without_ones(tokens), _without_ones([math.prod(tokens)])):
            raise PolicyError(
                f"[adapter] dropout: {self.name} reads {rows} rows in a pass over {tokens} tokens, so that what it "
                "drops would depend on the micro-batches",
                "set [adapter] dropout = 0, or leave the layer out of [adapter] targets",
            )
        return bits.view(-1, 2)

    def drop(self, x: Tensor, bits: Tensor, *, in_place: bool = False) -> Tensor:
        """Drop numbers of x [T, width] by the tokens' random bits [T, 2], and divide the others by 1 - p."""
        result = x if in_place else torch.empty_like(x)
        threshold = round(self.p * 2**32) - 2**31
        rows = max(1, HASHED_NUMBERS // x.shape[1])
        for before, after, part in zip(x.split(rows), result.split(rows), bits.split(rows), strict=True):
            hashes = torch.addcmul(part[:, 1:], part[:, :1], self.columns)
            torch.mul(before, hashes.ge_(threshold), out=after)
        return result.div_(1 - self.p)


class _Dropped(torch.autograd.Function):
    """x [..., width] -> x with dropout; its mask is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: TokenDropout, bits: Tensor) -> Tensor:
        ctx.dropout, ctx.bits = dropout, bits
        return dropout.drop(x.reshape(-1, x.shape[-1]), bits).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])
        return ctx.dropout.drop(flat, ctx.bits).reshape(gradients[0].shape), None, None


def _without_ones(sizes: list[int]) -> list[int]:
    return [size for size in sizes if size != 1]


def _mixed(keys: Tensor) -> Tensor:
    """Mix int64 keys by SplitMix64's finalizer, whose output looks random even where the keys are counted through."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ _shifted(keys, shift)) * _signed(factor)
    return keys ^ _shifted(keys, 31)


def _shifted(keys: Tensor, shift: int) -> Tensor:
    """Shift to the right, zeros moving in; torch's own shift of a negative number moves ones in."""
    return (keys >> shift) & ((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return number - 2**64 if number >= 2**63 else number

"""The output head and the table of token embeddings, where processes share a base.

Of the head each process has the rows of some tokens, and it is never gathered. Hidden states, which are small, go to
all processes instead: each one computes with its own rows for all of them, and the results are added (Shoeybi et al.
2019, "Megatron-LM", section 3). A table that is tied to the head works alike; another is whole in the host's memory,
since a lookup needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpref.distributed.world import World
from qpref.policy.passes import Pass, Passes
from qpref.policy.shard_loading import own_range


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """This process's rows of a table [vocabulary, width].

    Attributes:
        weight: [stop - start, width].
        start, stop: tokens that it has.
        num_tokens: of the whole vocabulary.
    """

    world: World
    weight: nn.Parameter
    start: int
    stop: int
    num_tokens: int

    @classmethod
    def of(cls, world: World, weight: nn.Parameter, num_tokens: int) -> VocabularyRows:
        """Describe the rows that a process has kept of a table with `num_tokens`."""
        return cls(world, weight, *own_range(world, num_tokens), num_tokens)

    @property
    def stand_in(self) -> Tensor:
        """[vocabulary, width] in the table's dtype and on its device, but one number in memory: for code that reads no
        more of a weight than that."""
        zero = torch.zeros((), dtype=self.weight.dtype, device=self.weight.device)
        return zero.expand(self.num_tokens, self.weight.shape[1])

    def gathered(self, states: Tensor) -> tuple[Tensor, slice]:
        """Collect [n, width] or [n] of every process, one after the other; returns them and where this one's are."""
        parts = self.world.gather(states.detach().reshape(-1), "the rows to look up or to score")
        width = states.shape[1:].numel()
        lengths = [len(part) // width for part in parts]
        start = sum(lengths[: self.world.rank])
        return torch.cat(parts).reshape(-1, *states.shape[1:]), slice(start, start + lengths[self.world.rank])


class HostEmbedding(nn.Module):
    """Token embeddings by a family's own layer from a table on the host: a lookup there, and its result on the GPU."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.device = own.weight.device
        self._own = (own.to("cpu"),)  # in a tuple: what moves a model to its device leaves the table where it is
        self.num_embeddings, self.embedding_dim = own.weight.shape

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._own[0].weight
        return weight

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self._own[0](input_ids.cpu()).to(self.device)
        return found


class ShardedEmbedding(nn.Module):
    """Token embeddings by a family's own layer, which may scale them, from rows that the processes share."""

    def __init__(self, own: Any, rows: VocabularyRows) -> None:
        super().__init__()
        own.padding_idx = None  # it matters for a gradient alone, and these rows have other numbers
        own.weight = rows.weight
        self._own, self.rows = (own,), rows  # in a tuple: its rows are no parameters of the model
        self.num_embeddings, self.embedding_dim = rows.num_tokens, rows.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        return self.rows.stand_in

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens, mine = self.rows.gathered(input_ids.reshape(-1))
        inside = (tokens >= self.rows.start) & (tokens < self.rows.stop)
        states = torch.zeros(len(tokens), self.embedding_dim, dtype=self.rows.weight.dtype, device=tokens.device)
        if self.rows.stop > self.rows.start:
            found = self._own[0](torch.where(inside, tokens - self.rows.start, 0)[None])[0]
            states = torch.where(inside[:, None], found, states)
        self.rows.world.add([states], "the embeddings")
        return states[mine].reshape(*input_ids.shape, self.embedding_dim)


class ShardedHead(nn.Module):
    """A linear output head whose rows the processes share. `head.score_tokens` doesn't call it; the model's own pass
    does, whose logits are compared once with qpref's."""

    def __init__(self, rows: VocabularyRows, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.bias = rows, bias
        self.passes: Passes | None = None

    @property
    def weight(self) -> Tensor:
        return self.rows.stand_in

    def forward(self, hidden: Tensor) -> Tensor:
        if self.passes is not None:
            self.passes.begin(Pass.LOGITS)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute [..., vocabulary] logits of [..., width] hidden states, together with all processes."""
        gathered, mine = self.rows.gathered(hidden.reshape(-1, hidden.shape[-1]))
        parts = self.rows.world.gather((gathered @ self.rows.weight.t()).t().reshape(-1), "the logits")
        logits = torch.cat([part.reshape(-1, len(gathered)) for part in parts]).t()[mine]
        logits = logits if self.bias is None else logits + self.bias
        return logits.reshape(*hidden.shape[:-1], self.rows.num_tokens)

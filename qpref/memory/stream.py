"""Layout of a packed micro-batch, reduced to the counts that memory and work depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from qpref.attention.segments import kept_scores

Lengths = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each of its responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Counts of a packed micro-batch, summed over its groups of P prompt tokens and R tokens a response.

    Attributes:
        tokens: fed tokens: P + sum(R - 1), or the sum of P + R - 1 where prompts aren't shared.
        segments: prompts and branches, each attention of its own; whole rows where prompts aren't shared.
        branches: of the segments, those with a prompt before them.
        scored_tokens: sum(R).
        prompt_tokens: fed tokens that are prompts.
        branch_keys: keys that branches attend to: sum(P + R - 1).
        masked_scores: query-key pairs under an explicit mask: sum((R - 1) (P + R - 1)).
        attended_scores: query-key pairs that attention computes: P^2 / 2 + sum(R P + R^2 / 2).
        kept_scores: query-key pairs whose softmax is kept where attention runs in blocks; fewer where a window hides
            some.
        row_scores: query-key pairs of whole rows: sum((P + R - 1)^2).
        prompt_scores: sum(P^2), masked in layers whose window is shorter than a prompt.
        longest_prompt: tokens.
        longest_keys: most keys that one token attends to.
    """

    tokens: float
    segments: float
    branches: float
    scored_tokens: float
    prompt_tokens: float
    branch_keys: float
    masked_scores: float
    attended_scores: float
    kept_scores: float
    row_scores: float
    prompt_scores: float
    longest_prompt: int
    longest_keys: int

    @classmethod
    def of(cls, groups: Iterable[Lengths], shared: bool = True) -> Stream:
        """Count the stream of (prompt, responses) lengths in tokens; `shared` computes each prompt once."""
        groups = list(groups)
        branches = [(prompt, response) for prompt, responses in groups for response in responses]
        prompts = [prompt for prompt, _ in (groups if shared else branches)]
        fed_branches = sum(r > 1 for _, r in branches) if shared else 0
        return cls(
            tokens=sum(prompts) + sum(r - 1 for _, r in branches),
            segments=len(prompts) + fed_branches,
            branches=fed_branches,
            scored_tokens=sum(r for _, r in branches),
            prompt_tokens=sum(prompts),
            branch_keys=sum(p + r - 1 for p, r in branches if r > 1),
            masked_scores=sum((r - 1) * (p + r - 1) for p, r in branches),
            attended_scores=sum(p**2 / 2 for p in prompts) + sum(r * p + r**2 / 2 for p, r in branches),
            kept_scores=sum(kept_scores(0, p) for p in prompts) + sum(kept_scores(p, r - 1) for p, r in branches),
            row_scores=sum((p + r - 1) ** 2 for p, r in branches),
            prompt_scores=sum(p**2 for p in prompts),
            longest_prompt=max(prompts, default=0),
            longest_keys=max([*prompts, *(p + r - 1 for p, r in branches)], default=0),
        )

    def scaled_to(self, tokens: float) -> Stream:
        """Scale the counts to `tokens` fed tokens of the same mix of groups."""
        factor = tokens / self.tokens
        sums = [part.name for part in fields(self) if not part.name.startswith("longest")]
        return replace(self, **{name: getattr(self, name) * factor for name in sums})

"""Names that a loss may give its metrics: in metrics.jsonl the core's own would otherwise be replaced in silence."""

from __future__ import annotations

REWARDS = frozenset({"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"})
"""What `reward_metrics` returns, under which reports and sinks look for a loss's rewards."""
CORE = frozenset({"step", "split", "tokens", "seconds", "loss", "grad_norm", "learning_rate"})
CORE_PREFIXES = ("eval_", "loss/", "logps/", "rewards/", "option/")


MAX_LENGTH, MAX_METRICS = 200, 500
"""Longest name, and most metrics of a loss: each row of metrics.jsonl has all of them."""


def name_problem(name: object) -> str | None:
    """Say why a loss's metric can't be called so; None where it can."""
    if not isinstance(name, str):
        return f"is called {name!r}, which is no text"
    if not name or not name.isprintable():
        return f"is called {name!r}, which can't be shown"
    if len(name) > MAX_LENGTH:
        return f"is called '{name[:40]}...', with {len(name):,} characters; at most {MAX_LENGTH} are allowed"
    if name in REWARDS:
        return None
    if name in CORE or name.startswith(CORE_PREFIXES):
        return f"is called '{name}', a name of the core's own"
    return None

"""What a merge is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qpref.errors import RecipeError

SHARE = 0.02
SMALLEST_NATS = 0.05


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How large the mean error of a margin may be: a share of the mean learned change, or nats.

    Attributes:
        share: of the learned change; no less than `SMALLEST_NATS` is asked for, which is below what 16-bit
            arithmetic does to a margin by itself.
        nats: where given, this and no share.
    """

    share: float = SHARE
    nats: float | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """`2%` or `0.3` (nats).

        Raises:
            RecipeError: it is neither.
        """
        number, percent, rest = text.strip().partition("%")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf") or rest:
            raise RecipeError(f"--max-margin-error {text}: expected a share such as 2%, or nats such as 0.3")
        return cls(share=value / 100) if percent else cls(nats=value)

    def in_nats(self, learned: float) -> float:
        """The largest error that passes where the margins have changed by `learned` nats on average."""
        return self.nats if self.nats is not None else max(SMALLEST_NATS, self.share * learned)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """One merge.

    Attributes:
        run: a finished run folder.
        out: the folder to write, new or empty.
        onto: `trained`: the dequantized weights that the adapter was trained on; `original`: the base's own.
        quantize: `nf4` to quantize the merged weights again; None for a plain model.
        dtype: bf16, fp16 or float32; auto takes the first of them that passes the verdict.
        tolerance: what passes.
        pairs: held-out pairs to replay; all, where there are fewer.
    """

    run: Path
    out: Path
    onto: Literal["trained", "original"] = "trained"
    quantize: Literal["nf4"] | None = None
    dtype: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    tolerance: Tolerance = field(default_factory=Tolerance)
    pairs: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A pair that the merged model prefers the other way round. Margins in nats."""

    place: str
    trained: float
    merged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the merged model, read back from disk, says beside the policy that was trained. All in nats.

    A margin is log p(chosen) - log p(rejected); of a single completion, its log-probability, negative where the
    completion is undesirable.

    Attributes:
        pairs: how many were replayed.
        origin: "held-out" or "training" pairs (or completions, for a loss of those).
        tokens: response tokens that were scored.
        learned: mean absolute change of the margin in training, by the policy that was trained.
        margin_error: mean absolute difference of the margins, merged less trained.
        largest_margin_error: of one pair.
        worst: the place of that pair.
        logprob_error: mean absolute difference of a response's log-probability.
        kl: mean over the scored tokens of KL(trained || merged).
        largest_kl: of one token.
        flips: pairs whose preference is the other way round.
        allowed: the largest `margin_error` that passes.
        data_changed: whether the pairs are of other data than the run's; None where nobody knows.
    """

    pairs: int
    origin: str
    tokens: int
    learned: float
    margin_error: float
    largest_margin_error: float
    worst: str
    logprob_error: float
    kl: float
    largest_kl: float
    flips: tuple[Flip, ...]
    allowed: float
    data_changed: bool | None = None

    @property
    def passed(self) -> bool:
        # Not "error > allowed": NaN must not pass.
        return self.margin_error <= self.allowed

    @property
    def share(self) -> float | None:
        """The margin error as a share of what was learned; None where nothing was."""
        return self.margin_error / self.learned if self.learned else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What was written.

    Attributes:
        path: the folder.
        dtype: the stored type (of what isn't 4-bit).
        kept: for each type that was looked at, the share of the learned change that its rounding leaves in the
            weights: the projection of what is stored on what was learned; 1 is all of it.
        verdict: of the folder.
        tried: of the types that `auto` has tried and left.
        onto_trained: for a merge onto the original, what the same type would give on the trained weights.
        notes: what was decided on the way, a sentence each.
    """

    path: Path
    dtype: str
    kept: dict[str, float]
    verdict: Verdict
    tried: dict[str, Verdict] = field(default_factory=dict)
    onto_trained: Verdict | None = None
    notes: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The verdicts and figures, for merge.json."""
        from dataclasses import asdict

        def plain(verdict: Verdict) -> dict[str, Any]:
            return asdict(verdict) | {"passed": verdict.passed, "share_of_learned": verdict.share}

        return {
            "dtype": self.dtype,
            "kept_in_weights": self.kept,
            "verdict": plain(self.verdict),
            "tried": {name: plain(verdict) for name, verdict in self.tried.items()},
            "onto_trained": plain(self.onto_trained) if self.onto_trained else None,
            "notes": self.notes,
        }

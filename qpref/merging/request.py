"""The request and the result of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qpref.errors import RecipeError

SHARE = 0.02
SMALLEST_NATS = 0.05


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest mean margin error that passes: a share of the mean learned change, or nats.

    Attributes:
        share: of the learned change; never below `SMALLEST_NATS`, which is less than the error of 16-bit arithmetic
            alone.
        nats: replaces the share where given.
    """

    share: float = SHARE
    nats: float | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Parse `2%` (a share) or `0.3` (nats).

        Raises:
            RecipeError: `text` is neither.
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
        """Convert to nats, given the mean learned change of the margins in nats."""
        return self.nats if self.nats is not None else max(SMALLEST_NATS, self.share * learned)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """Options of one merge.

    Attributes:
        run: a finished run folder.
        out: the folder to write, new or empty.
        onto: `trained`: the dequantized weights that the adapter was trained on; `original`: the base's own.
        quantize: `nf4` to requantize the merged weights; None for a plain model.
        dtype: stored dtype: bf16, fp16 or float32; `auto` for the first of them that passes the verdict.
        tolerance: the largest margin error that passes.
        pairs: number of held-out pairs to replay; all, where there are fewer.
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
    """A pair whose preferred response differs between the trained policy and the merged model; margins in nats."""

    location: str
    trained: float
    merged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Comparison of the merged model, read back from disk, with the trained policy; errors in nats.

    A margin is log p(chosen) - log p(rejected); of a single completion, its log-probability, negative where the
    completion is undesirable.

    Attributes:
        pairs: number of replayed pairs.
        origin: "held-out pairs" or "training pairs" (or completions, for a loss of those).
        tokens: number of scored response tokens.
        learned: mean absolute change of the margin in training.
        margin_error: mean absolute difference of the margins, merged minus trained.
        largest_margin_error: of a single pair.
        worst: location (file:line) of that pair.
        logprob_error: mean absolute difference of a response's log-probability.
        kl: mean over the scored tokens of KL(trained || merged).
        largest_kl: of a single token.
        flips: pairs whose preferred response has changed.
        allowed: the largest `margin_error` that passes.
        data_changed: the pairs' data have changed since training; None if unknown.
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
        """Margin error as a share of the learned change; None where nothing was learned."""
        return self.margin_error / self.learned if self.learned else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """The written folder and its verdict.

    Attributes:
        path: the folder.
        dtype: the stored dtype (of tensors that aren't 4-bit).
        kept: for each candidate dtype, the share of the learned change that survives its rounding in the weights: the
            projection of the stored change on the learned one; 1 is all of it.
        verdict: on the folder.
        tried: verdicts on the dtypes that `auto` tried before, which failed.
        onto_trained: for a merge onto the original, the verdict on the same dtype with the trained weights.
        notes: decisions on the way, one sentence each.
    """

    path: Path
    dtype: str
    kept: dict[str, float]
    verdict: Verdict
    tried: dict[str, Verdict] = field(default_factory=dict)
    onto_trained: Verdict | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Convert the result to JSON values."""
        return {"path": str(self.path)} | self.describe()

    def describe(self) -> dict[str, Any]:
        """Collect the verdicts and figures for merge.json."""
        from dataclasses import asdict

        def plain(verdict: Verdict) -> dict[str, Any]:
            flips = [asdict(flip) for flip in verdict.flips]
            return asdict(verdict) | {"flips": flips, "passed": verdict.passed, "share_of_learned": verdict.share}

        return {
            "dtype": self.dtype,
            "kept_in_weights": self.kept,
            "verdict": plain(self.verdict),
            "tried": {name: plain(verdict) for name, verdict in self.tried.items()},
            "onto_trained": plain(self.onto_trained) if self.onto_trained else None,
            "notes": self.notes,
        }

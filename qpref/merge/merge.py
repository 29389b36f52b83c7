"""A finished run -> a plain model folder and the verdict on it.

The delta is added in float32 onto the weights that were trained on, and nothing is quantized again (PEFT's merge on
4-bit layers re-quantizes, and a preference delta is smaller than NF4's steps). The stored type is chosen by what the
written model says of held-out pairs beside the policy that was trained.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from qpref import fsio
from qpref.errors import MergeError
from qpref.merge import guards
from qpref.merge.card import portable, write_card
from qpref.merge.guards import TrainedRun
from qpref.merge.models import AsStored, AsTrained, load_base, load_merged
from qpref.merge.replay import Hidden, replay
from qpref.merge.replayed_pairs import choose_rows
from qpref.merge.request import SHARE, MergeRequest, MergeResult, Verdict
from qpref.merge.rounding import LARGEST_FP16, STORED, Retention, Survey, rounded, row_blocks
from qpref.merge.settings import write_settings
from qpref.merge.verdict import Judge
from qpref.merge.write import Weights, remove_weights, write_weights
from qpref.policy.delta import LoraDelta
from qpref.training.prepare import start_digest

log = logging.getLogger("qpref")

SURELY_LOST = 5
"""A type is left untried where the share of the delta that its rounding takes from the weights is more than so many
times the margin error that passes. The margins lose less than the weights do: 30 % where the weights lose 58 %, 0.6 %
where they lose 1.5 % (benchmarks/results). The verdict decides on all others."""
LOSSY = "nf4 is lossy: its steps are far larger than what was learned"
HEADROOM = 2
"""How far below float16's largest number activations have to stay: another text's may be larger."""


def merge_run(request: MergeRequest) -> MergeResult:
    """Write the trained model of a run as a plain model folder, and compare it with the policy that was trained.

    The folder appears whole, whether its verdict has passed or not; the result says.

    Raises:
        RecipeError: there is no finished run, or the output folder holds something.
        MergeError: the run's parts don't belong together, or a value doesn't fit the type that was asked for.
        DataError: the pairs that the verdict needs can't be read.
        DiskError: there is no room, or the output folder can't be made.
    """
    request = guards.real_output(request)
    guards.refuse_output(request)
    run = guards.read_run(request.run)
    guards.refuse_original(request, run.base)
    named = STORED["bf16"] if request.dtype == "auto" else STORED[request.dtype]
    guards.refuse_full_disk(request.out, weights_of(run, request, named))
    survey = _survey(run, request)
    survey.refuse_overflow(named)
    session = Session(run, request, survey)
    with fsio.staged_folder(request.out) as staging:
        result = session.write(staging)
        fsio.write_json(staging / "merge.json", result.describe() | _origin(run, request))
        write_card(staging / "README.md", run, request, result)
        fsio.make_readable(staging)
    return result


def weights_of(run: TrainedRun, request: MergeRequest, dtype: torch.dtype) -> Weights:
    """The merged weights that are asked for, in a stored type."""
    packed = (run.base.quantized or run.base.linear) if request.quantize else frozenset()
    return Weights(
        base=run.base,
        delta=run.delta,
        places=run.places,
        dtype=dtype,
        original=request.onto == "original",
        packed=packed,
    )


def _survey(run: TrainedRun, request: MergeRequest) -> Survey:
    base, original = run.base, request.onto == "original"
    names = list(STORED) if request.dtype == "auto" and not request.quantize else [request.dtype]
    survey = Survey({name: Retention() for name in names if name in STORED})
    packed = Retention()
    for key, stored in base.tensors.items():
        if not stored.is_float:
            continue
        weight, module = base.original(key) if original else base.as_trained(key), run.places.get(key)
        survey.add(key, weight, run.delta, module)
        if request.quantize and module:
            # Quantized whole, as 4-bit blocks and their scales go on from row to row; summed in slices.
            again = base.through_nf4(rounded(weight, run.delta, module, base.dtype)).cpu()
            for rows in row_blocks(weight):
                packed.add(weight[rows], run.delta.of(module, rows), again[rows])
    if request.quantize:
        survey.retention[request.quantize] = packed
    return survey


def _origin(run: TrainedRun, request: MergeRequest) -> dict[str, Any]:
    """Where the merged model comes from, for merge.json."""
    asked = {"onto": request.onto, "quantize": request.quantize, "dtype": request.dtype, "pairs": request.pairs}
    facts = {name: run.facts[name] for name in ("base_weights", "created", "fingerprints", "versions")}
    return {"asked": asked, "run": {"base": portable(run.facts["base"])} | facts}


class Session:
    """Writes a model in one type after another, until one passes.

    Attributes:
        as_trained: how the base's weights are widened before training.
        replayed: the rows that are scored.
        judge: holds what was written to the trained policy.
    """

    def __init__(self, run: TrainedRun, request: MergeRequest, survey: Survey) -> None:
        self._run, self._request, self._survey = run, request, survey
        self._base = load_base(run.base)
        self.as_trained = AsTrained(run.base)
        self.replayed = choose_rows(run.plan, run.base_folder, run.tokenizer, request.pairs, run.facts["fingerprints"])
        self._notes: list[str] = [LOSSY] if request.quantize else []
        reference = self.replay(self.as_trained.after(start) if (start := _start(run)) else self.as_trained)
        trained = self.replay(self.as_trained.after(run.delta))
        self._largest = trained.largest
        self.judge = Judge.of(self.replayed, reference, trained, request.tolerance, run.base.device)

    def write(self, folder: Path) -> MergeResult:
        """Fill the folder with the first type that passes, or with the last there is."""
        tried: dict[str, Verdict] = {}
        names = self._names()
        for name in names:
            verdict = self._write(folder, name)
            if verdict.passed or name == names[-1]:
                break
            tried[name] = verdict
        return MergeResult(
            path=self._request.out,
            dtype=name,
            kept=self._survey.kept,
            verdict=verdict,
            tried=tried,
            onto_trained=self._onto_trained(STORED[name]) if self._request.onto == "original" else None,
            notes=self._notes,
        )

    def _write(self, folder: Path, name: str) -> Verdict:
        run, dtype = self._run, STORED[name]
        weights = weights_of(run, self._request, dtype)
        remove_weights(folder)  # of a type that was tried, before the room is looked at
        guards.refuse_full_disk(self._request.out, weights)
        self.as_trained.known.clear()  # a shard takes its room, and the next replay fills it again
        write_weights(weights, folder)
        write_settings(run.base, run.tokenizer_files, folder, dtype, weights.packed)
        if difference := guards.tokenizer_difference(run.tokenizer, folder):
            raise MergeError(f"the merged folder's {difference} would not be the one that was trained with")
        merged = replay(load_merged(folder), self.replayed.rows, AsStored(run.base.device), run.base.device)
        return self.judge.judge(merged)

    def replay(self, to_float32: AsTrained) -> Hidden:
        """What the base makes of the chosen rows, its weights widened like this."""
        return replay(self._base, self.replayed.rows, to_float32, self._run.base.device)

    def _onto_trained(self, dtype: torch.dtype) -> Verdict:
        return self.judge.judge(self.replay(self.as_trained.after(self._run.delta, dtype)))

    def _names(self) -> list[str]:
        """The types to try, in order. Whoever names one gets it."""
        request, run = self._request, self._run
        overflow = self._overflow()
        if request.dtype != "auto":
            if request.dtype == "fp16" and overflow:
                log.warning("fp16 was asked for, and %s", overflow)
            return [request.dtype]
        if request.quantize:
            return [run.facts["dtype"]]
        if overflow:
            self._notes.append(f"fp16 left out: {overflow}")
        fitting = [name for name in STORED if name != "fp16" or not overflow]
        lost = {name: 1 - kept for name, kept in self._survey.kept.items()}
        if request.onto == "original":
            # No type can pass for the rounding's sake where another base has moved the margins already.
            return [next(name for name in fitting if lost[name] <= SHARE or name == "float32")]
        allowed = SURELY_LOST * self.judge.allowed / self.judge.learned if self.judge.learned else math.inf
        hopeless = [name for name in fitting if lost[name] > allowed and name != "float32"]
        self._notes += [f"{name} not tried: it keeps {1 - lost[name]:.1%} of the learned change" for name in hopeless]
        return [name for name in fitting if name not in hopeless]

    def _overflow(self) -> str | None:
        """Why float16 is too small for a merged value, or for an activation that the replayed rows have shown."""
        if self._survey.largest > LARGEST_FP16:
            return f"a weight is {self._survey.largest:.3g}, beyond its range"
        if self._largest * HEADROOM > LARGEST_FP16:
            return f"an activation reaches {self._largest:.3g}, near the end of its range"
        return None


def _start(run: TrainedRun) -> LoraDelta | None:
    """What the run's start adapter adds: with it, the base is the reference."""
    start = run.plan.recipe.adapter.start
    if start is None:
        return None
    if not Path(start).is_dir() or start_digest(start) != run.facts["fingerprints"]["start adapter"]:
        raise MergeError(f"{start}: not the adapter that the run started from", "the verdict needs it as its reference")
    return LoraDelta.read(Path(start))

"""Merge a finished run into a plain model folder, and judge the result.

The delta is added in float32 to the weights that were trained on, and nothing is requantized (PEFT's merge on 4-bit
layers requantizes, and a preference delta is smaller than NF4's steps). The stored dtype is chosen by comparing the
written model with the trained policy on held-out pairs.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from qpref import fsio, publish
from qpref.errors import MergeError
from qpref.merging import guards
from qpref.merging.card import write_card
from qpref.merging.compared_models import AsStored, AsTrained, load_base, load_merged
from qpref.merging.guards import TrainedRun
from qpref.merging.replay import Hidden, replay
from qpref.merging.replayed_pairs import choose_pairs
from qpref.merging.request import SHARE, MergeRequest, MergeResult, Verdict
from qpref.merging.rounding import LARGEST_FP16, STORED, Retention, Survey, rounded, row_blocks
from qpref.merging.settings import write_settings
from qpref.merging.verdict import Judge
from qpref.merging.write import Weights, remove_weights, write_weights
from qpref.policy.delta import LoraDelta
from qpref.policy.device import announce
from qpref.policy.out_of_memory import out_of_memory_as
from qpref.policy.tokenizer import tokenizer_difference
from qpref.training.card import portable
from qpref.training.prepare import start_digest

log = logging.getLogger("qpref")

SURELY_LOST = 5
"""A dtype isn't tried where its rounding loses a larger share of the delta in the weights than this factor times the
allowed margin error. Margins lose less than the weights do: 30 % where the weights lose 58 %, 0.6 % where they lose
1.5 % (benchmarks/results). All other dtypes are decided by the verdict."""
LOSSY = "nf4 is lossy: its steps are far larger than what was learned"
HEADROOM = 2
"""Factor by which activations must stay below float16's largest number, since other texts may have larger ones."""


def merge_run(request: MergeRequest) -> MergeResult:
    """Write the trained model of a run as a plain model folder, and compare it with the policy that was trained.

    The folder is renamed into place once complete, whether its verdict has passed or not.

    Raises:
        RecipeError: the run isn't finished, or the output folder isn't empty.
        MergeError: the run's parts don't belong together, or a value doesn't fit the requested dtype.
        DataError: the pairs for the verdict can't be read.
        DiskError: the disk is full, or the output folder can't be made.
        DeviceMemoryError: one layer in float32 doesn't fit.
    """
    with out_of_memory_as(
        "the device ran out of memory", "free its memory; a merge computes one layer in float32 at a time"
    ):
        return _merge(request)


def _merge(request: MergeRequest) -> MergeResult:
    request = guards.real_output(request)
    guards.refuse_output(request)
    run = guards.read_run(request.run)
    guards.refuse_original(request, run.base)
    guards.refuse_quantized(request, run.base)
    smallest = STORED["bf16"] if request.dtype == "auto" else STORED[request.dtype]
    guards.refuse_full_disk(request.out, weights_of(run, request, smallest))
    announce(run.base.device, run.plan.recipe.model.device)
    survey = _survey(run, request)
    survey.refuse_overflow(smallest)
    session = Session(run, request, survey)
    with publish.staged_folder(request.out) as staging:
        result = session.write(staging)
        fsio.write_json(staging / "merge.json", result.describe() | _origin(run, request))
        write_card(staging / "README.md", run, request, result)
        fsio.make_readable(staging)
    return result


def weights_of(run: TrainedRun, request: MergeRequest, dtype: torch.dtype) -> Weights:
    """Describe the requested merged weights, in a stored dtype."""
    return Weights(
        base=run.base,
        learned=run.learned,
        dtype=dtype,
        original=request.onto == "original",
        packed=run.base.packable if request.quantize else frozenset(),
    )


def _survey(run: TrainedRun, request: MergeRequest) -> Survey:
    """Measure on all weights how much of the delta each candidate dtype retains."""
    base, original = run.base, request.onto == "original"
    names = list(STORED) if request.dtype == "auto" and not request.quantize else [request.dtype]
    survey = Survey({name: Retention() for name in names if name in STORED})
    packed, weights = Retention(), weights_of(run, request, base.dtype)
    for key, entry in base.tensors.items():
        if not entry.is_float or key in base.kept:
            continue
        weight, delta = base.original(key) if original else base.as_trained(key), run.learned.of_tensor(key)
        survey.add(key, weight, delta)
        if request.quantize and delta:
            stored = rounded(weight, delta, base.dtype)
            if weights.is_packed(key):
                # Quantized whole, since 4-bit blocks and their scales cross rows; summed in slices.
                stored = base.through_nf4(stored, base.module_of(key)).cpu()
            for rows in row_blocks(weight):
                packed.add(weight[rows], delta(rows), stored[rows])
    if request.quantize:
        survey.retention[request.quantize] = packed
    return survey


def _origin(run: TrainedRun, request: MergeRequest) -> dict[str, Any]:
    """Collect the request and the run's provenance for merge.json."""
    asked = {"onto": request.onto, "quantize": request.quantize, "dtype": request.dtype, "pairs": request.pairs}
    facts = {name: run.facts[name] for name in ("base_weights", "created", "fingerprints", "versions")}
    return {"asked": asked, "run": {"base": portable(run.facts["base"])} | facts}


class Session:
    """Writes the merged model in one dtype after another, until one passes the verdict.

    Attributes:
        as_trained: converts the base's weights, as before training, to float32.
        replayed: the pairs that are scored.
        judge: compares a written model with the trained policy.
    """

    def __init__(self, run: TrainedRun, request: MergeRequest, survey: Survey) -> None:
        self._run, self._request, self._survey = run, request, survey
        self._base = load_base(run.base)
        self.as_trained = AsTrained(run.base)
        self.replayed = choose_pairs(run.plan, run.base_folder, run.tokenizer, request.pairs, run.facts["fingerprints"])
        self._notes: list[str] = [LOSSY] if request.quantize else []
        log.info("scoring %d %s before and after training", len(self.replayed.contrasts), self.replayed.origin)
        reference = self.replay(self.as_trained.after(start) if (start := _start(run)) else self.as_trained)
        trained = self.replay(self.as_trained.after(run.delta))
        self._largest = trained.largest
        self.judge = Judge.of(self.replayed, reference, trained, request.tolerance, run.base.device)

    def write(self, folder: Path) -> MergeResult:
        """Fill the folder with the first dtype that passes, or else with the last candidate."""
        tried: dict[str, Verdict] = {}
        names = self._candidates()
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
        log.info("writing the model in %s, and scoring it as it is read back", name)
        weights = weights_of(run, self._request, dtype)
        remove_weights(folder)  # of the dtype tried before: free its disk space first
        guards.refuse_full_disk(self._request.out, weights)
        self.as_trained.dequantized.clear()  # free the memory for a shard; the next replay refills the cache
        write_weights(weights, folder)
        write_settings(run.base, run.tokenizer_files, folder, dtype, weights.packed)
        if difference := tokenizer_difference(run.tokenizer, folder):
            raise MergeError(f"the merged folder's {difference} would differ from the one used in training")
        merged = replay(load_merged(folder, run.base), self.replayed.rows, AsStored(run.base.device), run.base.device)
        return self.judge.judge(merged)

    def replay(self, to_float32: AsTrained) -> Hidden:
        """Replay the selected rows through the base, with its weights converted by `to_float32`."""
        return replay(self._base, self.replayed.rows, to_float32, self._run.base.device)

    def _onto_trained(self, dtype: torch.dtype) -> Verdict:
        return self.judge.judge(self.replay(self.as_trained.after(self._run.delta, dtype)))

    def _candidates(self) -> list[str]:
        """List the dtypes to try, in order; a dtype named by the user is the only one."""
        request, run = self._request, self._run
        overflow = self._overflow()
        if request.dtype != "auto":
            if request.dtype == "fp16" and overflow:
                log.warning("fp16 was requested, but %s", overflow)
            return [request.dtype]
        if request.quantize:
            return [run.facts["dtype"]]
        if overflow:
            self._notes.append(f"fp16 left out: {overflow}")
        fitting = [name for name in STORED if name != "fp16" or not overflow]
        lost = {name: 1 - kept for name, kept in self._survey.kept.items()}
        if request.onto == "original":
            # The verdict can't choose here: the base's quantization error moves the margins in every dtype.
            return [next(name for name in fitting if lost[name] <= SHARE or name == "float32")]
        allowed = SURELY_LOST * self.judge.allowed / self.judge.learned if self.judge.learned else math.inf
        too_lossy = [name for name in fitting if lost[name] > allowed and name != "float32"]
        self._notes += [f"{name} not tried: it keeps {1 - lost[name]:.1%} of the learned change" for name in too_lossy]
        return [name for name in fitting if name not in too_lossy]

    def _overflow(self) -> str | None:
        """Explain why float16's range is too small for a weight or for a replayed activation; None if it fits."""
        if self._survey.largest > LARGEST_FP16:
            return f"a weight is {self._survey.largest:.3g}, beyond its range"
        if self._largest * HEADROOM > LARGEST_FP16:
            return f"an activation reaches {self._largest:.3g}, too close to the end of its range"
        return None


def _start(run: TrainedRun) -> LoraDelta | None:
    """Read the delta of the run's start adapter, if any: base plus start adapter is the reference."""
    start = run.plan.recipe.adapter.start
    if start is None:
        return None
    if not Path(start).is_dir() or start_digest(start) != run.facts["fingerprints"]["start adapter"]:
        raise MergeError(f"{start}: not the adapter that the run started from", "the verdict needs it as reference")
    return LoraDelta.read(Path(start), run.base.layers)

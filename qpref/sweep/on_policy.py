"""On-policy rounds: sample from the policy, let a reward rank the responses, train on the preferences, measure, repeat.

A round is accepted if its held-out reward rises beyond noise and its KL from the base stays within the budget. The
first one that isn't ends the rounds, and the last accepted one is the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpref import fsio
from qpref.errors import CheckpointError, DataError
from qpref.evaluation.generate import prompt_ids, read_prompts
from qpref.evaluation.statistics import Estimate
from qpref.evaluation.subjects import Subject, identify
from qpref.hooks.process_state import ProcessState
from qpref.policy.kept_base import KeptBase, free_unreachable
from qpref.policy.source import resolve_base
from qpref.recipe.plan import Plan
from qpref.recipe.rounds_section import RoundsSection
from qpref.records import UnpairedExample
from qpref.sampling import journal
from qpref.sampling.decode import Draws
from qpref.sampling.measure import Measured, measure
from qpref.sampling.preferences import Form
from qpref.sampling.reward import Scorer
from qpref.sampling.sample import Request, sample_to
from qpref.sweep.points import Point
from qpref.sweep.round_record import NAME, OVERWRITE, RoundRecord
from qpref.sweep.rounds import preferences_path, refuse_other_start
from qpref.training.folder import RunFolder
from qpref.training.prepare import start_digest
from qpref.training.run import train_plan

log = logging.getLogger("qpref")

START = "start"
"""Name of the policy before the first round, in the record."""
FREE_TO_CHANGE = frozenset({"prompts", "heldout", "reward", "kl_budget"})
"""Keys of `[rounds]` that are compared by their content, or may differ between a command and its resumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished round.

    Attributes:
        pairs: preferences that it was trained on.
        sampled_reward: mean reward of the responses that these were made of.
        measured: the policy after it, on the held-out prompts.
        gain: of the mean held-out reward, over the round before.
        refusal: why it isn't accepted; None where it is.
    """

    point: Point
    pairs: int
    sampled_reward: float
    measured: Measured
    gain: Estimate
    refusal: str | None


@dataclass(slots=True, kw_only=True)
class Progress:
    """The rounds so far.

    Attributes:
        start: the policy before the first round, on the held-out prompts.
        ended: why no further round follows, where a round or its sampling gave a reason.
    """

    start: Measured
    rounds: list[Round] = field(default_factory=list)
    ended: str | None = None

    @property
    def result(self) -> Round | None:
        """The last accepted round."""
        return next((one for one in reversed(self.rounds) if one.refusal is None), None)


class OnPolicyRounds:
    """The stages of on-policy rounds in one folder, over one base in memory.

    Args:
        folder: holds the runs, the sampled preferences and the record.
        points: the rounds, see `qpref.sweep.rounds.make_rounds`.

    Raises:
        QprefError: a prompt file can't be read, the reward can't be built, or `RoundRecord` refuses.
    """

    def __init__(self, folder: Path, points: Sequence[Point], *, resume: bool, overwrite: bool) -> None:
        self._folder, self._points = folder, points
        plan = _plan(points[0])
        assert plan.recipe.rounds is not None
        assert plan.reward is not None
        self._settings: RoundsSection = plan.recipe.rounds
        self._form: Form = _form(plan, self._settings)
        self._score = Scorer.of(plan.reward)
        self._prompts, self._heldout = read_prompts(self._settings.prompts), read_prompts(self._settings.heldout)
        self._kept, self._state = KeptBase(), ProcessState.now(random_numbers=True)
        first = _start_of(plan)
        described = _described(first, plan, self._settings, self._prompts, self._heldout) | {
            "reward": self._score.settings
        }
        self._first = first
        if resume and not (folder / NAME).exists() and any(map(_is_run, points)):
            raise CheckpointError(f"{folder}: its runs are of no on-policy rounds", "use another --output")
        if overwrite:
            self._remove_samples()
        self._record = RoundRecord(folder, described, resume=resume, overwrite=overwrite)

    def run(self) -> Iterator[Progress]:
        """Do the rounds, and yield after the first measurement and after each round.

        Raises:
            CheckpointError: what an earlier call has left was changed since.
            QprefError: a stage failed; those before it are kept.
        """
        progress = Progress(start=self._measured(START, self._first, self._settings.seed))
        log.info("before training: %s", _line(progress.start))
        yield progress
        for number, point in enumerate(self._points, 1):
            log.info("round %d of %d", number, len(self._points))
            sampled = self._sampled(point, number)
            if not sampled["rows"]:
                progress.ended = f"{point.name} has no pair: the rewards of no prompt's responses differ enough"
                yield progress
                return
            self._train(point)
            after = self._measured(point.name, identify(str(self._folder / point.name)), self._settings.seed)
            before = progress.rounds[-1].measured if progress.rounds else progress.start
            gain = after.gain(before)
            refusal = why_refused(after, gain, self._settings.kl_budget)
            progress.rounds.append(
                Round(
                    point=point,
                    pairs=sampled["rows"],
                    sampled_reward=sampled["reward"],
                    measured=after,
                    gain=gain,
                    refusal=refusal,
                )
            )
            log.info("%s: %s", point.name, _line(after))
            progress.ended = refusal and f"{point.name}: {refusal}"
            yield progress
            if refusal:
                return

    def _sampled(self, point: Point, number: int) -> dict[str, Any]:
        """Sample the preferences of a round; returns their summary."""
        plan, output = _plan(point), preferences_path(self._folder, point.name)
        start = start_digest(plan.recipe.adapter.start)
        found: dict[str, Any] | None = self._record.get(point.name, "sampled")
        if found is not None:
            if found["start"] != start or not output.is_file() or fsio.sha256_file(output) != found["sha256"]:
                raise CheckpointError(
                    f"{output}: is not what was sampled for this round, or the adapter before it has changed", OVERWRITE
                )
            return found
        request = Request(
            subject=self._first if number == 1 else _start_of(plan),
            prompts=self._prompts,
            draws=self._draws(self._settings.seed + number),
            form=self._form,
            min_gap=self._settings.min_gap,
            batch_size=self._settings.batch_size,
            reward=self._score.settings,
            kept=self._kept,
        )
        # Without a record, an output is that of a call that was killed before it could write one.
        sampled = sample_to(output, request, self._score, overwrite=output.exists())
        self._clean_up()
        summary = {name: value for name, value in asdict(sampled).items() if name != "tokens"}
        summary |= {"start": start, "sha256": fsio.sha256_file(output)}
        self._record.put(point.name, "sampled", summary)
        return summary

    def _train(self, point: Point) -> None:
        plan = _plan(point)
        is_there, is_begun = _is_run(point), bool(self._record.get(point.name, "begun"))
        if is_there and is_begun:
            refuse_other_start(point)
        self._record.put(point.name, "begun", True)
        # A run that these rounds haven't begun is one that --overwrite was to replace, in this call or a killed one.
        train_plan(plan, resume=is_there and is_begun, overwrite=is_there and not is_begun, kept=self._kept)
        self._clean_up()

    def _measured(self, name: str, subject: Subject, seed: int) -> Measured:
        """Measure a policy on the held-out prompts, or return what an earlier call measured."""
        adapter = start_digest(None if subject.adapter is None else str(subject.adapter))
        found = self._record.get(name, "heldout")
        if found is not None:
            if found["adapter"] != adapter:
                raise CheckpointError(f"{subject.name}: its adapter has changed since it was measured", OVERWRITE)
            return Measured.of_json(found["measured"])
        log.info("measuring %s on %d held-out prompts", subject.name, len(self._heldout))
        measured = measure(
            subject, self._heldout, self._draws(seed), self._score, self._settings.batch_size, self._kept
        )
        self._clean_up()
        self._record.put(name, "heldout", {"adapter": adapter, "measured": measured.as_json()})
        return measured

    def _draws(self, seed: int) -> Draws:
        settings = self._settings
        return Draws(
            num_responses=settings.k,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
        )

    def _clean_up(self) -> None:
        """Set the process back, and free what a stage has left in memory, but for the base."""
        self._state.restore()
        free_unreachable()

    def _remove_samples(self) -> None:
        for point in self._points:
            path = preferences_path(self._folder, point.name)
            fsio.remove_tree(path)
            fsio.remove_tree(path.with_name(path.name + journal.SUFFIX))


def why_refused(after: Measured, gain: Estimate, kl_budget: float | None) -> str | None:
    """Say why a round isn't accepted; None where it is.

    Args:
        gain: of the mean held-out reward, over the round before.
        kl_budget: most KL from the base, nats per response.
    """
    kl = after.kl_from_base.value
    if kl_budget is not None and kl > kl_budget:
        return f"its KL from the base is {kl:.2f} nats, over the budget of {kl_budget:g}"
    if not gain.low > 0:
        return (
            f"the held-out reward no longer rises beyond noise: {gain.value:+.3f} "
            f"(95 % interval {gain.low:+.3f} to {gain.high:+.3f})"
        )
    return None


def _plan(point: Point) -> Plan:
    assert point.plan is not None
    return point.plan


def _is_run(point: Point) -> bool:
    return RunFolder(_plan(point).output).run_json.exists()


def _form(plan: Plan, settings: RoundsSection) -> Form:
    if settings.form == "auto":
        return "ranked" if plan.is_listed else "extremes"
    return settings.form


def _start_of(plan: Plan) -> Subject:
    """Describe the policy that a run starts from: the base, or its start adapter on it."""
    recipe, start = plan.recipe, plan.recipe.adapter.start
    base = resolve_base(recipe.model)
    if start is None:
        return Subject(name="the base", kind="model", recipe=recipe, base=base)
    return Subject(name=start, kind="adapter", recipe=recipe, base=base, adapter=Path(start))


def _described(
    first: Subject,
    plan: Plan,
    settings: RoundsSection,
    prompts: Sequence[UnpairedExample],
    heldout: Sequence[UnpairedExample],
) -> dict[str, Any]:
    """List what decides every stage, as JSON values.

    Raises:
        DataError: a prompt can't be rendered, or is in both files.
    """
    tokenizer = first.tokenizer()
    ids = {"prompts": prompt_ids(tokenizer, prompts), "held-out prompts": prompt_ids(tokenizer, heldout)}
    trained = {tuple(one) for one in ids["prompts"]}
    for prompt, one in zip(heldout, ids["held-out prompts"], strict=True):
        if tuple(one) in trained:
            raise DataError(f"{prompt.source}: this held-out prompt is among the prompts of [rounds] too")
    digests = {name: hashlib.sha256(json.dumps(each).encode()).hexdigest() for name, each in ids.items()}
    options = settings.model_dump(mode="json")
    return {
        "recipe": plan.fingerprint,
        "base": first.base.weights,
        "start adapter": start_digest(plan.recipe.adapter.start),
        "[rounds]": {key: value for key, value in options.items() if key not in FREE_TO_CHANGE},
        **digests,
    }


def _line(measured: Measured) -> str:
    reward, kl = measured.reward, measured.kl_from_base
    return f"held-out reward {reward.value:.3f} ({reward.low:.3f} to {reward.high:.3f}), KL {kl.value:.2f} nats"

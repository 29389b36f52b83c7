"""When a run's checkpoints are written, and what happens to one that the disk refuses.

The state of a run is in memory, so a refused save loses nothing while the process lives: training continues, and the
next save is the second try. Another refusal then ends the run, before more work is at risk than two intervals.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpref.errors import DiskError
from qpref.training import checkpoint, snapshot
from qpref.training.checkpoint import Checkpoint
from qpref.training.folder import RunFolder
from qpref.training.metrics import Recorder
from qpref.training.ranks import agree_on_checkpoint
from qpref.training.snapshot import Session

log = logging.getLogger("qpref")


@dataclass(slots=True)
class Saver:
    """Writes the checkpoints of one process.

    Attributes:
        stop_requests: signals that ask the run to stop.
        last_step: the run's, if patience doesn't end it before.
        refused: step whose save the disk has refused, and no later one has succeeded; None otherwise.
        unsaved_best: copy of the best step so far, where its save was refused: the result may be made from it.
    """

    session: Session
    folder: RunFolder
    recorder: Recorder
    stop_requests: Sequence[int]
    last_step: int
    refused: int | None = None
    unsaved_best: Checkpoint | None = None

    def save(self) -> None:
        """Save the current state, or put it off to the next save; all processes call it, and rank 0 writes.

        Raises:
            PeerError: the processes' adapters differ.
            DiskError: the disk has refused this save and the one before it, or a signal has asked the run to stop, so
                that there is no next one.
        """
        step, world = self.session.state.step, self.session.prepared.world
        agree_on_checkpoint(self.session)
        if not world.is_first:
            return
        world.note("saving")
        try:
            self._write()
        except DiskError as error:
            if self.stop_requests or self.refused is not None:
                raise self._failure(error) from error
            self.refused = step
            is_last = step == self.last_step
            outlook = (
                "the adapter is written all the same" if is_last else "training continues, and the next save retries"
            )
            log.warning("step %d is not saved: %s; %s", step, error.what, outlook)
            self._keep_best()
        else:
            self.refused = None

    def _write(self) -> None:
        state, keep = self.session.state, self.session.prepared.plan.recipe.train.keep
        self.folder.refuse_replaced()
        self.recorder.flush()
        if self.unsaved_best is not None and state.best is not None and state.best.step == self.unsaved_best.step:
            checkpoint.save_checkpoint(self.folder.checkpoints, self.unsaved_best, keep)
        self.unsaved_best = None
        checkpoint.save_checkpoint(self.folder.checkpoints, self._captured(), keep)

    def _keep_best(self) -> None:
        if self.session.state.is_best:
            current = self._captured()
            tensors = {
                stem: {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}
                for stem, named in current.tensors.items()
            }
            self.unsaved_best = replace(current, tensors=tensors)

    def _captured(self) -> checkpoint.Checkpoint:
        return snapshot.capture(self.session, self.recorder.size, self.recorder.sha256)

    def _failure(self, error: DiskError) -> DiskError:
        before = "" if self.refused is None else f", and neither was step {self.refused}"
        hint = error.hint or "write to another disk, or repair this one; the last good checkpoint resumes with --resume"
        return DiskError(f"step {self.session.state.step} is not saved{before}: {error.what}", hint)

"""The errors that a user can cause. Each carries what is wrong, the way out, and the exit code of its kind."""

from __future__ import annotations


class QprefError(Exception):
    """A failure that is shown as one message without a traceback.

    Args:
        what: what is wrong, where, and what was found; lines after the first are indented by the writer.
        hint: what to do about it, or None where `what` says it.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\nhint: {self.hint}"


class RecipeError(QprefError):
    """The recipe or the command line is wrong, or names something that is not installed."""

    exit_code = 2


class DataError(QprefError):
    """The preference data cannot be read or trusted."""

    exit_code = 3


class UnreachableDataError(DataError):
    """The data are neither on this machine nor can anybody be asked for them at the moment."""


class CheckpointError(QprefError):
    """Checkpoints exist and none verifies, or they belong to another run."""

    exit_code = 4


class DeviceMemoryError(QprefError):
    """The device ran out of memory at the smallest micro-batch."""

    exit_code = 5


class PluginError(QprefError):
    """A plugin failed to import, clashes with another, or broke its contract."""

    exit_code = 6


class RunLockedError(QprefError):
    """Another process is writing this run."""

    exit_code = 7


class DiskError(QprefError):
    """The disk refused a write."""

    exit_code = 8


class NonFiniteError(QprefError):
    """The loss or its gradient stayed non-finite."""

    exit_code = 9


class PolicyError(QprefError):
    """The base model or adapter cannot be read, or is not what the run needs."""

    exit_code = 10


class MergeError(QprefError):
    """The merge cannot be done faithfully."""

    exit_code = 11


class InstallError(QprefError):
    """A package that qpref needs is missing, or is of a version that doesn't fit."""

    exit_code = 12


class StoppedBySignal(QprefError):
    """A signal asked to stop: a run has saved itself, all else has left nothing half-written.

    Exits as the shell has it: 128 + the signal's number.
    """

    def __init__(self, what: str, hint: str | None, signal_number: int) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number

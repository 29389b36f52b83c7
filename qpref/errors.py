"""Errors that a user can cause; each has a message, a hint with the way out, and the exit code of its kind."""

from __future__ import annotations


class QprefError(Exception):
    """A failure that the command line prints as one message without a traceback.

    Args:
        what: the problem, its location and the value found; the caller indents lines after the first.
        hint: the way to fix it, or None where `what` already names it.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\nhint: {self.hint}"


class RecipeError(QprefError):
    """An invalid recipe or command line, or a plugin name that isn't installed."""

    exit_code = 2


class DataError(QprefError):
    """Preference data that cannot be read or trusted."""

    exit_code = 3


class UnreachableDataError(DataError):
    """The data aren't on this machine, and their host can't be reached."""


class CheckpointError(QprefError):
    """Checkpoints of which none verifies, or that belong to another run."""

    exit_code = 4


class DeviceMemoryError(QprefError):
    """Out of memory at the smallest micro-batch."""

    exit_code = 5


class PluginError(QprefError):
    """A plugin that cannot be imported, clashes with another, or broke its contract."""

    exit_code = 6


class RunLockedError(QprefError):
    """A run folder that another process is writing."""

    exit_code = 7


class DiskError(QprefError):
    """A write that the disk refused."""

    exit_code = 8


class NonFiniteError(QprefError):
    """A loss or gradient that stayed non-finite."""

    exit_code = 9


class PolicyError(QprefError):
    """A base model or adapter that cannot be read, or doesn't fit the run."""

    exit_code = 10


class MergeError(QprefError):
    """A merge that would change the model's predictions too much, or cannot be done."""

    exit_code = 11


class InstallError(QprefError):
    """A package that qpref needs is missing, or is of a version that doesn't fit."""

    exit_code = 12


class PeerError(QprefError):
    """Another process of a run on several GPUs died, hangs, or works on something else."""

    exit_code = 13


class ForgettingError(QprefError):
    """A trained model that has lost what its base knew, where that was to be an error."""

    exit_code = 14


class FailedElsewhere(PeerError):
    """Another process of the run has failed, and prints the message; this one leaves with the same exit code."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


class StoppedBySignal(QprefError):
    """A signal (Ctrl+C, SIGTERM): a run has saved a checkpoint, other commands leave nothing half-written.

    The exit code is the shell's: 128 + the signal number.
    """

    def __init__(self, what: str, hint: str | None, signal_number: int) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number

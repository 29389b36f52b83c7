"""All mutants, in the order of the catalogue."""

from __future__ import annotations

from . import of_data, of_failures, of_losses, of_merging, of_models, of_processes, of_runs
from .mutant import Mutant

NUM_BUGS = 60
_FOUND = [*of_data.MUTANTS, *of_losses.MUTANTS, *of_models.MUTANTS, *of_merging.MUTANTS, *of_runs.MUTANTS]
MUTANTS: tuple[Mutant, ...] = (
    *sorted(_FOUND, key=lambda each: int(each.bug[1:])),
    *of_failures.MUTANTS,
    *of_processes.MUTANTS,
)

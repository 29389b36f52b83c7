"""Mistakes of a run in several processes, and of which each of them does."""

from __future__ import annotations

from .mutant import Mutant, mutant

PEERS = "qpref/distributed/peers.py"
RANKS = "qpref/training/ranks.py"
AGREEMENT = "tests/distributed/test_agreement.py::"
FAULTS = "tests/distributed/test_faults.py::"
RESUME = "tests/distributed/test_resumed_ranks.py::"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "G1",
        "each process starts from its own adapter",
        RANKS,
        '    world.copy_first(list(prepared.policy.trained_parameters().values()), "the adapter\'s start")\n',
        "",
        AGREEMENT + "test_all_processes_start_from_rank_0s_adapter",
    ),
    mutant(
        "G1",
        "a process that calls one collective less than the others isn't found",
        PEERS,
        "        if len({row[0] for row in rows}) > 1:\n",
        "        if False:\n",
        FAULTS + "test_a_process_that_is_a_step_ahead_is_found",
        FAULTS + "test_processes_that_come_to_different_collectives_are_told_apart",
    ),
    mutant(
        "G1",
        "every process writes checkpoints",
        "qpref/training/saving.py",
        "        if not world.is_first:\n            return\n",
        "",
        RESUME + "test_the_run_folder_is_rank_0s_alone",
    ),
    mutant(
        "G1",
        "a process that its torchrun has started again resumes whatever run it finds",
        "qpref/training/run.py",
        "    if is_restart() and was_begun_by_this_job(RunFolder(path)):\n",
        "    if is_restart():\n",
        RESUME + "test_restarted_processes_leave_the_run_of_another_job_alone",
    ),
    mutant(
        "G1",
        "a signal stops the process that received it, and no other",
        PEERS,
        "self.stops += [row[2] for row in rows if row[2]][:1]",
        "self.stops += [stop] if stop else []",
        RESUME + "test_a_signal_to_one_process_stops_all_after_the_same_step_and_others_resume",
    ),
    mutant(
        "G1",
        "a process that makes progress is taken for one that hangs",
        "qpref/distributed/waiting.py",
        "(where, now if before else self._began)",
        "(where, self._began)",
        FAULTS + "test_a_slow_process_that_makes_progress_is_waited_for",
    ),
)

"""Mistakes that only a failure shows: of processes that die, disks, and starts beside each other.

Their numbers are those of the figures in docs/reliability.md that would no longer hold.
"""

from __future__ import annotations

from .mutant import Edit, Mutant, mutant

CHECKPOINT = "qpref/training/checkpoint.py"
SNAPSHOT = "qpref/training/snapshot.py"
KILLS = "tests/training/test_kills.py::"
AIMED = "tests/training/test_aimed_kills.py::"
AT_ANY_MOMENTS = KILLS + "test_a_run_killed_at_any_moments_ends_as_if_it_never_stopped"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "G1",
        "a resumed run begins with a new optimizer",
        SNAPSHOT,
        '    optim.restore_optimizer(session.optimizer, saved.tensors["optimizer"], values["optimizer"])\n',
        "",
        AT_ANY_MOMENTS,
    ),
    mutant(
        "G1",
        "a resumed run repeats the step that its checkpoint has",
        SNAPSHOT,
        'state.step, state.tokens = saved.step, values["tokens"]',
        'state.step, state.tokens = saved.step - 1, values["tokens"]',
        AT_ANY_MOMENTS,
    ),
    mutant(
        "G1",
        "a resumed run's rows come after those of the steps that it repeats",
        SNAPSHOT,
        "    return expected\n",
        "    return folder.metrics.stat().st_size\n",
        AT_ANY_MOMENTS,
    ),
    Mutant(
        "G1",
        "old checkpoints are removed before the new one has its name",
        (
            Edit(
                CHECKPOINT,
                "    with publish.staged_folder(final) as staging:\n",
                "    _rotate(folder, checkpoint, keep - 1)\n    with publish.staged_folder(final) as staging:\n",
            ),
            Edit(CHECKPOINT, "_folders(folder)[max(2, keep) :]", "_folders(folder)[keep:]"),
        ),
        (AIMED + "test_a_rotation_killed_at_any_operation_keeps_two_checkpoints",),
    ),
    mutant(
        "G1",
        "what is left of a run that was being removed is taken for somebody else's files",
        "qpref/training/folder.py",
        "is_ours = overwrite or any(map(_is_staged_run_json, path.iterdir()))",
        "is_ours = overwrite",
        AIMED + "test_a_run_that_is_killed_while_it_starts_over_can_start_over",
    ),
    mutant(
        "G1",
        "a merged model is written under its final name",
        "qpref/publish.py",
        "        staging, lock, descriptor = _claimed_name(final)\n",
        "        staging, lock, descriptor = _claimed_name(final)\n        staging = final\n",
        AIMED + "test_a_merge_killed_at_any_operation_leaves_a_whole_model_or_none",
    ),
    Mutant(
        "G3",
        "a checkpoint is renamed before its files are on the disk",
        (
            Edit("qpref/publish.py", "            fsync_tree(staging)\n", ""),
            Edit("qpref/fsio.py", "            fsync_file(temporary)\n", ""),
        ),
        ("tests/training/test_power_loss.py::test_a_power_loss_leaves_every_save_that_has_returned",),
    ),
    mutant(
        "G5",
        "a checkpoint's files are believed to be those of its manifest",
        CHECKPOINT,
        'if (changed := publish.changed_file(path, manifest["files"])) is not None:',
        'if (changed := None if manifest["files"] else MANIFEST) is not None:',
        "tests/training/test_silent_damage.py::test_no_damage_is_silent",
    ),
    mutant(
        "G6",
        "a run that a signal stops isn't saved",
        "qpref/training/loop.py",
        "if stopping or is_best or self._is_due(self.train.save_every):",
        "if is_best or self._is_due(self.train.save_every):",
        KILLS + "test_a_run_stopped_by_signals_at_any_moments_ends_as_if_it_never_stopped",
    ),
    mutant(
        "G6",
        "a second interrupt waits for the step as the first one does",
        "qpref/training/stop.py",
        "if requested and number == signal.SIGINT:",
        "if requested and number == signal.SIGQUIT:",
        KILLS + "test_a_second_interrupt_ends_a_run_before_its_step_and_its_save",
    ),
    mutant(
        "G13",
        "a lock that another process holds is taken all the same",
        "qpref/locks.py",
        "    except BlockingIOError:\n        return False\n    except OSError as error:\n        if",
        "    except BlockingIOError:\n        return True\n    except OSError as error:\n        if",
        KILLS + "test_of_twenty_simultaneous_starts_one_trains_and_its_death_frees_the_folder",
    ),
    mutant(
        "G19",
        "the order of the examples differs from process to process",
        "qpref/training/loop.py",
        "step_order(len(self.examples), train.batch_size, train.seed, index)",
        "step_order(len(self.examples), train.batch_size, __import__('os').getpid(), index)",
        KILLS + "test_every_process_trains_the_same_bits",
    ),
)

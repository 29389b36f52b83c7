"""Bring the mistakes back one by one and report which test catches each: about 10 CPU minutes.

python -m tests.mutants            # all
python -m tests.mutants C13 C24    # some
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .catalogue import MUTANTS
from .mutant import Mutant
from .run import Outcome, preload, run_all

SHOWN_LINES = 30


def main() -> int:
    """Return the exit code: 0 where every mutant has been caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("bugs", nargs="*", help="numbers of mistakes; all by default")
    parser.add_argument("--parallel", type=int, default=2, help="mutants at a time")
    chosen = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if not chosen.bugs or mutant.bug in chosen.bugs]
    if not mutants:
        parser.error("no such mistake")
    if problems := [problem for mutant in mutants for problem in mutant.problems()]:
        print(*problems, sep="\n")
        return 2
    preload()
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    sound, *outcomes = run_all([((), tests), *(((mutant,), mutant.tests) for mutant in mutants)], chosen.parallel)
    return report(mutants, sound, outcomes)


def report(mutants: Sequence[Mutant], sound: Outcome, outcomes: Sequence[Outcome]) -> int:
    """Print a line for each mutant and the share that was caught.

    Args:
        sound: outcome of all tests without an edit.
    """
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        result = "killed" if outcome.is_killed else "SURVIVED" if outcome.has_passed else "ERROR"
        print(f"{mutant.bug:4} {result:8} {outcome.seconds:6.1f} s  {mutant.mistake}")
        if not outcome.is_killed:
            print(_tail(outcome))
    killed = sum(outcome.is_killed for outcome in outcomes)
    print(f"{killed} of {len(mutants)} mutants killed ({killed / len(mutants):.0%})")
    if not sound.has_passed:
        print("the tests fail without any mutant:", _tail(sound), sep="\n")
    return 0 if killed == len(mutants) and sound.has_passed else 1


def _tail(outcome: Outcome) -> str:
    return "\n".join(f"     {line}" for line in outcome.output.splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    sys.exit(main())

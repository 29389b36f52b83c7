"""What test_launch starts in several processes: `python -m launched SCENE FOLDER`; it loads no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ["RANK"])


def ends_with(code: int) -> None:
    """Rank 1 ends with this code, the others wait for it."""
    if RANK == 1:
        sys.exit(code)
    time.sleep(60)


def is_killed(folder: Path, notices: bool) -> None:
    """Rank 1 is killed; the others end with 13 for that, having said so, or by the launcher's signal."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if notices:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1)
        message = {"message": "rank 1 died", "extraInfo": {"timestamp": "1"}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
        sys.exit(13)
    time.sleep(60)


def saves_when_stopped(folder: Path) -> None:
    """Each rank saves for two seconds when a signal asks it to stop, and counts its signals."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    (folder / f"ready-{RANK}").touch()
    while not received:
        time.sleep(0.05)
    time.sleep(2)
    (folder / f"saved-{RANK}").write_text(" ".join(map(str, received)))
    sys.exit(128 + received[0])


def main(scene: str, folder: Path) -> None:
    if scene.isdecimal():
        ends_with(int(scene))
    elif scene == "stop":
        saves_when_stopped(folder)
    elif scene == "threads":
        (folder / f"threads-{RANK}").write_text(os.environ["OMP_NUM_THREADS"])
    else:
        is_killed(folder, notices=scene == "noticed")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

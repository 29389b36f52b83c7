"""Rewrite docs/models.md: train a tiny random model of each architecture and compare it with plain transformers.

Run `python docs/make_models.py` after a change of what is trained or refused; it takes some minutes. Names of
architectures after it print their rows alone.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main(names: list[str]) -> None:
    import torch
    from matrix.cases import architectures, tiny_model
    from matrix.examine import examine
    from matrix.page import line, page

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in names or architectures():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["QPREF_CACHE"] = f"{folder}/cache"
            rows.append(examine(name, tiny_model(name), Path(folder)))
        print(line(rows[-1]), flush=True)
        gc.collect()
    if not names:
        (ROOT / "docs/models.md").write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Train recipes one after the other in one process, which knows no hub but its environment's.

`python train_shipped.py OUTPUT RECIPE...` prints one JSON object: the recipe's name -> the error's text, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import qpref
from qpref.errors import QprefError

OVERRIDES = ("model.device=cpu", "train.max_steps=2")
OF_TINY_DATA = "data.heldout_share=0.1"
"""In place of a share of the public data that would be less than a row here."""


def main(output: Path, recipes: list[Path]) -> None:
    errors: dict[str, str | None] = {}
    for recipe in recipes:
        overrides = (*OVERRIDES, OF_TINY_DATA) if "heldout_share" in recipe.read_text() else OVERRIDES
        try:
            qpref.train(recipe, overrides=overrides, output=output / recipe.stem)
            errors[recipe.stem] = None
        except QprefError as error:
            errors[recipe.stem] = str(error)
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

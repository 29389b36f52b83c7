"""A page to which every file of a run, and every file of `--merged`, `--eval` and `--samples`, brings one text."""

from __future__ import annotations

import json
from pathlib import Path

from run_folders import make_run

from qpref.report.write import Extras, write_report


def hostile_page(folder: Path, text: str, name: str = "run") -> Path:
    """Write the page of a run whose every text is this one, and so is every text of the files beside it."""
    in_toml = text.encode(errors="replace").decode()  # which can't hold half a character
    row = {"step": 1, "split": "train", text: 1.0, "loss": 0.5, "tokens": 1, "seconds": 1}
    facts = dict.fromkeys(("base", "base_path", "created", "device", "dtype", "attention"), text)
    run = make_run(
        folder / name,
        [row, row | {"step": 2}, {"step": 2, "split": "eval", f"eval_{text}": 1.0, "eval_loss": 1.0}],
        recipe=f"[loss]\nname = {json.dumps(in_toml)}\n",
        facts=facts | {"plugins": [{"name": text}], "versions": {text: text}, "fingerprints": {text: [text]}},
        result={"adapter_step": text, "peak_bytes": {text: text}, "verdict": {"sentence": text, "outcome": text}},
        data={
            "read": 1,
            "findings": [dict.fromkeys(("code", "severity", "path", "line", "message"), text)],
            "lengths": {text: [{"from": 1, "to": 2, "count": 3}]},
            "counts": [{text: text}],
            text: [text, {text: text}],
        },
    )
    estimate = {"value": 1, "low": 0, "high": 1}
    files = {
        "merged": {"dtype": text, "verdict": {"origin": text, "flips": [{text: text}]}, "tried": {text: {"kl": text}}},
        "evaluations": {"models": [{"model": text, "metrics": {text: estimate}, "by": {text: {text: {}}}}],
                        "warnings": [text], text: text},
        "samples": [{"prompt": text, "model": text, text: text, "ended": [text], "n": [[text]],
                     "turns": [{"role": text, "content": text}] * 2}],
    }  # fmt: skip
    for kind, value in files.items():
        (folder / f"{kind}.json").write_text(json.dumps(value))
    extras = Extras(**{kind: [folder / f"{kind}.json"] for kind in files})
    return write_report([run], folder / "page.html", extras)

"""Write docs/from-other-tools.md from the table of aliases: `python docs/make_from_other_tools.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qpref.aliases.alias import TOOLS, Alias
from qpref.aliases.lookup import GROUPS
from qpref.aliases.loss_names import LOSS_NAMES, TrlLoss
from qpref.convert.losses import AXOLOTL, LLAMA_FACTORY
from qpref.hooks.manager import PluginHost
from qpref.recipe.trl_losses import find_loss

PAGE = Path(__file__).with_name("from-other-tools.md")
HEAD = """# From TRL, Axolotl and LLaMA-Factory

Made by `python docs/make_from_other_tools.py`; do not edit.

    qpref convert axolotl.yml --output my.toml       writes a recipe, and says what isn't quite the same
    qpref train my.toml --dry-run

`convert` reads the YAML files of [TRL](https://github.com/huggingface/trl) (through TRL's own config classes),
[Axolotl](https://github.com/axolotl-ai-cloud/axolotl) and
[LLaMA-Factory](https://github.com/hiyouga/LLaMA-Factory), with each tool's defaults. Every value of the recipe has
the key that it came from behind it. Whatever isn't quite the same, or has no equal, is said with the reason, on
standard error and at the head of the recipe. `--from` names the tool where its keys don't, `--trainer` TRL's
trainer, `--gpus` the number of GPUs that the file was run on. A file is read as plain values: nothing in it is run,
no file that it names is opened but LLaMA-Factory's `dataset_info.json`, and no environment is set.

A key of another tool in a recipe is explained by the same table: `[train] gradient_accumulation_steps` is refused
with a word on `batch_size`.

## What to know

- **Batch size.** `batch_size` is per-device batch x gradient accumulation x GPUs. The micro-batch is chosen by
  memory, and doesn't change the result.
- **Labels of losses.** TRL's `sigmoid` is `dpo`. TRL ignores `label_smoothing` under `sigmoid`; here it is
  conservative DPO.
- **SimPO.** TRL's CPOTrainer has beta 0.1 and an NLL term (`cpo_alpha` 1.0) by default; the paper has beta 2 to 10
  and none. `convert` keeps the file's, and says so.
- **ORPO.** TRL takes the NLL over prompt and response (`nll = "all"`, the default), LLaMA-Factory over the
  response.
- **KTO.** TRL weighs both classes 1. Left out here, they are balanced by their counts; `convert` writes TRL's.
- **rpo_alpha, pref_ftx** are a mixture: a second `[[loss]]` table, the SFT loss, with that weight.
- **Adapters.** Without target modules, PEFT adapts a few projections by family; here all linear layers are adapted.
- **Chat templates.** Always the tokenizer's own. `qpref check` prints the first row as the model sees it.
- **Warmup** is a share of all steps, an evaluation or a checkpoint a number of steps or `"epoch"`.
- **Long rows** stop the run unless `on_overflow` says otherwise. TRL and LLaMA-Factory cut them, Axolotl drops
  them.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD, f"## Names of losses\n\n{_losses()}"]
    parts += [f"## {title}\n\n{_rows(group)}" for title, group in GROUPS.items()]
    return "\n".join(parts)


def _losses() -> str:
    host = PluginHost()
    lines = ["| tool | there | here |", "|---|---|---|"]
    named: list[tuple[str, str, TrlLoss]] = [
        *(("Axolotl", f"`rl: {name}`", loss) for name, loss in AXOLOTL.items()),
        *(("LLaMA-Factory", f"`pref_loss: {name}`", loss) for name, loss in LLAMA_FACTORY.items()),
        *(("names in papers and older versions", f"`{name}`", loss) for name, loss in LOSS_NAMES.items()),
    ]
    lines.append("| TRL | `loss_type` | the loss of that name; `sigmoid` is `dpo` |")
    for tool, there, loss in named:
        found = find_loss(host, loss)
        assert found is not None, loss
        lines.append(f"| {tool} | {there} | `{found.offer.name}` |")
    return "\n".join(lines) + "\n"


def _rows(group: Iterable[Alias]) -> str:
    lines = [f"| {' | '.join(TOOLS.values())} | here | |", "|---|---|---|---|---|"]
    for alias in group:
        theirs = [", ".join(f"`{key}`" for key in alias.keys(tool)) for tool in TOOLS]
        if any(theirs):
            lines.append(f"| {' | '.join(theirs)} | {_here(alias)} | {alias.why.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _here(alias: Alias) -> str:
    if alias.ours is None:
        return "by itself" if not alias.is_lost else "no equal"
    table, _, key = alias.ours.partition(".")
    return f"`[{table}]{f' {key}' if key else ''}`"


if __name__ == "__main__":
    PAGE.write_text(page())

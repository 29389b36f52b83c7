"""Ollama's Modelfile for an exported model: chat template in Ollama's language, stop tokens and sampling."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpref.merging.chat_pieces import ChatPieces, chat_pieces
from qpref.policy.foreign_files import read_object
from qpref.policy.source import BaseFolder
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.sections import ModelSection

PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""Key of generation_config.json -> Ollama's parameter."""
NO_TEMPLATE = """\
# TEMPLATE is left out: this chat template isn't made of fixed texts around each turn, which is what can be put into
# Ollama's language. Ollama then takes the template that it knows for the one inside the GGUF file; compare
# `ollama show --template` with chat_template.jinja."""


def modelfile(merged: Path, gguf: str) -> str:
    """Write the Modelfile of a merged model.

    Args:
        gguf: name of the GGUF file, in the folder of the Modelfile.

    Raises:
        PolicyError: the tokenizer or the generation settings can't be read.
    """
    base = BaseFolder(path=merged, weights={})
    tokenizer = load_tokenizer(ModelSection(base=str(merged)), base)
    stops = [tokenizer.convert_ids_to_tokens(token) for token in dict.fromkeys(stop_tokens(base))]
    lines = [f"FROM ./{gguf}", "", *_template(chat_pieces(tokenizer)), ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop]
    lines += _sampling(merged / "generation_config.json")
    return "\n".join(lines) + "\n"


def _template(pieces: ChatPieces | None) -> list[str]:
    if pieces is None or any("{{" in text or '"""' in text for text in pieces.texts):
        return [NO_TEMPLATE]
    return [f'TEMPLATE """{ollama_template(pieces)}"""']


def ollama_template(pieces: ChatPieces) -> str:
    """Write a chat template in Ollama's language, Go's text/template; no white space is trimmed in it."""
    (system, system_end), (user, user_end), (answer, answer_end) = pieces.system, pieces.user, pieces.assistant
    start = (
        f"{{{{ if .System }}}}{system}{{{{ .System }}}}{system_end}{{{{ else }}}}{pieces.default_system}{{{{ end }}}}"
    )
    is_last = "eq (len (slice $.Messages $i)) 1"
    turns = (
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}{user_end}'
        f"{{{{ if {is_last} }}}}{pieces.generation}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}'
        f"{{{{ if {is_last} }}}}{{{{ else }}}}{answer_end}{{{{ end }}}}{{{{ end }}}}"
    )
    return f"{start}{{{{ range $i, $_ := .Messages }}}}{turns}{{{{ end }}}}"


def _sampling(path: Path) -> Iterator[str]:
    settings: Mapping[str, Any] = read_object(path) if path.is_file() else {}
    for name, theirs in PARAMETERS.items():
        value = settings.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"PARAMETER {theirs} {value}"

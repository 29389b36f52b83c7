# ruff: noqa: RUF001
"""Control tokens of the known families' chat templates, where they mark turns and aren't merely mentioned.

A token marks a turn where the text or a line starts with it, or the text ends with it. In code, in quotes and before
its definition (`<|im_end|>: ends a turn`) it is a subject of the text; inside a line it may be.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

END_OF_TEXT = "an end-of-sequence token"
FAMILIES: dict[str, tuple[str, ...]] = {
    "ChatML": ("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    "Llama 2 or Mistral": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                           "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                           "[/TOOL_RESULTS]"),
    "Llama 3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
                "<|python_tag|>"),
    "Llama 4": ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Gemma 4": ("<|turn>", "<turn|>"),
    "Phi-3, Zephyr or GLM-4": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>", "[gMASK]"),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"),
    "DeepSeek": ("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>",
                 "<｜end▁of▁sentence｜>", "<|User|>", "<|Assistant|>", "<|Bot|>"),
    "Command R": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
                  "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<BOS_TOKEN>"),
    "Granite": ("<|start_of_role|>", "<|end_of_role|>"),
    "Kimi": ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    "EXAONE": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "Hunyuan": ("<|hy_User|>", "<|hy_Assistant|>", "<｜hy_User｜>", "<｜hy_Assistant｜>"),
    "OpenAssistant": ("<|prompter|>",),
    "OpenChat": ("<|end_of_turn|>",),
    "OpenChatKit": ("<human>:", "<bot>:"),
    "StableLM": ("<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"),
    "InternLM": ("<eoh>", "<eoa>"),
    "Apertus": ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    "MiniMax": ("]~b]", "[e~["),
    END_OF_TEXT: ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|startoftext|>", "<eos>", "<bos>"),
}  # fmt: skip
FAMILY_OF = {token: family for family, tokens in FAMILIES.items() for token in tokens}

_TOKEN = re.compile("|".join(map(re.escape, sorted(FAMILY_OF, key=len, reverse=True))))
_CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]*`", re.DOTALL)
_STARTS = re.compile(r"[ ]{0,3}(?:<s>|<bos>)?[ ]*")
_DEFINES = ":=,.;)'\"-\u2013\u2014\u2192\u201d"
_QUOTES = "'\"\u201c\u2018\u00ab("
_SENTENCE_ENDS = "\n.!?\u3002\uff01\uff1f\u0964\u061f;:)\"'*\u201d\u300d"


class Found(NamedTuple):
    """A control token and its place: start or end of the text, start of a line or between turns, or inside a line."""

    token: str
    place: Literal["start", "end", "line", "inside"]


def find_token(text: str) -> Found | None:
    """Return the first control token at the start or end of a text, else of a line, else inside; None without any.

    Code, quotes and definitions don't count.
    """
    if not mentions_token(text):
        return None
    text = _CODE.sub(" code ", text).strip() if "`" in text or "~~~" in text else text.strip()
    first = last_end = _STARTS.match(text).end()  # type: ignore[union-attr]  # matches the empty text
    line = inside = opening = None
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        if end <= first:
            opening = Found(match[0], "start")  # many families begin with it, so what follows says which
            continue
        if end == len(text) and start and _ends_turn(text, start, match[0]):
            return line or Found(match[0], "end")
        follows = last_end == start
        if follows or _at_line_start(text, start):
            last_end = end
            if not _is_defined(text, end) and len(match[0]) < len(text):
                line = line or Found(match[0], "line" if text[first:start].strip() else "start")
                if line.place == "start":
                    return line
        elif text[start - 1] not in _QUOTES and not _is_defined(text, end) and end < len(text):
            if text[start - 1].isspace() or text[end].isspace():
                inside = inside or Found(match[0], "inside")
            else:
                line = line or Found(match[0], "line")  # between two turns, where a sentence would have spaces
    return line or opening or inside


def mentions_token(text: str) -> bool:
    """Return whether a text has a control token anywhere."""
    return ("<" in text or "[" in text or "]" in text) and _TOKEN.search(text) is not None


def _at_line_start(text: str, start: int) -> bool:
    line = text.rfind("\n", max(0, start - 4), start)
    return (line >= 0 or start < 4) and not text[line + 1 : start].strip(" ")


def _is_defined(text: str, end: int) -> bool:
    """Return whether the text goes on with the definition of a token, or with the rest of a sentence about it."""
    rest = text[end : end + 24].lstrip(" ")
    return rest[:1] in _DEFINES if rest else False


def _ends_turn(text: str, start: int, token: str) -> bool:
    """Return whether the token at the end of a text ends a turn: directly behind a text, or after a sentence."""
    if token == FAMILIES[END_OF_TEXT][0] and text.find("<s>", 1) > 0:
        return False  # struck through, in HTML
    before = text[:start].rstrip(" ") if text[start - 1] == " " else text[:start]
    return len(before) == start or before[-1] in _SENTENCE_ENDS

# ruff: noqa: RUF001
"""Turns written as text: `### Instruction:`, `Human: ... Assistant:`, and responses that go on into the next turn.

Labels are words of honest texts too. A prompt counts only where it starts with the user's label and has the
assistant's on a later line; a response only where, behind its own text, it goes on with a turn of the user. Scripts and
dialogues have their labels from the start, other speakers, or a prompt that asks for them.
"""

from __future__ import annotations

import re
from collections import Counter

ALPACA = "Alpaca (### Instruction:)"
QUESTION = "### Question:"
VICUNA = "Vicuna (USER: ... ASSISTANT:)"

_ROLES = (
    ("Human: ... Assistant:", "(?:[Hh]uman|HUMAN)", "(?:[Aa]ssistant|ASSISTANT|AI|Bot)"),
    ("User: ... Assistant:", "(?:[Uu]ser|USER)", "(?:[Aa]ssistant|ASSISTANT|AI|Bot|Model)"),
    ("Question: ... Answer:", "Question", "Answer"),
    ("Q: ... A:", "Q", "A"),
    ("Instruction: ... Response:", "Instruction", "(?:Response|Output)"),
    ("用户: ... 助手:", "(?:用户|用戶)", "(?:助手|助理)"),
    ("ユーザー: ... アシスタント:", "ユーザー", "アシスタント"),
    ("사용자: ... 어시스턴트:", "사용자", "어시스턴트"),
    ("Пользователь: ... Ассистент:", "Пользователь", "Ассистент"),
    ("Usuario: ... Asistente:", "Usu[aá]rio", "Ass?istente"),
    ("Utilisateur: ... Assistant:", "Utilisateur", "Assistant"),
    ("Benutzer: ... Assistent:", "(?:Benutzer|Nutzer)", "Assistent"),
)  # fmt: skip
_WHOLE = tuple(
    (name, re.compile(rf"\s*(?:\*\*)?{user}[ ]?[:：].*\n[ ]{{0,3}}(?:\*\*)?{assistant}[ ]?[:：]", re.DOTALL))
    for name, user, assistant in _ROLES
)
_VICUNA = re.compile(r"\A(?:USER:|A chat between)|ASSISTANT:\Z")
_OPEN_END = re.compile(r"\n[ ]{0,3}#{0,3}[ ]?(?:Answer|A|Response|Output|Assistant|AI|GPT)[ ]?:\Z", re.IGNORECASE)
_HEADING = re.compile(r"^[ ]{0,3}#{2,3}[ ]?([^\n#][^\n]*)", re.MULTILINE)
_USER_HEADINGS = frozenset({"human", "user", "question"})
_ASSISTANT_HEADINGS = frozenset({"assistant", "answer", "gpt", "ai"})
_TEMPLATE_HEADINGS = _USER_HEADINGS | _ASSISTANT_HEADINGS | {"instruction", "input", "context", "response", "system"}
_ANY_TEMPLATE_HEADING = re.compile(rf"##[^\S\n]*(?:{'|'.join(sorted(_TEMPLATE_HEADINGS))})[^\S\n]*:", re.IGNORECASE)
_LABEL = re.compile(r"^[ ]{0,3}(?:\*\*)?([^\W\d_][\w .'-]{0,24}?)[ ]?[:：](?:\*\*)?", re.MULTILINE)
_NEXT_TURN = re.compile(
    r"\n[ ]{0,3}([Hh]uman|HUMAN|[Uu]ser|USER|Question|Q|Instruction|用户|用戶|人类|ユーザー|사용자|"
    r"Пользователь|Человек|Usuario|Usuário|Utilisateur|Benutzer|Nutzer)[ ]?[:：]"
)
_SYSTEM_FIRST = re.compile(r"\s*(?:System|SYSTEM)[ ]?:")
_QUESTIONS = frozenset({"Question", "Q", "Instruction"})
_USERS = frozenset({"human", "user", "question", "q", "instruction", "用户", "用戶", "人类", "ユーザー", "사용자",
                    "пользователь", "человек", "usuario", "usuário", "utilisateur", "benutzer", "nutzer"})  # fmt: skip
_REPLIES = frozenset({"assistant", "ai", "bot", "model", "answer", "a", "response", "output", "asistente", "assistente",
                      "assistent", "ki", "助手", "助理", "アシスタント", "어시스턴트", "ассистент"})  # fmt: skip
_ASSISTANT_FIRST = re.compile(r"\s*(?:ASSISTANT|Assistant)[ ]?:")
_DIALOGUE = re.compile(
    r"dialog|convers|script|scene|screenplay|interview|transcript|\bchat|role.?play|\bplay\b|skit|\bq ?(?:&|and) ?a\b|"
    r"\bprompt|few.?shot|\bfaq|quiz|flash ?card|exchange|between an? |assistant\b.*:|diálogo|entrevista|guión|gespräch|"
    r"диалог|разговор|对话|對話|会話|対話|剧本|聊天|대화|संवाद|حوار",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?```|~~~.*?~~~", re.DOTALL)


def prompt_labels(prompt: str) -> str | None:
    """Return the name of the labels that a prompt is formatted with; None where it isn't."""
    if ":" not in prompt and "：" not in prompt:
        return None
    if "#" in prompt:
        name = _open_heading(prompt) or _template_headings(prompt)
        if name is not None and name != QUESTION:
            return name
    if -1 < prompt.find("USER: ") < prompt.rfind("ASSISTANT:") and _VICUNA.search(prompt.strip()):
        return VICUNA
    if _SYSTEM_FIRST.match(prompt) and (first := _NEXT_TURN.search(prompt)):
        prompt = prompt[first.start() :]
    start = prompt.lstrip()[:24]
    if ":" not in start and "：" not in start:
        return None
    for name, whole in _WHOLE:
        # Questions and instructions are a person's words too, unless a cue for the answer ends the prompt.
        if whole.match(prompt) and (name[0] not in "QI" or _OPEN_END.search(prompt.rstrip()[-32:])):
            return name
    return None


def response_labels(response: str, prompt: str) -> str | None:
    """Return the name of the labels in front of a response, or around turns that it goes on with; None without any."""
    if "#" in response:
        name = _template_headings(response)
        if name is not None and name != QUESTION:
            return name
    if _ASSISTANT_FIRST.match(response) and not _speakers(response) and not _DIALOGUE.search(prompt):
        return "Assistant: in front"
    return None


def next_turn(response: str, prompt: str) -> str | None:
    """Return the label of the user's turn that a response goes on with, behind its own text; None without one."""
    text = response.strip()
    if (":" not in text and "：" not in text) or (found := _NEXT_TURN.search(text)) is None:
        return None
    if "```" in text or "~~~" in text:
        text = _CODE.sub("", text)
        if (found := _NEXT_TURN.search(text)) is None:
            return None
    before, label = text[: found.start()].rstrip(" "), found[1]
    first, labels = _LABEL.match(before), {one[1].casefold() for one in _LABEL.finditer(text, found.start())}
    if (first and first[1].casefold() not in _REPLIES) or labels - _USERS - _REPLIES:
        return None
    if before.rstrip().endswith((":", "：")):
        return None  # an announced example
    answered = not labels.isdisjoint(_REPLIES if label[0].isupper() or label > "z" else {"assistant"})
    if label in _QUESTIONS:
        likely = answered and prompt_labels(prompt) is not None
    else:
        # A person's last words may have no answer: "Human:" after an empty line is a turn even so.
        likely = answered or (label == "Human" and before.endswith("\n"))
        likely = likely and not _speakers(before) and not _DIALOGUE.search(prompt)
    return f"{label}:" if likely else None


def _template_headings(text: str) -> str | None:
    """Return the family where all of a text's headings are a template's labels with a colon."""
    bare: dict[str, bool] = {}
    if _ANY_TEMPLATE_HEADING.search(text) is None:
        return None
    for match in _HEADING.finditer(_CODE.sub("", text)):
        label, colon, rest = match[1].partition(":")
        name = label.strip().casefold()
        if not colon or name not in _TEMPLATE_HEADINGS:
            return None
        bare[name] = bare.get(name, False) or not rest.strip()
    if bare.get("instruction") or bare.get("response"):
        return ALPACA
    user = next((name for name in bare if name in _USER_HEADINGS), None)
    return f"### {user.title()}:" if user and not _ASSISTANT_HEADINGS.isdisjoint(bare) else None


def _open_heading(prompt: str) -> str | None:
    """Return the family where an empty heading for the response ends a prompt, whatever its other headings are."""
    found = _OPEN_END.search(prompt.rstrip()[-32:])
    if found is None or "##" not in found[0]:
        return None
    return ALPACA if "esponse" in found[0] else f"{found[0].strip()} at the end"


def _speakers(text: str) -> bool:
    """Return whether a text has speakers other than user and assistant: labels that come again."""
    names = Counter(match[1].casefold() for match in _LABEL.finditer(text))
    return any(count > 1 for name, count in names.items() if name not in _REPLIES | _USERS)

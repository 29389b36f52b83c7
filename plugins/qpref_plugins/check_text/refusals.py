# ruff: noqa: RUF001
"""Refusals: a response that declines and leaves it at that, or speaks as a language model."""

from __future__ import annotations

import re

from qpref.hooks import reading_length

_APOLOGY = (
    r"(?:(?:i['\u2019]?m |i am |we['\u2019]?re )?(?:so |very |really |deeply )?sorry[,.!]?(?: but)? |"
    r"i apologi[sz]e[,.]?(?: but)? |unfortunately[,.]? )?"
)
_UNABLE = (
    r"i (?:really |simply |just )?(?:can['\u2019]?t|cannot|can not|won['\u2019]?t|will not|must decline to|"
    r"have to decline to|am unable to|am not able to|am not comfortable|refuse to)|"
    r"i['\u2019]m (?:unable to|not able to|not comfortable)"
)
_HELP = (
    r"(?:assist|help(?! but\b| it\b| \w+ing\b)|provid|fulfil|comply|creat|generat|produc|discuss|engag|participat|"
    r"answer (?:that|this|your|the)|writ(?:e|ing) (?:that|this|an?|the|about|content)|do (?:that|this|so)\b|"
    r"(?:give|offer|share) (?:you|out|any|advice|instruction|information|detail|personal)|support (?:that|this))"
)
_REFUSAL = re.compile(rf"{_APOLOGY}(?:{_UNABLE}) (?:\w+ ){{0,3}}?{_HELP}", re.IGNORECASE)
_FIRST_LETTERS = frozenset("IiSsWwUu")
_FIRST_LETTERS_ELSEWHERE = frozenset("LDETM")
_ELSEWHERE = re.compile(
    r"(?:很|非常)?(?:抱歉|对不起|對不起)[，,]?(?:但)?我(?:无法|無法|不能).{0,12}"
    r"(?:提供|回答|协助|協助|帮|幫|满足|完成|生成|讨论|参与)|"
    r"申し訳(?:あり|ござい)ませんが.{0,40}(?:できません|できかね|いたしかね)|죄송(?:하지만|합니다만).{0,40}수 없|"
    r"lo siento,? (?:pero )?no puedo .{0,24}(?:ayud|proporcion|cumpl|respond|crear|generar|ofrec)|"
    r"desculpe,? (?:mas )?(?:eu )?não posso .{0,24}(?:ajud|fornec|respond|criar|gerar|oferec)|"
    r"(?:je suis )?désolé,? (?:mais )?je ne peux pas .{0,24}(?:aider|fournir|répondre|créer|générer)|"
    r"(?:es )?tut mir leid, (?:aber )?(?:ich kann|da kann ich) .{0,48}(?:helfen|bereitst|beantwort|erstellen|geben)|"
    r"mi dispiace,? (?:ma )?non posso .{0,24}(?:aiut|fornir|rispond|crear)|"
    r"(?:извините|простите|к сожалению),? (?:но )?я не могу .{0,24}(?:помочь|предостав|ответить|выполнить|созда)",
    re.IGNORECASE,
)
_DISCLAIMER = re.compile(
    r"\bas an ai(?:,| language model| assistant| model| chatbot| i\b)|\bas a (?:large )?language model|"
    r"\bi(?:['\u2019]m| am) (?:just |only )?an ai(?: language model)?\b(?! \w*(?:engineer|researcher|expert|student))|"
    r"作为(?:一个|一名)?(?:人工智能|语言模型|AI)|言語モデルとして|como (?:un )?modelo de lenguaje|"
    r"en tant que modèle de langage|als (?:ki-)?sprachmodell|как языковая модель",
    re.IGNORECASE,
)
_OF_MODELS = ("AI", "model", "Model", "模型", "人工智能", "モデル", "modèle", "модель")
_ABOUT_ITSELF = re.compile(
    r"(?i:\bare you\b|\bdo you (?:have|feel|think|know who)|\byour(?:self| name| feelings| opinion)|"
    r"who (?:made|created|built) you|\ban ai\b|language model|chatbot)|\bAIs?\b|你是|あなたは"
)
_ANSWERS = re.compile(
    r"\bbut (?!i (?:can|could|would)\b|i['\u2019](?:m|d|ll)\b|feel|please|if you|let me|thank)|\bhowever\b|"
    r"\bthat said\b|\bnevertheless\b|\binstead[,:]|\bhere(?:['\u2019]s| is| are)\b|\bin general\b|\bgenerally\b|"
    r"\btypically\b|:\s*\n|\n\s*(?:[-*\u2022]|\d+[.)])\s|```|"
    r"但是|不过|ただし|하지만|\bpero\b(?! no puedo)|\bmais\b(?! je ne)|\baber\b(?! ich kann)|\bsin embargo\b|однако",
    re.IGNORECASE,
)
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 60, 2000


def declines(answer: str, prompt: str) -> bool:
    """Return whether the response refuses and gives no answer behind it, or calls itself a language model unasked."""
    start = answer[:300].lstrip()
    if not start:
        return False
    # Most responses have none of these words, and `in` is faster than the pattern.
    if any(word in start for word in _OF_MODELS) and _DISCLAIMER.search(start) and not _ABOUT_ITSELF.search(prompt):
        return True
    if start[0] in _FIRST_LETTERS and (refusal := _REFUSAL.match(start)):
        return not _answer_follows(answer.lstrip()[refusal.end() :])
    if start.isascii() and start[0] not in _FIRST_LETTERS_ELSEWHERE:
        return False
    elsewhere = _ELSEWHERE.match(start)
    return elsewhere is not None and not _answer_follows(answer.lstrip()[elsewhere.end() :])


def _answer_follows(rest: str) -> bool:
    """Return whether a refusal goes on with an answer of some length, rather than with an offer of other help."""
    rest = rest[:_MOST_CHARACTERS]
    found = _ANSWERS.search(rest)
    return found is not None and reading_length(rest[found.end() :]) >= _FEWEST_CHARACTERS

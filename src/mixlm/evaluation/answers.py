"""Answers taken from what a model wrote, in a form that can be compared for equality.

The tasks ask for a last line "Answer: ...". Models often say it in other words, so each function has a second place to
look; what is not found is an empty string, which equals no target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

_SAID = re.compile(r"(?i)\banswer\b(?:\s+is)?[\s*:=]*")
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?")
_SAID_LETTER = re.compile(r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)[\s*:=(]*([A-Z])(?![\w'])")
_FIRST_LETTER = re.compile(r"\A[\s*(]*([A-Z])(?:[*).:,]|\s*\Z|\s*\n)")
_LAST_LETTER = re.compile(r"\(([A-Z])\)")
_OPTION = re.compile(r"\(?([a-z])\)(?:\W.*)?", re.DOTALL)


def stated_answer(text: str) -> str:
    """Return the line after the last "Answer:", or the last line that is not empty."""
    places = list(_SAID.finditer(text))
    rest = text[places[-1].end() :] if places else ""
    if rest.strip():
        return rest.strip().splitlines()[0].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def number_answer(text: str) -> str:
    """Return the number that is given as the answer, else the last one of the text: "1,234.50" becomes "1234.5"."""
    line = stated_answer(text) if _SAID.search(text) else ""
    # Of a calculation, "3 + 4 = 7", the result is the answer.
    numbers = _NUMBER.findall(line.rpartition("=")[2])
    if numbers:
        return _plain(numbers[0])
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else ""


def letter_answer(text: str) -> str:
    """Return the letter that is given as the answer, or that the text begins with, or the last one in brackets."""
    marks = _SAID_LETTER.findall(text) or _FIRST_LETTER.findall(text) or _LAST_LETTER.findall(text)
    return marks[-1] if marks else ""


def phrase_answer(text: str) -> str:
    """Return the answer in lower case, without marks around it; of an option, "(B) 12/24", its letter; no spaces.

    Brackets stay: they are the answer of some questions.
    """
    line = stated_answer(text).strip(" \t*_`\"'").removesuffix(".").strip(" \t*_`\"'").lower()
    if option := _OPTION.fullmatch(line):
        return option[1]
    return "".join(line.split())


def _plain(number: str) -> str:
    digits = number.replace("$", "").replace(",", "")
    try:
        value = Decimal(digits)
    except InvalidOperation:
        return ""
    whole = value == value.to_integral_value()
    return f"{value.to_integral_value():f}" if whole else f"{value.normalize():f}"


def _filter(extract: Callable[[str], str]) -> Callable[[Sequence[Sequence[str]], object], list[list[str]]]:
    """Return a function in the form that the harness's `custom` filter calls."""
    return lambda texts, documents: [[extract(text) for text in group] for group in texts]


numbers, letters, phrases = _filter(number_answer), _filter(letter_answer), _filter(phrase_answer)

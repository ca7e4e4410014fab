"""A shell script as commands made of words, quotes and variables still in them. Nothing is run.

Only as much of the grammar as scripts that start a training use: words, quotes, comments, continued lines, the
separators `; & | && ||`, brackets of arrays and subshells, redirections and here-documents.
"""

import re
from typing import NamedTuple

_OPERATORS = ("&&", "||", ";;", "<<<", "<<", ">>", ">&", "<&", "&>", ";", "&", "|", "<", ">", "(", ")", "\n")
_REDIRECTIONS = ("<<<", "<<", ">>", ">&", "<&", "&>", "<", ">")


class Token(NamedTuple):
    """A word, or an operator."""

    text: str
    """As it is written."""
    line: int
    """Line of the script, from 1 on."""
    operator: bool = False
    """Whether it is an operator; the word `"("` is none."""


def tokens(script: str) -> list[Token]:
    """The words and operators of a script, without comments, redirections and here-documents.

    Raises ValueError for a quote or a bracket that is not closed.
    """
    text = script.replace("\\\r\n", "\\\n").replace("\r\n", "\n")
    result: list[Token] = []
    place, waiting = 0, list[str]()
    line, counted = 1, 0
    while place < len(text):
        letter = text[place]
        line, counted = line + text.count("\n", counted, place), place
        if text.startswith("\\\n", place):
            place += 2
        elif letter in " \t\r":
            place += 1
        elif letter == "#":  # in the middle of a word it is part of the word, which `_word_end` takes whole
            place = _line_end(text, place)
        elif operator := next((symbol for symbol in _OPERATORS if text.startswith(symbol, place)), None):
            place += len(operator)
            if operator in _REDIRECTIONS:
                if result and result[-1].text.isdigit() and text[place - len(operator) - 1].isdigit():
                    result.pop()  # 2>file
                place, target = _target(text, place)
                if operator == "<<":
                    waiting.append(target)
                continue
            if operator == "\n":
                for ending in waiting:
                    place = _after_document(text, place, ending)
                waiting = []
            result.append(Token(operator, line, True))
        else:
            end = word_end(text, place)
            result.append(Token(text[place:end], line))
            place = end
    return result


def word_end(text: str, place: int) -> int:
    """Where the word that begins at a place ends. Raises ValueError for a quote or bracket that is not closed."""
    start = place
    while place < len(text) and text[place] not in " \t\r\n;&|<>()":
        if text[place] == "\\":
            place += 2
        elif text[place] in "'\"`":
            place = quote_end(text, place)
        elif text.startswith(("$(", "${"), place):
            place = bracket_end(text, place + 1)
        else:
            place += 1
        if place < len(text) and text[place] == "(" and re.fullmatch(r"\w+\+?=", text[start:place]):
            place = bracket_end(text, place)  # an array: NAME=( … )
    return min(place, len(text))


def quote_end(text: str, place: int) -> int:
    """The place after the quote that opens at a place. Raises ValueError if it never closes."""
    quote, start = text[place], place
    place += 1
    while place < len(text) and text[place] != quote:
        if quote != "'" and text[place] == "\\":
            place += 1
        elif quote == '"' and text.startswith(("$(", "${"), place):
            place = bracket_end(text, place + 1) - 1
        place += 1
    if place >= len(text):
        raise ValueError(f"line {text.count(chr(10), 0, start) + 1}: the quote {quote} is not closed")
    return place + 1


def bracket_end(text: str, place: int) -> int:
    """The place after the bracket, `(` or `{`, that opens at a place. Raises ValueError if it never closes."""
    opening, start = text[place], place
    closing = {"(": ")", "{": "}"}[opening]
    depth = 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] in "'\"`":
            place = quote_end(text, place) - 1
        elif text[place] == "#" and opening == "(" and text[place - 1] in " \t\n(":  # a comment in an array
            place = _line_end(text, place) - 1
        elif text[place] == opening:
            depth += 1
        elif text[place] == closing:
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    raise ValueError(f"line {text.count(chr(10), 0, start) + 1}: the bracket {opening} is not closed")


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _target(text: str, place: int) -> tuple[int, str]:
    """The place after what a redirection leads to, and the word itself, without its quotes."""
    while place < len(text) and text[place] in " \t-":
        place += 1
    end = word_end(text, place)
    return end, text[place:end].strip("'\"\\")


def _after_document(text: str, place: int, ending: str) -> int:
    """The place after a here-document that begins at a place."""
    while place < len(text):
        end = _line_end(text, place)
        if text[place:end].strip() == ending:
            return min(end + 1, len(text))
        place = end + 1
    return len(text)

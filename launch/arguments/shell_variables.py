"""Variables of a shell script, and the words that a word with variables in it becomes."""

import ast
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from launch.arguments.shell_words import bracket_end, quote_end

LONGEST = 100_000
"""Letters that a word may become: a few lines of a script can double a variable for ever."""
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_BRACED = re.compile(
    r"(?P<length>\#)?(?P<name>[A-Za-z_]\w*|[0-9]+|[@*#])(?:\[(?P<index>[^\]]*)\])?(?P<rest>.*)", re.DOTALL
)
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b),  # a shell cuts off, towards zero
    ast.FloorDiv: lambda a, b: int(a / b),
    ast.Mod: operator.mod,
}


@dataclass
class Variables:
    """Values by name. A variable that is no array has one element; one that is not set has none."""

    values: dict[str, list[str]] = field(default_factory=dict)
    """Name → elements."""
    arguments: list[str] = field(default_factory=list)
    """`$1`, `$2`, …"""
    unset: set[str] = field(default_factory=set)
    """Names that were asked for without being set and without a default."""

    def expand(self, word: str, split: bool = True) -> list[str]:
        """The words that a word becomes: quotes are taken off, variables filled in, and what they hold outside of
        quotes split at spaces. The output of other programs, `$(…)`, stays as it is written.

        Raises ValueError for a word that becomes too long, and for a quote or bracket that is not closed.
        """
        fields = _Fields()
        place = 0
        while place < len(word):
            letter = word[place]
            if letter == "\\":
                fields.add(word[place + 1 : place + 2].replace("\n", ""))
                place += 2
            elif letter == "'":
                end = quote_end(word, place)
                fields.add(word[place + 1 : end - 1])
                place = end
            elif letter == '"':
                end = quote_end(word, place)
                self._expand_quoted(word[place + 1 : end - 1], fields)
                place = end
            elif letter in "$`":
                value = self._at(word, place)
                place = value.end
                if not split:
                    fields.add(" ".join(value.texts))
                elif value.split:
                    fields.add_split(value.texts)
                else:
                    fields.add_all(value.texts)
            else:
                fields.add(letter)
                place += 1
        return fields.words()

    def _expand_quoted(self, text: str, fields: "_Fields") -> None:
        if not re.fullmatch(r"\$\{\w+\[@\]\}|\$@", text):  # "${EMPTY[@]}" is no word, "" is an empty one
            fields.add("")
        place = 0
        while place < len(text):
            if text[place] == "\\" and text[place + 1 : place + 2] in ("$", '"', "\\", "`", "\n"):
                fields.add(text[place + 1].replace("\n", ""))
                place += 2
            elif text[place] in "$`":
                value = self._at(text, place)
                place = value.end
                fields.add_all(value.texts if value.words else [" ".join(value.texts)])
            else:
                fields.add(text[place])
                place += 1

    def _at(self, text: str, place: int) -> "_Value":
        """What stands at a `$` or a backquote."""
        if text[place] == "`":
            end = quote_end(text, place)
            return _Value([text[place:end]], end)
        if text.startswith("$((", place):
            end = bracket_end(text, place + 1)
            return _Value([self._arithmetic(text[place + 3 : end - 2])], end)
        if text.startswith("$(", place):
            end = bracket_end(text, place + 1)
            return _Value([text[place:end]], end)
        if text.startswith("${", place):
            end = bracket_end(text, place + 1)
            return self._braced(text[place + 2 : end - 1], end) or _Value([text[place:end]], end)
        match = _NAME.match(text, place + 1)
        if match is None:
            return _Value(["$"], place + 1)
        name = match[0]
        return _Value(self.arguments if name in "@*" else self.get(name)[:1], match.end(), words=name == "@")

    def get(self, name: str) -> list[str]:
        """The elements of a variable, a positional argument included; none if it is not set."""
        if name.isdigit() and name != "0":
            value = self.arguments[int(name) - 1 : int(name)]
        elif name == "#":
            value = [str(len(self.arguments))]
        else:
            value = self.values.get(name, [])
        if not value and name not in self.values:
            self.unset.add(name)
        return value

    def _braced(self, inside: str, end: int) -> "_Value | None":
        """`${…}`; None for what is not understood."""
        match = _BRACED.fullmatch(inside)
        if match is None:
            return None
        name, index, rest = match["name"], match["index"], match["rest"]
        asked = set(self.unset)
        values = self.arguments if name in "@*" else self.get(name)
        if index is None:
            values = values if name in "@*" else values[:1]
        elif index not in "@*":
            at = self._arithmetic(index)
            values = values[int(at) :][:1] if re.fullmatch(r"-?\d+", at) else []
        words = index == "@" or name == "@"
        if match["length"]:
            return _Value([str(len(values) if index is not None else len("".join(values)))], end)
        if operation := re.fullmatch(r"(:?[-=+?])(.*)", rest, re.DOTALL):
            self.unset = asked  # a default is provided for
            default = self._default(name, values, operation[1], operation[2])
            return _Value(values, end, words) if default is None else _Value(default, end, split=False)
        if operation := re.fullmatch(r"(##?|%%?)(.*)", rest, re.DOTALL):
            pattern = " ".join(self.expand(operation[2], split=False))
            return _Value([_trimmed(value, operation[1], pattern) for value in values], end, words)
        if operation := re.fullmatch(r"//?([^/]+)/?(.*)", rest, re.DOTALL):
            old, new = (" ".join(self.expand(text, split=False)) for text in operation.groups())
            return _Value([value.replace(old, new, -1 if rest.startswith("//") else 1) for value in values], end, words)
        if rest in (",,", "^^"):
            return _Value([value.lower() if rest == ",," else value.upper() for value in values], end, words)
        return None if rest else _Value(values, end, words)

    def _default(self, name: str, values: list[str], sign: str, default: str) -> list[str] | None:
        """The words that `${NAME:-default}` and its relatives have in place of the value; None for the value."""
        is_set = name in self.values or (name.isdigit() and int(name) <= len(self.arguments))
        there = is_set and not (sign.startswith(":") and not "".join(values))
        if sign[-1] == "+":
            return self.expand(default) if there else []
        if there or sign[-1] == "?":
            return None
        if sign[-1] == "=":
            self.values[name] = [" ".join(self.expand(default, split=False))]
            return self.values[name]
        return self.expand(default)

    def _arithmetic(self, text: str) -> str:
        """`$((…))` of whole numbers. What is not understood stays as it is written."""
        plain = re.sub(r"\$\{?(\w+)\}?|([A-Za-z_]\w*)", lambda name: f"({self._number(name[1] or name[2])})", text)
        try:
            return str(_calculated(ast.parse(plain.strip(), mode="eval").body))
        except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
            return f"$(({text}))"

    def _number(self, name: str) -> str:
        return " ".join(self.get(name)[:1]) or "0"


@dataclass
class _Value:
    """What a variable in a word becomes."""

    texts: list[str]
    """Its elements; one, for a variable that is no array."""
    end: int
    """The place in the word after it."""
    words: bool = False
    """Whether each element is a word of its own even in quotes: `"${ARRAY[@]}"`."""
    split: bool = True
    """Whether, outside of quotes, elements are split at spaces: those of a default have been, by its own quotes."""


class _Fields:
    """Words that are being put together."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._open: str | None = None
        self._length = 0

    def add(self, text: str) -> None:
        """Text of the word that is open; opens one."""
        self._length += len(text)
        if self._length > LONGEST:
            raise ValueError(f"a word becomes longer than {LONGEST} letters")
        self._open = (self._open or "") + text

    def add_all(self, texts: Iterable[str]) -> None:
        """The first goes on with the word that is open, each other one is a word."""
        for number, text in enumerate(texts):
            if number:
                self.end()
            self.add(text)

    def add_split(self, texts: Iterable[str]) -> None:
        """The same, and each text ends words where it has spaces."""
        for number, text in enumerate(texts):
            if number or text[:1].isspace():
                self.end()
            self.add_all(text.split())
            if text[-1:].isspace():
                self.end()

    def end(self) -> None:
        """End the word that is open."""
        if self._open is not None:
            self._done.append(self._open)
        self._open = None

    def words(self) -> list[str]:
        """All words."""
        self.end()
        return self._done


def _calculated(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_calculated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_calculated(node.left), _calculated(node.right))
    raise ValueError("not understood")


def _trimmed(value: str, sign: str, pattern: str) -> str:
    """`${NAME#pattern}`, `##`, `%`, `%%`: the value without a beginning or an end that matches."""
    lengths: Iterable[int] = range(len(value) + 1)
    if len(sign) == 2:
        lengths = reversed(range(len(value) + 1))
    for length in lengths:
        part = value[:length] if sign[0] == "#" else value[len(value) - length :]
        if fnmatch.fnmatchcase(part, pattern):
            return value[length:] if sign[0] == "#" else value[: len(value) - length]
    return value

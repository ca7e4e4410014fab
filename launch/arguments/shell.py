"""The commands that a shell script would run, with its variables filled in. Nothing is executed, and nothing is read
but the script itself: no environment, no other file.

Assignments, arrays, defaults, arithmetic, `if`, `case` and tests of texts and numbers are followed. Loops, functions
and the output of other programs are not; what is left out for that is reported.
"""

import fnmatch
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from launch.arguments.shell_variables import Variables
from launch.arguments.shell_words import Token, tokens

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARING = ("export", "local", "declare", "readonly", "typeset")
_BLOCKS = {"if": "fi", "case": "esac", "for": "done", "while": "done", "until": "done", "select": "done"}
_TESTS = ("[", "[[", "test")
_COMPARISONS = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
}


@dataclass
class Script:
    """What a script says."""

    commands: list[list[str]] = field(default_factory=list)
    """Words of each simple command, in order."""
    directives: list[str] = field(default_factory=list)
    """Words of its `#SBATCH` lines."""
    variables: Variables = field(default_factory=Variables)
    """Variables at its end."""
    notes: list[str] = field(default_factory=list)
    """What could not be followed, with the line."""


def read_script(text: str, arguments: list[str], variables: dict[str, str]) -> Script:
    """Read a script that is called with these arguments (`$1`, …), with these variables set.

    Raises ValueError, one line, for text that is no shell script.
    """
    values = {"PWD": ["."], **{name: [value] for name, value in variables.items()}}
    reader = _Reader(Variables(values, list(arguments)))
    for line in re.findall(r"^#SBATCH\s+(.*)$", text, re.MULTILINE):
        reader.script.directives += line.partition(" #")[0].split()
    reader.run(tokens(text))
    return reader.script


class _UntoldError(Exception):
    """A condition that only a run of the script can tell."""


class _Reader:
    def __init__(self, variables: Variables) -> None:
        self.script = Script(variables=variables)
        self._variables = variables
        self._ended = False

    def run(self, words: list[Token]) -> None:
        """Follow statements."""
        place = 0
        while place < len(words) and not self._ended:
            token = words[place]
            if token.operator or token.text in ("{", "}", "!"):
                place += 1  # a subshell's assignments stay inside of it; no training script depends on that
            elif token.text in _BLOCKS:
                end = _block_end(words, place)
                self._block(words[place:end])
                place = end
            elif token.text == "function" or [word.text for word in words[place + 1 : place + 3]] == ["(", ")"]:
                end = _function_end(words, place)
                self._leave_out("a function", words[place:end])
                place = end
            else:
                end = next((at for at in range(place, len(words)) if words[at].operator), len(words))
                if token.text in _TESTS:
                    place = self._guarded(words, place, end)
                else:
                    self._command(words[place:end])
                    place = end

    # Blocks

    def _guarded(self, words: list[Token], place: int, end: int) -> int:
        """Where to go on after a test: `[ … ] && command` runs the command if it holds."""
        while words[place].text == "[[" and "]]" not in (word.text for word in words[place:end]) and end < len(words):
            end = next((at for at in range(end + 1, len(words)) if words[at].operator), len(words))  # [[ a && b ]]
        joint = words[end].text if end < len(words) else ""
        if joint not in ("&&", "||"):
            return end
        try:
            runs = self._holds(words[place:end]) == (joint == "&&")
        except _UntoldError:
            runs = False
            self._leave_out("what follows a test that only a run can tell", words[place : _statement_end(words, end)])
        return end if runs else _statement_end(words, end + 1)

    def _block(self, words: list[Token]) -> None:
        if words[0].text == "if":
            for condition, body in _branches(words):
                try:
                    holds = condition is None or self._holds(condition)
                except _UntoldError:
                    self._leave_out("an `if` that only a run can decide", words)
                    return
                if holds:
                    self.run(body)
                    return
        elif words[0].text == "case":
            value = " ".join(self._variables.expand(words[1].text, split=False))
            for patterns, body in _clauses(words):
                if any(fnmatch.fnmatchcase(value, " ".join(self._variables.expand(pattern))) for pattern in patterns):
                    self.run(body)
                    return
        else:
            self._leave_out(f"a `{words[0].text}` loop", words)

    def _leave_out(self, what: str, words: list[Token]) -> None:
        """Report a part of the script that was not followed, if it has to do with arguments."""
        if any(word.text.lstrip("\"'").startswith("--") or _ASSIGNMENT.fullmatch(word.text) for word in words):
            self._note(words[0], f"{what} is left out")

    def _note(self, token: Token, text: str) -> None:
        note = f"line {token.line}: {text}"
        if note not in self.script.notes:
            self.script.notes.append(note)

    # Commands

    def _command(self, words: list[Token]) -> None:
        assigned: dict[str, list[str]] = {}
        while words and (match := _ASSIGNMENT.fullmatch(words[0].text)):
            assigned[match[1]] = self._value(match, words[0])
            words = words[1:]
        if not words:
            self._variables.values |= assigned
            return
        if words[0].text in _DECLARING:
            for word in words[1:]:
                if match := _ASSIGNMENT.fullmatch(word.text):
                    self._variables.values[match[1]] = self._value(match, word)
            return
        command = [text for word in words for text in self._words(word)]
        if not command:
            return
        if command[0] in ("exit", "return"):
            self._ended = True
        elif command[0] == "shift":
            count = int(command[1]) if len(command) > 1 and command[1].isdigit() else 1
            self._variables.arguments = self._variables.arguments[count:]
        elif command[0] == "eval":
            self.run(tokens(" ".join(command[1:])))
        elif command[0] in (".", "source"):
            self._note(words[0], f"`{' '.join(command)}`: another file is not read")
        else:
            self.script.commands.append(command)

    def _value(self, match: re.Match[str], token: Token) -> list[str]:
        """What an assignment makes of a variable."""
        name, adds, text = match.groups()
        before = self._variables.values.get(name, []) if adds else []
        if text.startswith("(") and text.endswith(")"):
            inner = [Token(part.text, token.line) for part in tokens(text[1:-1]) if not part.operator]
            return [*before, *(word for part in inner for word in self._words(part))]
        value = "".join(self._words(Token(text, token.line), split=False))
        return ["".join(before[:1]) + value, *before[1:]]

    def _words(self, token: Token, split: bool = True) -> list[str]:
        if _has_output(token.text) and "--" not in token.text.split("(")[0]:
            self._note(token, f"{token.text} is not run, and stays as it is written")
        return self._variables.expand(token.text, split)

    # Conditions

    def _holds(self, words: list[Token]) -> bool:
        """Whether tests hold. Raises _UntoldError if that depends on more than the script."""
        texts = [word.text for word in words if word.text not in (";", "\n")]
        closing = {"[[": "]]", "[": "]"}.get(texts[0]) if texts else None
        if closing and texts[-1] == closing and closing not in texts[:-1]:
            inner = texts[1:-1]
        elif texts[:1] == ["test"] and not {"&&", "||"} & set(texts):
            inner = texts[1:]
        else:
            inner = []
        for joint, both in (("||", any), ("&&", all)):
            if joint in (inner or texts):
                parts = _split(inner or texts, joint)
                tests = [Token(text, 0) for text in parts[0]], [Token(text, 0) for part in parts[1:] for text in part]
                wrap = (lambda test: [Token("[[", 0), *test, Token("]]", 0)]) if inner else (lambda test: test)
                return both([self._holds(wrap(test)) for test in tests])
        if not inner:
            raise _UntoldError
        negated = inner[0] == "!"
        return self._test(inner[negated:]) != negated

    def _test(self, words: list[str]) -> bool:
        if any(_has_output(word) for word in words):
            raise _UntoldError
        values = [" ".join(self._variables.expand(word, split=False)) for word in words]
        match values:
            case [value] | ["-n", value]:
                return bool(value)
            case ["-z", value]:
                return not value
            case [left, "=" | "==", right]:
                return fnmatch.fnmatchcase(left, right)
            case [left, "!=", right]:
                return not fnmatch.fnmatchcase(left, right)
            case [left, sign, right] if sign in _COMPARISONS and left.isdigit() and right.isdigit():
                return bool(_COMPARISONS[sign](int(left), int(right)))
        raise _UntoldError


def _has_output(text: str) -> bool:
    """Whether a word has the output of another program in it."""
    return "$(" in text.replace("$((", "") or "`" in text


def _split(words: list[str], joint: str) -> list[list[str]]:
    """The words before the first `joint`, and those after it with all that joins them."""
    at = words.index(joint)
    return [words[:at], words[at + 1 :]]


def _block_end(words: list[Token], place: int) -> int:
    """The place after the block that begins at a place."""
    expected: list[str] = []
    for at in range(place, len(words)):
        first = at == place or words[at - 1].operator or words[at - 1].text in ("then", "do", "else", "{")
        if first and words[at].text in _BLOCKS:
            expected.append(_BLOCKS[words[at].text])
        elif expected and words[at].text == expected[-1] and first:
            expected.pop()
            if not expected:
                return at + 1
    raise ValueError(f"line {words[place].line}: `{words[place].text}` has no `{expected[-1]}`")


def _function_end(words: list[Token], place: int) -> int:
    """The place after a function's body in braces."""
    depth = 0
    for at in range(place, len(words)):
        depth += (words[at].text == "{") - (words[at].text == "}")
        if words[at].text == "}" and not depth:
            return at + 1
    return len(words)


def _statement_end(words: list[Token], place: int) -> int:
    return next((at for at in range(place, len(words)) if words[at].text in (";", "\n", "||", "&")), len(words))


def _branches(words: list[Token]) -> Iterator[tuple[list[Token] | None, list[Token]]]:
    """Condition and body of each branch of an `if`; the condition of `else` is None."""
    keywords = [0]
    depth = 0
    for at, word in enumerate(words):
        first = at == 0 or words[at - 1].operator or words[at - 1].text in ("then", "do", "else")
        if not first:
            continue
        depth += (word.text in _BLOCKS) - (word.text in _BLOCKS.values())
        if depth == 1 and word.text in ("then", "elif", "else"):
            keywords.append(at)
    keywords.append(len(words) - 1)
    condition: list[Token] | None = None
    for start, end in pairwise(keywords):
        part = words[start + 1 : end]
        if words[start].text in ("if", "elif"):
            condition = part
        elif words[start].text == "else":
            yield None, part
        else:
            yield condition, part


def _clauses(words: list[Token]) -> Iterator[tuple[list[str], list[Token]]]:
    """Patterns and body of each clause of a `case`."""
    place = next((at for at, word in enumerate(words) if word.text == "in"), len(words)) + 1
    while place < len(words) - 1:
        closing = next((at for at in range(place, len(words)) if words[at].text == ")"), len(words))
        patterns = [word.text for word in words[place:closing] if not word.operator]
        depth, end = 0, closing + 1
        while end < len(words) - 1 and not (depth == 0 and words[end].text == ";;"):
            depth += (words[end].text in _BLOCKS) - (words[end].text in _BLOCKS.values())
            end += 1
        if patterns:
            yield patterns, words[closing + 1 : end]
        place = end + 1

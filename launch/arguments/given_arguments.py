"""Arguments that are being turned into a job file: each is asked for by what takes it, and what nobody asks for is
reported in the end."""

from collections.abc import Callable
from typing import Any

from copus.job import JobError
from launch.arguments.command_line import CommandLine
from launch.arguments.imported_job import Effect, ImportedJob


class GivenArguments:
    """The arguments of a command line, and the job that they become."""

    def __init__(self, command: CommandLine, job: ImportedJob) -> None:
        self._given = dict(command.arguments)
        self._taken: set[str] = set()
        self._unset = command.unset
        self.job = job

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def values(self, name: str) -> list[str] | None:
        """The values of an argument, none for a flag; None if it is not given. It counts as mapped from now on."""
        if name not in self._given:
            return None
        self._taken.add(name)
        return self._given[name]

    def flag(self, name: str) -> bool:
        """Whether a flag is given."""
        return self.values(name) is not None

    def text(self, name: str) -> str | None:
        """The value of an argument; None if it is not given, or empty."""
        return " ".join(self.values(name) or []) or None

    def whole(self, name: str) -> int | None:
        """The value of an argument, a whole number; None if it is not given. Raises JobError for anything else."""
        value = self._number(name, lambda text: int(text.replace("_", "")), "a whole number")
        return None if value is None else int(value)

    def real(self, name: str) -> float | None:
        """The value of an argument, a number; None if it is not given. Raises JobError for anything else."""
        value = self._number(name, float, "a number")
        return None if value is None else float(value)

    def _number(self, name: str, kind: Callable[[str], float], expected: str) -> float | None:
        values = self.values(name)
        if values is None:
            return None
        text = " ".join(values)
        try:
            return kind(text)
        except ValueError:
            if not text and self._unset:
                names = ", ".join(self._unset[:6]) + (", …" if self._unset[6:] else "")
                raise JobError(
                    f"{name} has no value; the script does not set {names}: write NAME=VALUE before the script"
                ) from None
            raise JobError(f"{name} {text}: expected {expected}") from None

    def put(self, place: str, name: str, value: Any, default: Any) -> None:
        """Set the field that an argument stands for; if it is not given, to the other tool's default."""
        self.job.put(place, default if value is None else value, f"{name}'s default" if value is None else "")

    def leave(self, name: str, effect: Effect, reason: str) -> None:
        """Report an argument, if it is given, as one without a field."""
        if name in self._given:
            self._taken.discard(name)
            self.job.leave(" ".join([name, *self._given.pop(name)]), effect, reason)

    def finish(self, unmapped: Callable[[str], tuple[Effect, str] | None]) -> None:
        """Report all arguments that nobody has asked for; `unmapped` knows why."""
        for name in list(self._given):
            if name in self._taken:
                self.job.mapped += 1
            else:
                self.leave(name, *(unmapped(name) or ("is unknown", "no argument that is known here")))

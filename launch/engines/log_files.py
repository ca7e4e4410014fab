"""Reading log files as they are, or while they grow."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_SECONDS = 0.5
"""Time between two looks at files that grow."""


def lines_of(find: Callable[[], list[Path]], rank: int | None, alive: Callable[[], bool] | None) -> Iterator[str]:
    """Lines of the files that `find` gives, without line ends; with `alive`, until it says no and nothing is left.

    Of several files, each stretch has a heading as `tail` writes it. Of a `rank` only its lines, without the
    `[rankN]:` before them.
    """
    offsets: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        last_look = alive is None or not alive()  # asked before reading: what comes between is read
        files = find()
        for path in files:
            for line in _new_lines(path, offsets, torn_too=last_look):
                if rank is not None:
                    mark = f"[rank{rank}]:"
                    if line.startswith(mark):
                        yield line.removeprefix(mark)
                    continue
                if len(files) > 1 and path != shown:
                    yield f"==> {path.name} <=="
                shown = path
                yield line
        if last_look:
            return
        time.sleep(POLL_SECONDS)


def _new_lines(path: Path, offsets: dict[Path, int], *, torn_too: bool) -> list[str]:
    """What was appended since the last look; a line that is still being written only where `torn_too`."""
    try:
        with open(path, "rb") as file:
            file.seek(offsets.get(path, 0))
            appended = file.read()
    except FileNotFoundError:
        return []
    if not torn_too:
        appended = appended[: appended.rfind(b"\n") + 1]
    offsets[path] = offsets.get(path, 0) + len(appended)
    return appended.decode(errors="replace").splitlines()

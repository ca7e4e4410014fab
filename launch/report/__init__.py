"""`copus report`: a run, or several, as one HTML page that needs no network and no other file.

Drawn with plotly, which is well kept, zooms and tells values; its 5 MB of JavaScript, in the page, are the price of
needing nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

from copus.durable import write_atomically
from copus.events import read_events
from copus.job import JobError
from launch.group import find_group, runs_of_group
from launch.json_output import as_json_line
from launch.run_directory import find_run, shown


def report(
    run_texts: Sequence[str | None], output: Path | None, group_text: str | None = None, *, as_json: bool = False
) -> int:
    """Write the page, of a group that of its runs. Raises JobError if a run does not exist or the
    file cannot be written."""
    of_group = [] if group_text is None else map(str, runs_of_group(*find_group(group_text)))
    runs = list(dict.fromkeys(map(find_run, [*run_texts, *of_group] or [None])))
    if output is None:
        output = runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    if output.suffix not in (".html", ".htm"):
        raise JobError(f"--output {output}: expected a name that ends in .html")
    try:
        write_atomically(output.absolute(), page(runs))
        output.chmod(0o644)
    except OSError as error:
        raise JobError(f"--output {output}: {error.strerror}") from None
    print(as_json_line({"output": str(output.absolute())}) if as_json else shown(output.absolute()))
    return 0


def page(runs: list[Path], *, live: bool = False, library: bool = True) -> str:
    """The page of a run, or the comparison of several. A `live` one asks its server for news; without the plotting
    `library` it is an answer to that."""
    from launch.history import read_history
    from launch.report.comparison import comparison
    from launch.report.render import render
    from launch.report.single import single

    if len(runs) > 1:
        return render("comparison.html", comparison([read_history(run) for run in runs]))
    events = list(read_events(runs[0]))
    return render("run.html", single(read_history(runs[0], events), events), live=live, library=library)

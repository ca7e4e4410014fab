"""Which checkpoint of a run a command means."""

from pathlib import Path

from rich.console import Console

from copus.checkpoints.files import FOLDER, REPLACED, checkpoint_names, samples_of, whats_wrong
from copus.job import JobError
from launch.run_directory import shown


def find_checkpoint(run: Path, text: str | None, console: Console) -> Path:
    """The newest checkpoint of a run that verifies, or the one that `--checkpoint` names: a path, a name below
    RUN/checkpoints, or its sequences. Absolute path.

    Raises JobError if there is none, or it does not verify. `console` says what was passed over.
    """
    names = [name for name in checkpoint_names(run) if not name.endswith(REPLACED)]  # which goes away any moment
    if text is None:
        return _newest(run, names, console)
    counted = [name for name in names if text.isdecimal() and samples_of(name) == int(text)]
    places = [Path(text).expanduser(), *(run / FOLDER / name for name in (text, *counted))]
    checkpoint = next((path for path in places if (path / "trainer.json").is_file()), None)
    if checkpoint is None:
        listed = ", ".join(reversed(names)) or "none"
        raise JobError(f"--checkpoint {text}: no such checkpoint; {shown(run)} has {listed}")
    if reason := whats_wrong(checkpoint):
        raise JobError(f"--checkpoint {text}: does not verify: {reason}")
    return checkpoint.absolute()


def _newest(run: Path, names: list[str], console: Console) -> Path:
    """The first that verifies; says which it passed over."""
    flawed: list[str] = []
    for name in names:
        reason = whats_wrong(run / FOLDER / name)
        if reason is None:
            for line in flawed:
                console.print(f"{line}: skipped", markup=False, soft_wrap=True)
            return run / FOLDER / name
        flawed.append(f"{FOLDER}/{name} does not verify: {reason}")
    raise JobError(": ".join([shown(run), "no checkpoint that verifies", *flawed[:1]]))

"""A small job with prepared data, and the `copus` command as a process, for the tests of the launcher."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from data_text import take_as_verified

import launch.calibrate
import launch.cli
import launch.profile
import launch.submit
from copus.data.manifest import FILES, FORMAT_VERSION, Manifest
from copus.data.prepared import data_folder, input_key, remember
from copus.job import JobConfig, load_job
from copus.manifest import describe
from launch.engines import LocalEngine

DRIVER = Path(__file__).with_name("launch_driver.py")
WORKER = Path(__file__).with_name("launch_worker.py")

JOB = """
name: small
model: {layers: 4, hidden: 64, ffn_hidden: 128, heads: 4, kv_heads: 2, seq_len: 32, vocab: 384}
data: {source: [one.txt, two.txt], held_out: [two], cache: cache}
cluster: {accelerators_per_node: 2}
training: {layout: {tp: 2}, global_batch: 4, tokens: 12800}
profile: {table: table.jsonl}
"""


def write_job(folder: Path, **sections: dict[str, object]) -> Path:
    """A job file in a folder, with its data prepared as far as the launcher looks at it. Sections are updated."""
    values = yaml.safe_load(JOB)
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text(f"{name}: to be or not to be " * 100)
    data = values["data"]
    data["source"] = [str(folder / name) for name in data["source"]]
    data["cache"] = str(folder / data["cache"])
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    prepare_fake(load_job(path))
    return path


def prepare_fake(job: JobConfig) -> Path:
    """Prepared data of a job as far as the launcher looks at it: files of some bytes, and a manifest of them."""
    making = data_folder(job) / ".making"
    making.mkdir(parents=True)
    for name in FILES:
        (making / name).write_text(f"{name} of {input_key(job)}")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        files=describe(making, FILES),
        sources=[],
        vocab=job.model.vocab,
        eod=0,
        largest_id=job.model.vocab - 1,
        train_tokens=100_000,
        valid_tokens=10_000,
        works=[],
        dropped=[],
    )
    (making / "manifest.json").write_text(manifest.model_dump_json())
    folder = making.rename(data_folder(job) / manifest.digest)
    take_as_verified(folder)
    remember(job, input_key(job), manifest.digest)
    return folder


class DirectEngine(LocalEngine):
    """The local engine without its agent: one worker, and no torch."""

    def __init__(self, worker: list[str]) -> None:
        super().__init__(worker=worker)
        self.worker = worker

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        return [sys.executable, *self.worker, str(run), *(["--profile-only"] if profile_only else [])]


def copus_here(*arguments: str, worker: list[str] | None = None, how: str = "direct") -> int:
    """The `copus` command in this process. With `worker` (options of launch_worker.py) that one trains.

    `how` it starts: `direct`, or below the elastic `agent`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if worker is not None:
            command = [str(WORKER), *worker]
            engine = LocalEngine(worker=command) if how == "agent" else DirectEngine(command)
            patch.setattr(launch.submit, "engine_of", lambda job: engine)
            for module in (launch.profile, launch.calibrate):
                patch.setattr(module, "attended_engine_of", lambda job, command: engine)
        return launch.cli.main(list(arguments))


def copus_command(*arguments: str, worker: list[str] | None = None, how: str = "direct") -> list[str]:
    """Command line for the same as a process."""
    if worker is None:
        return [sys.executable, "-m", "launch.cli", *arguments]
    return [sys.executable, str(DRIVER), how, *worker, "--", *arguments]


def copus_process(*arguments: str, cwd: Path, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end in a process of its own."""
    command = copus_command(*arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds)

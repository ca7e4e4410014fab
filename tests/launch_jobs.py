"""A small job with prepared data, and the `copus` command as a process, for the tests of the launcher."""

import subprocess
import sys
from pathlib import Path

import yaml

from copus.data.prepared import FILES, FORMAT_VERSION, Manifest, prepared_path
from copus.job import load_job

DRIVER = Path(__file__).with_name("launch_driver.py")

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
    prepared = prepared_path(load_job(path))
    prepared.mkdir(parents=True)
    for name in FILES:
        (prepared / name).touch()
    counted = {"train_tokens": 100_000, "valid_tokens": 10_000}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        sources=[],
        vocab=384,
        eod=0,
        tokenizer_sha256="",
        works=[],
        dropped=[],
        **counted,
    )
    (prepared / "manifest.json").write_text(manifest.model_dump_json())
    return path


def copus_command(*arguments: str, worker: list[str] | None = None, how: str = "direct") -> list[str]:
    """Command line of `copus`; with `worker` (options of launch_worker.py) that one trains instead of the real one."""
    if worker is None:
        return [sys.executable, "-m", "launch.cli", *arguments]
    return [sys.executable, str(DRIVER), how, *worker, "--", *arguments]


def copus(
    *arguments: str, cwd: Path, worker: list[str] | None = None, how: str = "direct", timeout_seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = copus_command(*arguments, worker=worker, how=how)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds)

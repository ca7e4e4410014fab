"""How fast is text prepared, in how much memory, and are the files those that Megatron's own tool would write?

    python -m benchmarks.data [--megabytes N] [--processes N] [--alone] [--quick] [--json]

Synthetic JSON lines of 2 kB each are made, and a tokenizer. `copus data` prepares them in one process and in several;
beside it one process does what Megatron-LM's `tools/preprocess_data.py --append-eod` does: encode a line, append the
end-of-document token, hand it to megatron-core's IndexedDatasetBuilder. The script itself is not in the wheel. copus
compares every document with the held-out text too, which the other does not. `peak_bytes` is the memory of all
processes together, sampled 50 times a second, shared pages counted once for each. `--alone` prepares a long text once,
in so many processes and without Megatron's way beside it; memory is then sampled twice a second.
"""

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.data.prepared import prepared_path
from copus.data.tokenizer import train_tokenizer
from copus.data.worker_processes import default_processes
from copus.job import JobConfig, dump_job, parse_job

VOCAB = 4096
WORDS_A_LINE, LINES_AT_ONCE = 330, 100
SECONDS_BETWEEN_SAMPLES, SECONDS_BETWEEN_SAMPLES_ALONE = 0.02, 0.5
AS_MEGATRON = """
import json, sys
from copus.backends.megatron import cpu
cpu.before_import()
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer
text, tokenizer, prefix, vocab = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(int(vocab)))
for line in open(text, encoding="utf-8"):
    ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids + [0]
    builder.add_document(ids, [len(ids)])
builder.finalize(prefix + ".idx")
"""
"""preprocess_data.py's encoder and builder, for a tokenizer whose token 0 ends a document."""


def make_text(path: Path, megabytes: float, seed: int) -> None:
    """JSON lines of so much text, of 20,000 made-up words in the proportions of Zipf's law."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(random.choice(letters, 2 + number % 9)) for number in range(20_000)]
    shares = np.cumsum(1 / np.arange(1, len(words) + 1))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            chosen = np.searchsorted(shares, random.random((LINES_AT_ONCE, WORDS_A_LINE)) * shares[-1])
            for line in chosen.tolist():
                written += file.write(json.dumps({"text": " ".join(map(words.__getitem__, line))}) + "\n")


def job_of(folder: Path, processes: int) -> JobConfig:
    """The job whose data is prepared: all of the text is trained on."""
    model = {"layers": 1, "hidden": 32, "ffn_hidden": 64, "heads": 2, "kv_heads": 2, "seq_len": 128, "vocab": VOCAB}
    data = {
        "source": [str(folder / "train.jsonl")],
        "held_out_source": [str(folder / "valid.jsonl")],
        "tokenizer": str(folder / "tokenizer.json"),
        "cache": str(folder / f"cache-{processes}"),
        "processes": processes,
    }
    training = {"global_batch": 4, "tokens": 10_000}
    cluster = {"nodes": 1, "accelerators_per_node": 1}
    return parse_job({"name": "data", "model": model, "data": data, "cluster": cluster, "training": training})


def measured(command: list[str], seconds_between_samples: float = SECONDS_BETWEEN_SAMPLES) -> dict[str, Any]:
    """Seconds and peak memory of a command and all of its processes, the peak also of every tenth of the time; and the
    processors' time. Raises CalledProcessError if it fails."""
    started, memory, before = time.perf_counter(), [], resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            memory.append(_resident_bytes(root))
            time.sleep(seconds_between_samples)
        assert process.stderr is not None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=process.stderr.read())
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tenths = [max(memory[len(memory) * tenth // 10 :][: -(-len(memory) // 10)]) for tenth in range(10)]
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "peak_bytes": max(memory),
        "peak_bytes_by_tenth": tenths,
    }


def _resident_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # it has just ended
        pass
    return total


def run(folder: Path, megabytes: float, processes: int, *, alone: bool = False) -> dict[str, Any]:
    """Prepare the same text in each way, or `alone` with copus in several processes."""
    make_text(folder / "train.jsonl", megabytes, seed=1)
    make_text(folder / "valid.jsonl", 0.2, seed=2)
    with open(folder / "train.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 1000)]
    train_tokenizer(texts, VOCAB).save(str(folder / "tokenizer.json"))
    text_bytes = (folder / "train.jsonl").stat().st_size

    rows: dict[str, dict[str, Any]] = {}
    theirs = [str(folder / "train.jsonl"), str(folder / "tokenizer.json"), str(folder / "theirs"), str(VOCAB)]
    if not alone:
        rows["megatron, 1 process"] = measured([sys.executable, "-W", "ignore", "-c", AS_MEGATRON, *theirs])
    equal = []
    for count in [processes] if alone else sorted({1, processes}):
        job = job_of(folder, count)
        (folder / "job.yaml").write_text(dump_job(job))
        command = [sys.executable, "-m", "copus.data", str(folder / "job.yaml")]
        interval = SECONDS_BETWEEN_SAMPLES_ALONE if alone else SECONDS_BETWEEN_SAMPLES
        rows[f"copus, {count} process{'es' if count > 1 else ''}"] = measured(command, interval)
        ours = prepared_path(job)
        equal += [
            (ours / f"train.{kind}").read_bytes() == (folder / f"theirs.{kind}").read_bytes()
            for kind in ("bin", "idx")
            if not alone
        ]
    for row in rows.values():
        row["bytes_per_second"] = text_bytes / row["seconds"]
    return {"text_bytes": text_bytes, "rows": rows, "same_files_as_megatron": None if alone else all(equal)}


def show(result: dict[str, Any], console: Console) -> None:
    """Show the figures to a person."""
    table = Table("", "MB/s", "seconds", "processor seconds", "peak MB")
    for name, row in result["rows"].items():
        figures = (row["bytes_per_second"] / 1e6, row["seconds"], row["processor_seconds"], row["peak_bytes"] / 1e6)
        table.add_row(name, *(f"{figure:.3g}" for figure in figures))
    console.print(table)
    if result["same_files_as_megatron"] is not None:
        same = "" if result["same_files_as_megatron"] else "NOT "
        console.print(f"the files are {same}those that megatron-core's builder writes, byte for byte")


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if the files differ from Megatron's."""
    parser = parser_of("data", __doc__)
    parser.add_argument("--megabytes", type=float, default=200, help="size of the text")
    parser.add_argument("--processes", type=int, default=default_processes(), help="beside one process")
    parser.add_argument("--alone", action="store_true", help="copus in so many processes alone")
    parser.add_argument("--quick", action="store_true", help="40 MB of text")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), 40 if options.quick else options.megabytes, options.processes, alone=options.alone)
    tell(result, show, options, console_of(options))
    return 1 if result["same_files_as_megatron"] is False else 0


if __name__ == "__main__":
    sys.exit(main())

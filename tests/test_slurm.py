"""The demo, shortened, on a real Slurm cluster of two nodes on this machine: `make test-slurm`.

Each test is one story of a job, told by its events; they are printed.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from data_text import prose, write_works
from slurm_cluster import install, slurm_cluster, wait_for
from test_lease import NO_LOCKS

from copus.event_lines import without_replays
from copus.events import Checkpoint, End, Event, Noise, Restart, Start, Step, Warned, read_events
from launch.lease import holder_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    "model": "{layers: 2, hidden: 64, ffn_hidden: 128, heads: 4, kv_heads: 2, seq_len: 32, vocab: 300}",
    "cluster": "{nodes: 2, accelerators_per_node: 1}",
    "training.layout": "{dp: 2}",
    "training.global_batch": "4",
    "training.warmup_tokens": "0",
    "training.evaluate_sequences": "8",
    "training.evaluate_every_tokens": "100_000",
    "training.checkpoint_every_tokens": "6400",  # 50 steps
    "planner.policy": "static",
    "profile.when": "never",
}


class Cluster:
    """The `copus` command and Slurm's programs in a folder, with the cluster of this module."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
        write_works(folder / "text", first=prose(1, 3000), second=prose(2, 3000), held=prose(3, 1000))

    def job(self, name: str, tokens: int, **options: object) -> list[str]:
        """Arguments of `copus submit`: the demo with a smaller model and a text of this machine."""
        settings = SHORT | {
            "name": name,
            "training.tokens": str(tokens),
            "data": yaml.safe_dump(
                {"source": ["text"], "held_out": ["held"], "cache": "cache"}, default_flow_style=True
            ),
            "launch.options": yaml.safe_dump(options, default_flow_style=True),
        }
        arguments = ["submit", str(ROOT / "examples" / "shakespeare.yaml"), "--engine", "slurm"]
        return [*arguments, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]

    def copus(self, *arguments: str, exit_code: int = 0) -> str:
        """Run the command to its end. What it printed."""
        return self.run([sys.executable, "-m", "launch.cli", *arguments], exit_code)

    @contextmanager
    def running(self, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
        """The command while it runs; what is left of it is killed."""
        command = [sys.executable, "-m", "launch.cli", *arguments]
        out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=self.folder, env=self.environment, **out) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, command: list[str], exit_code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    why_not = install()
    if why_not:
        pytest.skip(f"no Slurm here: {why_not}")
    with tempfile.TemporaryDirectory(prefix="copus-slurm-") as folder:
        os.chmod(folder, 0o755)  # munge refuses folders that others might write to
        with slurm_cluster(Path(folder)) as environment:
            yield Cluster(Path(folder), environment)


def wait_for_event(run: Path, kind: type[Event], count: int, seconds: float = 240) -> None:
    wait_for(f"{count} × {kind.__name__}", lambda: len(seen(run, kind)) >= count, seconds)


def seen(run: Path, kind: type[Event]) -> list[Event]:
    return [event for event in read_events(run) if isinstance(event, kind)]


def tell(run: Path) -> None:
    """Print the run's story: every event that is not of one step."""
    for event in read_events(run):
        if not isinstance(event, Step | Noise):
            more = event.model_dump(
                include={"resumed_from", "ranks", "samples_repeated", "path", "reason", "message", "loss"}
            )
            print(f"  {event.type:<10} step {event.step:<4} samples {event.samples_consumed:<5} {more or ''}")


def kill_step(run: Path, session: str, node: int) -> None:
    """Kill all that a job runs on one node: the agent and its worker.

    Slurm's own daemon of the step is left: without it nobody reports the death, and the other agent only notices after
    `launch.timeout_seconds`.
    """
    logs = f"{run}/logs/slurm-{session}.node-{node}"
    found = [process for process in psutil.process_iter(["cmdline"]) if logs in (process.info["cmdline"] or [])]
    assert found, f"nothing runs with {logs}"
    agent = min(found, key=lambda process: process.create_time())
    for process in (agent, *agent.children(recursive=True)):
        process.kill()


def test_slurm_takes_the_script_of_a_dry_run(cluster: Cluster) -> None:
    arguments = cluster.job("dry", 6400, partition="main", time_limit="0:10:00", sbatch={"comment": "two words"})
    script = cluster.copus(*arguments, "--dry-run")
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    (cluster.folder / "dry.sh").write_text(script)
    assert "to start at" in cluster.run(["sbatch", "--test-only", "dry.sh"])
    assert not (cluster.folder / "runs").exists()


def test_slurm_takes_the_script_of_a_job_on_gpus(cluster: Cluster) -> None:
    """It asks for the share of a node's CPUs that its GPUs have, which is all of them here: one."""
    arguments = cluster.job("gpus", 6400)
    gpus = "cluster={nodes: 2, accelerators_per_node: 1, accelerator: h100-sxm}"
    script = cluster.copus(*arguments, "--set", gpus, "--dry-run")
    assert {"#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=1"} <= set(script.splitlines())
    (cluster.folder / "gpus.sh").write_text(script)
    assert "to start at" in cluster.run(["sbatch", "--test-only", "gpus.sh"])


def test_a_refused_job_leaves_nothing(cluster: Cluster) -> None:
    said = cluster.copus(*cluster.job("refused", 6400, partition="nowhere"), exit_code=2)
    assert said.splitlines()[-1].startswith("copus: sbatch: ")
    assert "invalid partition" in said
    assert not (cluster.folder / "runs" / "refused").exists()


def test_the_environment_of_the_shell_does_not_outrank_the_job_file(cluster: Cluster) -> None:
    """What a user, or the allocation that copus is called from, may have set; it runs on both nodes to the end."""
    run = cluster.folder / "runs" / "environment"
    theirs = {
        **{"SBATCH_PARTITION": "nowhere", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXPORT": "NONE"},
        **{"SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "200", "SLURM_EXPORT_ENV": "NONE", "SLURM_JOB_ID": "9999"},
        **{"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "RANK": "7", "PET_NNODES": "9", "COPUS_REQUEUED": "1"},
        "SQUEUE_STATES": "COMPLETED",
    }
    before = cluster.environment
    cluster.environment = before | theirs
    try:
        output = cluster.copus(*cluster.job("environment", 6400, sbatch={"mem": "1M"}))
    finally:
        cluster.environment = before
    tell(run)
    assert "finished" in output
    shown = cluster.run(["scontrol", "show", "job", job_id(run)])
    for setting in ("Partition=main", "Requeue=1", "Restarts=0"):
        assert setting in shown, shown
    assert "TimeLimit=00:01:00" not in shown, shown  # unlimited, or the year that the scheduler makes of that
    assert len(seen(run, Start)) == 1
    assert seen(run, Restart) == []


def test_an_interface_that_the_nodes_do_not_have_is_no_requeue(cluster: Cluster) -> None:
    said = cluster.copus(*cluster.job("interface", 6400, interface="eth99"), exit_code=2)
    print(said)
    assert "GLOO_SOCKET_IFNAME(eth99): this machine has no network interface eth99" in said.splitlines()[-1]
    wait_for("the end of the job", lambda: cluster.run(["squeue", "--noheader"]) == "", 30)
    assert "Restarts=0" in cluster.run(["scontrol", "show", "job", job_id(cluster.folder / "runs" / "interface")])


def test_a_lost_step_costs_a_requeue_and_no_sample(cluster: Cluster) -> None:
    run = cluster.folder / "runs" / "lost"
    with cluster.running(*cluster.job("lost", 38_400)) as following:
        wait_for_event(run, Checkpoint, 1)
        kill_step(run, f"{job_id(run)}-0", 1)
        output, _ = following.communicate(timeout=480)
    tell(run)
    print(output)
    assert following.returncode == 0, "\n".join(log.read_text() for log in sorted((run / "logs").glob("*.log")))
    assert "goes back into the queue" in output
    assert "finished" in output
    assert [event.resumed_from is None for event in seen(run, Start)] == [True, False]
    assert [event.ranks for event in seen(run, Restart)] == [2]
    steps = [event for event in without_replays(read_events(run)) if isinstance(event, Step)]
    assert [event.samples_consumed for event in steps] == list(range(4, 1200 + 1, 4))
    nodes = re.findall(r"==> slurm-\d+-(\d\.node-\d)\.log <==", cluster.copus("logs", "lost"))
    assert nodes == sorted(nodes)
    assert "0.node-0" in nodes  # which said that it lost its peers; others may have had nothing to say
    logs = {re.sub(r"slurm-\d+-(.*)\.log", r"\1", log.name) for log in (run / "logs").glob("slurm-*.node-*.log")}
    assert {"0.node-0", "1.node-0", "1.node-1"} <= logs


def test_the_time_limit_is_a_requeue_and_cancel_the_end(cluster: Cluster) -> None:
    run = cluster.folder / "runs" / "long"
    cluster.copus(*cluster.job("long", 10**7, time_limit="5", checkpoint_seconds=240), "--detach")
    said = cluster.copus("submit", "--resume", "long", exit_code=2)
    assert "Slurm job" in said  # nobody else trains in this run now
    wait_for_event(run, End, 1)
    wait_for_event(run, Start, 2)
    tell(run)
    assert "its time limit is near" in seen(run, Warned)[0].message
    first, second = seen(run, End)[0], seen(run, Start)[1]
    assert first.reason == "interrupted"
    assert (
        second.samples_consumed == first.samples_consumed > 0
    )  # the checkpoint was made on the signal: nothing is lost
    print(cluster.copus("cancel", "long"))
    wait_for_event(run, End, 2)
    wait_for("the end of the job", lambda: cluster.run(["squeue", "--noheader"]) == "", 30)
    assert "COMPLETED" in cluster.run(["scontrol", "show", "job", job_id(run)])
    assert len(seen(run, Start)) == 2


def test_a_preempted_job_checkpoints_in_its_grace_time_and_goes_on(cluster: Cluster) -> None:
    run = cluster.folder / "runs" / "preempted"
    cluster.copus(*cluster.job("preempted", 10**7, partition="main"), "--detach")
    wait_for("20 steps", lambda: len(seen(run, Step)) >= 20, 240)
    cluster.run(["sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5"])
    wait_for_event(run, Start, 2)
    tell(run)
    ended, again = seen(run, End)[0], seen(run, Start)[1]
    assert ended.reason == "interrupted"
    assert again.samples_consumed == ended.samples_consumed >= 20 * 4, "the checkpoint was made in the grace time"
    assert "Slurm takes its nodes" in seen(run, Warned)[0].message
    cluster.copus("cancel", "preempted", "--now")
    wait_for("the end of the job", lambda: cluster.run(["squeue", "--noheader"]) == "", 30)


def test_a_job_that_is_requeued_by_hand_goes_on(cluster: Cluster) -> None:
    """Slurm kills after KillWait, 5 s here: the last checkpoint may be the one before."""
    run = cluster.folder / "runs" / "requeued"
    cluster.copus(*cluster.job("requeued", 10**7, partition="main"), "--detach")
    wait_for_event(run, Checkpoint, 1)
    cluster.run(["scontrol", "requeue", job_id(run)])
    wait_for_event(run, Start, 2)
    tell(run)
    assert seen(run, Start)[1].samples_consumed > 0
    cluster.copus("cancel", "requeued", "--now")
    wait_for("the end of the job", lambda: cluster.run(["squeue", "--noheader"]) == "", 30)


def test_a_group_of_runs_is_queued_and_followed_to_its_end(cluster: Cluster) -> None:
    output = cluster.copus(*cluster.job("group", 3200), "--seeds", "2", "--matrix", "training.lr=1e-3")
    print(output)
    assert "(2 of 2 ended)" in output
    again = cluster.copus(*cluster.job("group", 3200), "--seeds", "2", "--matrix", "training.lr=1e-3")
    assert again.count("has ended: finished") == 2
    assert "2 of 2" in cluster.copus("runs", "--group", "group")


def test_a_job_runs_where_flock_fails(cluster: Cluster) -> None:
    """Its batch script gets the lease that the command has until the job is queued, and lets go of it in the end."""
    run, site = cluster.folder / "runs" / "leased", cluster.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_LOCKS)
    before = cluster.environment
    cluster.environment = before | {"PYTHONPATH": f"{site}:{ROOT}"}
    try:
        output = cluster.copus(*cluster.job("leased", 6400))
    finally:
        cluster.environment = before
    tell(run)
    assert "finished" in output
    newest = max(run.glob("lock.*"), key=lambda file: int(file.suffix[1:]))
    assert "Slurm job" in newest.read_text()
    wait_for("the end of the lease", lambda: holder_of(run / "lock") is None, 30)


def test_an_allocation_that_is_there_is_used(cluster: Cluster) -> None:
    """Training, measuring and calibrating on both nodes of one `salloc`, after another."""
    run = cluster.folder / "runs" / "allocated"
    _, job_file, *settings = cluster.job("allocated", 12_800)
    settings[settings.index("slurm")] = "srun"
    job = [job_file, *settings]
    said = cluster.copus("submit", *job, exit_code=2)
    assert "this command is in no Slurm allocation (SLURM_JOB_ID is not set)" in said

    def allocated(*arguments: str, exit_code: int = 0) -> str:
        return cluster.run(["salloc", "--nodes=2", sys.executable, "-m", "launch.cli", *arguments], exit_code)

    output = allocated("submit", *job)
    tell(run)
    assert "finished in" in output
    steps = [event.samples_consumed for event in seen(run, Step)]
    assert steps == list(range(4, 400 + 1, 4))
    assert [len(list((run / "logs").glob(f"slurm-*.node-{node}.log"))) for node in (0, 1)] == [1, 1]
    assert "step 100" in cluster.copus("logs", "allocated")
    few = ["profile.table=table.jsonl", "profile.budget_seconds=20", "planner.max_global_batch=4"]
    measured = allocated("profile", "run", *job, *(part for setting in few for part in ("--set", setting)))
    assert re.search(r"^[1-9]\d* measured in .*/table.jsonl$", measured, re.MULTILINE), measured
    calibrated = ["--engine", "srun", "--multiples", "1,2", "--orders", "2", "--tokens", "256"]
    assert "critical batch" in allocated("calibrate", "allocated", *calibrated)


def test_ctrl_c_in_an_allocation_is_a_checkpoint(cluster: Cluster) -> None:
    run = cluster.folder / "runs" / "stopped"
    arguments = cluster.job("stopped", 10**7)
    arguments[arguments.index("slurm")] = "srun"
    command = ["salloc", "--nodes=2", sys.executable, "-m", "launch.cli", *arguments]
    with subprocess.Popen(command, cwd=cluster.folder, env=cluster.environment, text=True) as process:
        wait_for("20 steps", lambda: len(seen(run, Step)) >= 20, 240)
        psutil.Process(process.pid).children()[0].send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 128 + signal.SIGINT
    tell(run)
    (end,) = seen(run, End)
    assert (end.reason, end.samples_consumed) == ("interrupted", seen(run, Checkpoint)[-1].samples_consumed)


def job_id(run: Path) -> str:
    return re.findall(r'"job_id": "([\d_]+)"', (run / "engine.json").read_text())[0]


def has_finished(run: Path) -> bool:
    return any(event.reason == "finished" for event in seen(run, End) if isinstance(event, End))


def test_seeds_are_an_array_of_which_each_run_is_requeued_and_cancelled_alone(cluster: Cluster) -> None:
    cluster.copus(*cluster.job("sweep", 25_600, time_limit="0:10:00"), "--seeds", "3", "--detach")
    runs = sorted((cluster.folder / "runs").glob("sweep-seed-*"))
    ids = [job_id(run) for run in runs]
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_{index}" for index in range(3)]
    assert f"Slurm job {ids[2]} was cancelled" in cluster.copus("cancel", str(runs[2]))
    wait_for_event(runs[0], Checkpoint, 1)
    cluster.run(["scontrol", "requeue", ids[0]])
    for run in runs[:2]:
        wait_for(f"the end of {run.name}", partial(has_finished, run), 240)
        tell(run)
        assert (run / "logs" / f"slurm-{ids[runs.index(run)]}.log").stat().st_size
    assert len(seen(runs[0], Restart)) == 1
    assert not seen(runs[1], Restart)
    assert not (runs[2] / "events.jsonl").exists()

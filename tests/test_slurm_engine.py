"""The Slurm engine without Slurm: programs of its names in a folder on PATH. With a real one: tests/test_slurm.py."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from launch_events import start
from launch_jobs import copus_command, copus_here, write_job

import launch.queued
import launch.submit
from copus.event_log import EventLog
from copus.events import REQUEUED, Checkpoint, End, Failure, Warned, read_events
from copus.fencing import TOKEN
from copus.job import JobConfig, JobError, load_job
from launch.engines import Ticket, engine_of, engine_state, slurm_job, slurm_node
from launch.engines.requeues import REQUEUE, count_attempt
from launch.engines.slurm import SlurmEngine
from launch.engines.slurm_allocation import kill_step, step_name
from launch.engines.slurm_commands import QueueEntry
from launch.engines.slurm_job import Attempt
from launch.engines.slurm_options import SlurmOptions, StepOptions
from launch.engines.slurm_step import without_own_packages
from launch.run_directory import request_pause, request_stop
from launch.run_directory import write_job as rewrite_job

FAKE = """#!/bin/sh
echo "$(basename $0) $*" >> {folder}/asked
cat {folder}/$(basename $0).says
exit $(cat {folder}/$(basename $0).exits)
"""
Says = Callable[..., None]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Slurm's programs, that say what one tells them to. What they were asked is in the file `asked`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def says(program: str, text: str, code: int = 0) -> None:
        (folder / f"{program}.says").write_text(text)
        (folder / f"{program}.exits").write_text(str(code))

    for program in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
        (folder / program).write_text(FAKE.format(folder=folder))
        (folder / program).chmod(0o755)
        says(program, "")
    says("sbatch", "12;main\n")
    says("squeue", "PENDING|Priority|\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return says


def asked(folder: Path) -> list[str]:
    path = folder / "bin" / "asked"
    return path.read_text().splitlines() if path.exists() else []


def job_file(folder: Path, **options: Any) -> Path:
    return write_job(folder, launch={"engine": "slurm", "options": options})


def queued(folder: Path, **options: Any) -> Path:
    """A run that was queued."""
    job_file(folder, **options)
    assert copus_here("submit", "job.yaml", "--detach") == 0
    return folder / "runs" / "small"


def complaint(folder: Path, **options: Any) -> str:
    job_file(folder)
    with pytest.raises(JobError) as caught:
        load_job(folder / "job.yaml", [f"launch.options={json.dumps(options)}"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_script_is_what_the_job_file_says(tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]) -> None:
    options = {
        "partition": "long",
        "time_limit": "1-00:00:00",
        "checkpoint_seconds": 300,
        "sbatch": {"comment": "two; words", "exclusive": True, "mem": 0, "contiguous": False},
        "interface": "ib0",
    }
    path = job_file(tmp_path, **options)
    more = [
        "--set",
        "cluster={nodes: 2, accelerators_per_node: 8, accelerator: h100}",
        "--set",
        "training.layout={dp: 16}",
    ]
    more += ["--set", "training={global_batch: 16, tokens: 12800, layout: {dp: 16}}"]
    before = sorted(tmp_path.rglob("*"))
    assert copus_here("submit", str(path), "--dry-run", *more) == 0
    script = capfd.readouterr().out
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "asked") == before
    assert asked(tmp_path) == ["sinfo --noheader --exact --format=%P|%c|%G --partition=long"]
    directives = re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)
    assert directives == [
        "--job-name=copus-small",
        f"--chdir={tmp_path}/runs/small",
        f"--output={tmp_path}/runs/small/logs/slurm-%j.log",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gres=gpu:8",
        "--partition=long",
        "--time=1-00:00:00",
        '--comment="two; words"',
        "--exclusive",
        "--mem=0",
        "--requeue",
        "--signal=B:USR1@300",
        "--open-mode=append",
    ]
    assert "export NCCL_SOCKET_IFNAME=ib0" in script
    assert "export GLOO_SOCKET_IFNAME=ib0" in script
    assert "GLOO_SOCKET_IFNAME:-lo" not in script  # several nodes do not meet on the loopback interface


GPUS = ["cluster={accelerators_per_node: 2, accelerator: h100}", "training.layout={dp: 2}", "training.global_batch=4"]


SINFO = """debug|16|(null)
main*|128|gpu:h100:8(S:0-1),nvme:1
main*|96|gpu:h100:4,gpu:a100:4
other|256|gpu:2
"""


@pytest.mark.parametrize(
    ("sinfo", "options", "settings", "cpus"),
    [
        (SINFO, {}, [], 2 * 12),
        (SINFO.splitlines()[3], {"partition": "other"}, [], 2 * 128),
        (SINFO.splitlines()[0], {"partition": "debug"}, [], 2 * 8),
        (SINFO, {}, ["launch.threads_per_rank=16"], 2 * 16),
        (SINFO, {"cpus_per_node": 5}, [], 5),
        (None, {}, [], 2 * 8),
    ],
)
def test_cpus_are_asked_for_by_the_gpus_share_of_their_node(
    tmp_path: Path, slurm: Says, sinfo: str | None, options: dict[str, Any], settings: list[str], cpus: int
) -> None:
    slurm("sinfo", sinfo or "sinfo: error: no answer", int(sinfo is None))
    job = load_job(job_file(tmp_path, **options), [*GPUS, *settings])
    assert f"#SBATCH --cpus-per-task={cpus}\n" in engine_of(job).describe(tmp_path / "small", job)
    place = [f" --partition={options['partition']}"] if "partition" in options else [""]
    question = [] if "cpus_per_node" in options else [f"sinfo --noheader --exact --format=%P|%c|%G{place[0]}"]
    assert asked(tmp_path) == question


@pytest.mark.parametrize(("allocated", "cpus"), [("128(x2)", 128), ("128(x2),96", 96), ("", 2)])
def test_a_step_takes_all_the_cpus_that_its_job_has_on_a_node(
    tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch, allocated: str, cpus: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", allocated)
    assert f"--cpus-per-task={cpus}" in attempt(node, node / "job.yaml")._srun()


@pytest.mark.parametrize(
    ("options", "directives"),
    [
        ({}, ["--gres=gpu:2"]),
        ({"gres": "gpu:h100:2"}, ["--gres=gpu:h100:2"]),
        ({"gpus": "gpus-per-node"}, ["--gpus-per-node=2"]),
        ({"gpus": "none", "memory": 0}, ["--mem=0"]),
    ],
)
def test_gpus_and_memory_are_asked_for_as_the_site_wants_it(
    tmp_path: Path, options: dict[str, Any], directives: list[str]
) -> None:
    job = load_job(job_file(tmp_path, **options), GPUS)
    asked = re.findall(r"^#SBATCH (--(?:gres|gpus|mem).*)$", engine_of(job).describe(tmp_path / "small", job), re.M)
    assert asked == directives


def test_the_environment_and_the_interfaces_are_those_of_the_job_file(tmp_path: Path) -> None:
    options = {"env": {"NCCL_DEBUG": "it's INFO"}, "interface": "eno1", "nccl_interface": "^docker0,lo"}
    job = load_job(job_file(tmp_path, **options))
    script = engine_of(job).describe(tmp_path / "small", job).splitlines()
    assert "export NCCL_DEBUG='it'\"'\"'s INFO'" in script
    assert "export GLOO_SOCKET_IFNAME=eno1" in script
    assert "export NCCL_SOCKET_IFNAME='^docker0,lo'" in script


def test_another_interpreter_is_given_no_packages_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job_file(tmp_path)

    def path_in_script(folder: str, **options: Any) -> str:
        monkeypatch.setattr("launch.engines.slurm.module_root", lambda: Path(folder))
        job = load_job(path, [f"launch.options={json.dumps(options)}"])
        script = engine_of(job).describe(tmp_path / "small", job)
        return next(line for line in script.splitlines() if " PYTHONPATH=" in line)

    assert "site-packages" in path_in_script("/v/lib/python3.11/site-packages")
    assert "site-packages" not in path_in_script("/v/lib/python3.11/site-packages", python="/opt/python3.12")
    assert "/home/me/copus" in path_in_script("/home/me/copus", python="/opt/python3.12")


@pytest.mark.parametrize(
    ("has_users", "options", "lines"),
    [
        (True, {}, []),
        (False, {}, ["export PYTHONNOUSERSITE=1"]),
        (True, {"python": "/opt/python3.12"}, ["export PYTHONNOUSERSITE=1"]),
        (True, {"python": "/opt/python3.12", "env": {"PYTHONNOUSERSITE": ""}}, ["export PYTHONNOUSERSITE=''"]),
    ],
)
def test_packages_in_the_users_home_are_for_the_interpreter_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_users: bool, options: dict[str, Any], lines: list[str]
) -> None:
    monkeypatch.setattr("site.ENABLE_USER_SITE", has_users)
    job = load_job(job_file(tmp_path, **options))
    script = engine_of(job).describe(tmp_path / "small", job).splitlines()
    assert [line for line in script if "PYTHONNOUSERSITE" in line] == lines


def test_nothing_of_the_job_file_is_run_by_the_shell(tmp_path: Path) -> None:
    """Run the batch script, with a Python of an awkward name that prints what it gets."""
    folder = tmp_path / "a & b; touch c"
    folder.mkdir()
    python = folder / "it's $(touch d) `touch e`"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$OMP_NUM_THREADS" "$SET_UP"\n')
    python.chmod(0o755)
    path = job_file(folder, python=str(python), setup=["export SET_UP='by the user'"])
    job = load_job(path, [f"launch.runs={json.dumps(str(folder))}"])
    script = engine_of(job).describe(folder / "small", job)
    assert f'#SBATCH --chdir="{folder}/small"' in script
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["-m", "launch.engines.slurm_job", str(folder / "small"), "1", "by the user"]
    assert sorted(tmp_path.rglob("*")) == before


def test_every_option_has_an_example_in_the_documentation_that_is_taken(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "slurm.md").read_text()
    has_example = set()
    for names, examples in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`[^|]+`(?:, )?)+) \|", page, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            for example in re.findall(r"`([^`]+)`", examples):
                engine_of(load_job(job_file(tmp_path), [f"launch.options.{name}={example}"]))
                (tmp_path / "job.yaml").unlink()
                shutil.rmtree(tmp_path / "cache")
            has_example.add(name)
    assert has_example == set(SlurmOptions.model_fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitoin": "main"}, "launch.options: partitoin: unknown key"),
        ({"partition": "main --wrap=id"}, "launch.options: partition: string should match pattern"),
        ({"partition": "$(id)"}, "launch.options: partition: string should match pattern"),
        ({"account": "a\nb"}, "launch.options: account: string should match pattern"),
        ({"time_limit": 14400}, "launch.options: time_limit: 14400 is a number: put it in quotes"),
        ({"time_limit": "soon"}, "launch.options: time_limit: string should match pattern"),
        ({"max_requeues": "3"}, "launch.options: max_requeues: input should be a valid integer, got '3'"),
        ({"sbatch": {"output": "x"}}, "launch.options: sbatch: output is set by COPUS or by a field of its own"),
        (
            {"sbatch": {"clusters": "b"}},
            "clusters: jobs are queued, watched and cancelled on this machine's own",
        ),
        ({"sbatch": {"comment": 'a" --wrap="id'}}, "launch.options: sbatch: sbatch.comment"),
        ({"sbatch": {"comment": "a\n#SBATCH --wrap=id"}}, "launch.options: sbatch: sbatch.comment"),
        ({"sbatch": {"Mem ": "1"}}, "launch.options: sbatch: 'Mem ' is no long option of sbatch"),
        ({"sbatch": {"gpus-per-node": 8}}, "gpus-per-node is set by COPUS or by a field of its own"),
        ({"sbatch": {"mem": 0}, "memory": "64G"}, "memory(64G) and sbatch.mem(0) ask for the same"),
        ({"gres": "gpu:8", "gpus": "none"}, "gres(gpu:8) and gpus(none) ask for the same"),
        ({"srun": {"nodes": 3}}, "launch.options: srun: nodes is set by COPUS or by a field of its own"),
        ({"srun": {"-N": 3}}, "launch.options: srun: '-N' is no long option of srun"),
        ({"env": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY looks like a secret: set it in the shell that submits"),
        ({"env": {"OMP_NUM_THREADS": "8"}}, "OMP_NUM_THREADS would be overridden: set launch.threads_per_rank"),
        (
            {"interface": "ib0", "env": {"NCCL_SOCKET_IFNAME": "ib1"}},
            "interface(ib0) and env.NCCL_SOCKET_IFNAME(ib1) ask for the same",
        ),
        ({"nccl_interface": "ib0; id"}, "launch.options: nccl_interface: string should match pattern"),
        ({"python": "venv/bin/python"}, "launch.options: python: 'venv/bin/python' is neither an absolute path nor"),
        ({"container_python": "bin/python"}, "container_python: 'bin/python' is neither an absolute path nor a name"),
        ({"python": "a\nb"}, "launch.options: python: a line with control characters"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in complaint(tmp_path, **options)


@pytest.mark.parametrize("folder", ['a"b', "a$(id)b", "a%jb", "a'b", "a\nb"])
def test_folders_that_slurm_cannot_be_told_are_refused(tmp_path: Path, folder: str, slurm: Says) -> None:
    path = job_file(tmp_path)
    job = load_job(path, [f"launch.runs={json.dumps(str(tmp_path / folder))}"])
    with pytest.raises(JobError, match=r"launch.runs.* cannot stand in an option of sbatch"):
        engine_of(job)


def test_submit_writes_the_id_down_and_resume_waits_for_the_end(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(tmp_path)
    ticket = json.loads((run / "engine.json").read_text())
    assert (ticket["engine"], ticket["job_id"]) == ("slurm", "12")
    assert asked(tmp_path)[0] == f"sbatch --parsable {run}/slurm.sh"
    said = capfd.readouterr().out
    assert "Slurm job 12 waits: Priority; it keeps running without this command" in said
    assert "copus cancel runs/small" in said

    assert copus_here("submit", "--resume", "small", "--detach") == 2
    assert "runs/small: Slurm job 12 waits: Priority; `copus cancel runs/small` stops it" in capfd.readouterr().err
    slurm("squeue", "", 1)
    assert copus_here("submit", "--resume", "small", "--engine", "local") == 2  # nobody can say
    slurm("squeue", "slurm_load_jobs error: Invalid job id specified\n", 1)
    slurm("sbatch", "13\n")
    assert copus_here("submit", "--resume", "small", "--detach") == 0
    assert json.loads((run / "engine.json").read_text())["job_id"] == "13"


def test_the_queue_that_the_job_is_in_is_asked_whatever_the_job_file_says(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(tmp_path)
    rewrite_job(run, load_job(run / "job.yaml", engine="local"))
    capfd.readouterr()
    assert copus_here("submit", "--resume", "small") == 2
    assert "runs/small: Slurm job 12 waits: Priority" in capfd.readouterr().err


def test_a_resume_whose_data_cannot_be_prepared_changes_nothing(
    tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queued(tmp_path)
    slurm("squeue", "")
    before = (run / "job.yaml").read_text()
    monkeypatch.setattr(launch.submit, "prepare", lambda job, *arguments: (2, job))
    assert copus_here("submit", "--resume", "small", "--engine", "local") == 2
    assert (run / "job.yaml").read_text() == before


def test_what_sbatch_refuses_leaves_nothing(tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]) -> None:
    job_file(tmp_path)
    slurm(
        "sbatch", "sbatch: error: invalid partition specified: nowhere\nsbatch: error: Batch job submission failed\n", 1
    )
    assert copus_here("submit", "job.yaml") == 2
    errors = capfd.readouterr().err
    assert errors.startswith("copus: sbatch: error: invalid partition specified")
    assert errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_nodes_with_fewer_cpus_are_answered_with_the_option_that_says_how_many(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    job_file(tmp_path)
    slurm("sbatch", "sbatch: error: CPU count per node can not be satisfied\n", 1)
    assert copus_here("submit", "job.yaml") == 2
    assert "; launch.options.cpus_per_node(2) may be more than a node has: set it" in capfd.readouterr().err


def test_the_options_of_the_shell_do_not_outrank_the_job_file(
    tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether set by the user, or by the allocation or the job that copus is called from."""
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho 12\n")
    options = {"SBATCH_PARTITION": "debug", "SBATCH_NO_REQUEUE": "1", "SLURM_MEM_PER_CPU": "1", "SLURM_JOB_ID": "7"}
    others = {"SQUEUE_STATES": "RUNNING", "SLURM_EXPORT_ENV": "NONE", "MASTER_PORT": "29500", REQUEUED: "1"}
    kept = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_JWT": "secret", "MY_DATA": "/data"}
    for name, value in (options | others | kept).items():
        monkeypatch.setenv(name, value)
    job_file(tmp_path)
    assert copus_here("submit", "job.yaml", "--detach") == 0
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    assert {name for name in options | others if name in seen} == set()
    assert {name: seen[name] for name in kept} == kept
    said = capfd.readouterr().err
    assert "copus: warning: SBATCH_NO_REQUEUE, SBATCH_PARTITION: not used; what the job needs stands in launch" in said


def test_the_machine_that_submits_is_not_measured(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    job_file(tmp_path)
    alone = ["--set", "profile.profiler=single", "--set", "planner.policy=goodput"]
    assert copus_here("submit", "job.yaml", "--detach", *alone) == 2
    said = capfd.readouterr().err
    assert "launch.engine(slurm) trains on others: run `copus profile run` on one of those" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert copus_here("submit", "job.yaml", "--detach", *alone, "--set", "profile.when=never") == 0


def test_a_machine_without_slurm(tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    run = queued(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    state = engine_state(run)
    assert (state.phase, state.words) == ("unknown", "launch.engine(slurm): squeue is not on the PATH of this machine")
    assert copus_here("submit", "job.yaml", "--dry-run") == 0
    assert copus_here("submit", "job.yaml") == 2
    assert not (tmp_path / "runs" / "small-2").exists()


@pytest.mark.parametrize(
    ("squeue", "phase", "words"),
    [
        ("PENDING|None|\n", "queued", "Slurm job 12 waits"),
        ("PENDING|BeginTime|\n", "queued", "Slurm job 12 waits: BeginTime"),
        ("RUNNING|None|n[1-2]\n", "running", "Slurm job 12 runs on n[1-2]"),
        ("COMPLETING|None|n1\n", "running", "Slurm job 12 is ending on n1"),
        ("TIMEOUT|TimeLimit|n1\n", "ended", "Slurm job 12 has ended: TIMEOUT"),
        ("", "ended", "Slurm job 12 has ended"),
    ],
)
def test_states(tmp_path: Path, slurm: Says, squeue: str, phase: str, words: str) -> None:
    run = queued(tmp_path)
    slurm("squeue", squeue)
    state = engine_state(run)
    assert (state.phase, state.words) == (phase, words)


def test_cancel_asks_workers_and_takes_waiting_jobs_away(tmp_path: Path, slurm: Says) -> None:
    run = queued(tmp_path)
    slurm("squeue", "RUNNING|None|n1\n")
    (run / "stop").write_text(REQUEUE)
    assert copus_here("cancel", "small") == 0
    assert (run / "stop").read_text() == ""  # for good, also where it was about to be requeued
    assert "scancel 12" not in asked(tmp_path)
    assert copus_here("cancel", "small", "--now") == 0
    assert "scancel 12" in asked(tmp_path)
    slurm("squeue", "")
    assert copus_here("cancel", "small") == 2


def test_a_job_is_taken_away_also_where_nothing_can_be_written(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(tmp_path)
    slurm("squeue", "RUNNING|None|n1\n")
    (run / "stop").mkdir()
    capfd.readouterr()
    assert copus_here("cancel", "small") == 2
    assert capfd.readouterr().err == f"copus: {run}/stop: Is a directory\n"
    assert "scancel 12" not in asked(tmp_path)
    assert copus_here("cancel", "small", "--now") == 0
    assert "scancel 12" in asked(tmp_path)


def test_a_watch_goes_on_while_the_controller_does_not_answer(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queued(tmp_path)
    slurm("squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    capfd.readouterr()

    def answer(seconds: float) -> None:
        slurm("squeue", "")

    monkeypatch.setattr("launch.watch.time", SimpleNamespace(**vars(time) | {"sleep": answer}))  # not everybody's
    monkeypatch.setattr("launch.watched.ASK_SECONDS", 0)
    assert copus_here("watch", "small") == 1, "the run has crashed"
    first, last = capfd.readouterr().out.splitlines()
    assert "runs/small: unknown (" in first
    assert "runs/small: crashed (its workers never began)" in last


def test_ctrl_c_leaves_the_job_alone(tmp_path: Path, slurm: Says) -> None:
    job_file(tmp_path)
    command = copus_command("submit", "job.yaml")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Slurm job 12 waits: Priority\n"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "it keeps running without this command" in output
    assert not any(line.startswith("scancel") for line in asked(tmp_path))
    assert not (tmp_path / "runs" / "small" / "stop").exists()


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("interrupted", 143), (None, 1)])
def test_following_to_the_end(
    tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], end: Any, code: int
) -> None:
    run = queued(tmp_path)
    slurm("squeue", "COMPLETED|None|n1\n")
    monkeypatch.setattr(launch.queued, "STATE_SECONDS", 0)
    log = EventLog(run)
    log.write(End(step=0, samples_consumed=0, reason="interrupted", seconds=1.0))  # of an attempt before

    def submit(engine: SlurmEngine, run: Path, job: JobConfig) -> Ticket:
        (run / "logs" / "slurm-12.log").write_text("the last words\n")
        if end:
            log.write(start())
            log.write(End(step=3, samples_consumed=12, reason=end, seconds=1.0))
        return Ticket(engine="slurm", job_id="12", submitted=0.0)

    monkeypatch.setattr(SlurmEngine, "submit", submit)
    assert copus_here("submit", "--resume", "small") == code
    output, errors = capfd.readouterr()
    assert ("finished in" in output) == (end == "finished")
    assert ("the last words" in errors) == (end is None)


def test_following_a_job_that_is_cancelled_at_once(
    tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(tmp_path)
    slurm("squeue", "CANCELLED|None|n1\n")
    monkeypatch.setattr(launch.queued, "STATE_SECONDS", 0)

    def submit(engine: SlurmEngine, run: Path, job: JobConfig) -> Ticket:
        request_stop(run)
        return Ticket(engine="slurm", job_id="12", submitted=0.0)

    monkeypatch.setattr(SlurmEngine, "submit", submit)
    capfd.readouterr()
    assert copus_here("submit", "--resume", str(run)) == 128 + signal.SIGTERM
    output, errors = capfd.readouterr()
    assert "ended at once: " in output
    assert errors == ""


def test_followed_logs_ask_seldom_and_survive_a_controller_that_is_slow(
    tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queued(tmp_path)
    engine = engine_of(load_job(run / "job.yaml"))
    clock = [1000.0]
    monkeypatch.setattr("launch.engines.base.time.monotonic", lambda: clock[0])
    before = len(asked(tmp_path))
    alive = engine._aliveness(run)
    slurm("squeue", "squeue: error: no answer", 1)
    assert [alive(), alive()] == [True, True]
    slurm("squeue", "COMPLETED|None|n1\n")
    assert alive()
    clock[0] += 10.0
    assert not alive()
    assert len(asked(tmp_path)) == before + 2


@pytest.fixture
def allocation(tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file for two nodes, in a shell of `salloc --nodes=3`."""
    given = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_CPUS_PER_NODE": "64(x2),16",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    slurm("scontrol", "".join(f"NodeName=n{number} Arch=x NodeAddr=10.0.0.{number} \n" for number in (1, 2, 3)))
    cluster = {"nodes": 2, "accelerators_per_node": 1}
    return write_job(tmp_path, cluster=cluster, training={"layout": {"dp": 2}}, launch={"engine": "srun"})


def test_a_job_in_an_allocation_takes_its_first_nodes(
    allocation: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert copus_here("submit", str(allocation), "--dry-run") == 0
    words = capfd.readouterr().out.split()
    assert {"srun", "--jobid=12", "--nodes=2", "--ntasks=2", "--nodelist=n1,n2", "--cpus-per-task=16"} <= set(words)
    assert words[-3:] == ["10.0.0.1:18012", "n1=10.0.0.1", "n2=10.0.0.2"]
    assert "GLOO_SOCKET_IFNAME=lo" not in words  # two nodes do not meet there
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.nodes=4", "cluster.nodes(4) is more than the 3 of Slurm job 12"),
        (
            "cluster={nodes: 2, accelerators_per_node: 4, accelerator: h100}",
            "cluster.accelerators_per_node(4) is more than the 2 GPUs on a node of job 12",
        ),
        ("launch.options.partition=main", "launch.options: partition: unknown key"),
    ],
)
def test_an_allocation_that_is_too_small_is_refused(
    allocation: Path, capfd: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    more = ["training.layout={dp: 8}", "training.global_batch=8"] if "nodes: 2" in setting else []
    more += ["training.layout={dp: 4}"] if setting == "cluster.nodes=4" else []
    assert copus_here("submit", str(allocation), *(part for each in [setting, *more] for part in ("--set", each))) == 2
    assert message in capfd.readouterr().err


def test_outside_of_an_allocation_there_is_nothing_to_run_in(
    allocation: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert copus_here("profile", "run", str(allocation)) == 2
    assert "this command is in no Slurm allocation (SLURM_JOB_ID is not set): call it from salloc" in (
        capfd.readouterr().err
    )


def test_the_step_of_a_run_is_ended_by_its_name(tmp_path: Path, slurm: Says) -> None:
    slurm("squeue", f"12.0 copus-other\n12.3 {step_name(tmp_path)}\n")
    assert kill_step(tmp_path)
    assert asked(tmp_path)[-1] == "scancel --signal=KILL 12.3"
    assert not kill_step(tmp_path / "another")


def test_measuring_in_the_queue_is_refused_with_what_does_it(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    assert copus_here("profile", "run", str(job_file(tmp_path))) == 2
    assert "cannot queue them: --engine local or hosts, or, in a Slurm allocation, srun" in capfd.readouterr().err


def attempt(run: Path, job: Path, number: int = 0) -> Attempt:
    return Attempt(run, load_job(job), "12", number, "n1")


@pytest.fixture
def node(tmp_path: Path, slurm: Says, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the first node of its job, which takes `scontrol requeue` for done."""
    monkeypatch.setattr(slurm_job, "queue_entry", lambda job_id: QueueEntry("RUNNING", "None", "n1"))
    monkeypatch.setattr(slurm_job, "ENDING_SECONDS", 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    run = queued(tmp_path, max_requeues=1)
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def conclude(run: Path, code: int, number: int = 0, *, signalled: bool = False) -> str:
    """Let an attempt end. The last event's message, where there is a warning."""
    one = attempt(run, run / "job.yaml", number)
    counted = count_attempt(run, "12", number, one._checkpoint_samples())
    if signalled:
        os.kill(os.getpid(), signal.SIGUSR1)
    one._conclude(code, counted)
    warnings = [event.message for event in read_events(run) if isinstance(event, Warned)]
    return warnings[-1] if warnings else ""


def requeues(folder: Path) -> int:
    return asked(folder).count("scontrol requeue 12")


def test_the_agents_are_started_with_the_options_and_the_wrapper_of_the_job_file(tmp_path: Path, node: Path) -> None:
    job = yaml.safe_load((node / "job.yaml").read_text())
    job["launch"]["options"] |= {"srun": {"container-image": "a.sqsh", "no-container-remap-root": True}}
    job["launch"]["options"] |= {"wrapper": ["nsys", "profile"], "container_python": "python3"}
    (node / "job.yaml").write_text(yaml.safe_dump(job))
    words = attempt(node, node / "job.yaml", 0)._srun()
    start = words.index("nsys")
    assert words[0] == "srun"
    assert words[start - 2 : start + 4] == [
        *("--container-image=a.sqsh", "--no-container-remap-root", "nsys", "profile", "python3", "-m"),
    ]


def test_a_container_gets_no_packages_of_the_machine_that_starts_it(tmp_path: Path) -> None:
    shell = {"PYTHONPATH": "/v/lib/python3.11/site-packages", "NCCL_DEBUG": "INFO"}
    assert without_own_packages(shell, StepOptions()) == shell
    options = StepOptions(container_python="python3")
    assert without_own_packages(shell, options) == {"NCCL_DEBUG": "INFO", "PYTHONNOUSERSITE": "1"}
    options = StepOptions(container_python="python3", env={"PYTHONPATH": "/opt/mine"})
    assert without_own_packages(shell, options)["PYTHONPATH"] == "/opt/mine"


def test_a_signal_asks_for_a_checkpoint_and_then_a_requeue(tmp_path: Path, node: Path) -> None:
    said = conclude(node, 0, signalled=True)
    assert (node / "stop").read_text() == REQUEUE
    assert "its time limit is near (requeue 1" in said
    assert requeues(tmp_path) == 1


def test_a_controller_that_is_slow_does_not_end_the_job(
    tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question fails once: where the job stands, and the requeue."""
    silent = {"squeue", "scontrol"}

    def answers(program: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def once_silent(*arguments: str) -> Any:
            if program in silent:
                silent.remove(program)
                raise JobError(f"{program} did not answer in 10 s")
            return ask(*arguments)

        return once_silent

    monkeypatch.setattr(slurm_job, "RETRY_SECONDS", 0)
    monkeypatch.setattr(slurm_job, "queue_entry", answers("squeue", slurm_job.queue_entry))
    monkeypatch.setattr(slurm_job, "slurm", answers("scontrol", slurm_job.slurm))
    conclude(node, 1)
    assert not silent
    assert requeues(tmp_path) == 1


def test_a_request_that_cannot_be_written_is_not_the_users(tmp_path: Path) -> None:
    """On a full disk a file can be made and not be written; here no file may grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            request_pause(tmp_path, REQUEUE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("session", "requeued"), [("12-0", False), ("12-1", True)])
def test_a_node_that_is_alone_meets_on_the_loopback_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: str, requeued: bool
) -> None:
    started: list[Any] = []

    def start(command: list[str], environment: dict[str, str]) -> SimpleNamespace:
        started.extend([command, environment])
        return SimpleNamespace(wait=lambda: -9)

    monkeypatch.setattr(slurm_node, "start_agent", start)
    monkeypatch.setattr(slurm_node, "pause_on_sigterm", lambda run, mark: None)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    job_file(tmp_path)
    assert slurm_node.main([str(tmp_path), session, "127.0.0.1:0", "n1=127.0.0.1"]) == 128 + signal.SIGKILL
    command, environment = started
    assert "--rdzv-backend bound --rdzv-endpoint 127.0.0.1:0" in " ".join(command)
    assert "--local-addr 127.0.0.1" in " ".join(command)
    assert (REQUEUED in environment) == requeued
    assert environment[TOKEN] == session, "ranks of an attempt that was given up write nothing"


def test_nodes_connect_by_the_interface_that_leads_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Slurm calls them: the host name of this one may resolve to an address that nobody else reaches."""
    started: list[Any] = []
    agent = SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(slurm_node, "start_agent", lambda *arguments: started.extend(arguments) or agent)
    monkeypatch.setattr(slurm_node, "pause_on_sigterm", lambda run, mark: None)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    write_job(tmp_path, cluster={"nodes": 2, "accelerators_per_node": 1}, launch={"engine": "slurm"})
    assert slurm_node.main([str(tmp_path), "12-0", "127.0.0.1:18012", "n1=nowhere.invalid", "n2=127.0.0.1"]) == 0
    command, environment = started
    assert "is_host=1" in " ".join(command)
    assert "--rdzv-backend bound --rdzv-endpoint 127.0.0.1:18012" in " ".join(command)
    assert "--local-addr 127.0.0.1" in " ".join(command)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", socket.if_nameindex()[-1][1])
    slurm_node.main([str(tmp_path), "12-0", "127.0.0.1:18012", "n1=nowhere.invalid", "n2=127.0.0.1"])
    assert started[-1]["GLOO_SOCKET_IFNAME"] == socket.if_nameindex()[-1][1], "what the user chose stays"


def test_nodes_that_slurm_preempts_are_asked_for_a_checkpoint_without_the_batch_script(
    tmp_path: Path, node: Path
) -> None:
    """Slurm sends SIGTERM to the processes of the steps; a node has asked, and the script was not told."""
    (node / "stop").write_text(REQUEUE)
    assert "Slurm takes its nodes (requeue 1" in conclude(node, 0)
    assert requeues(tmp_path) == 1


AGENT = """
import os, signal, subprocess, sys, time
print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getppid(), signal.SIGTERM)
while not os.path.exists(sys.argv[1] + "/stop"):
    time.sleep(0.01)
print("asked", flush=True)
"""


def test_a_signal_to_all_processes_of_a_node_reaches_the_workers_and_ends_no_agent(tmp_path: Path) -> None:
    node = f"""
import subprocess, sys
from pathlib import Path
from launch.engines.node_agent import pause_on_sigterm, start_agent
pause_on_sigterm(Path({str(tmp_path)!r}), "requeue\\n")
sys.exit(start_agent([sys.executable, "-c", {AGENT!r}, {str(tmp_path)!r}], {{}}).wait())
"""
    done = subprocess.run([sys.executable, "-c", node], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\nasked\n"), done.stderr
    assert (tmp_path / "stop").read_text() == REQUEUE


def test_an_error_that_the_user_has_to_fix_is_no_requeue(tmp_path: Path, node: Path) -> None:
    log = EventLog(node)
    log.write(Failure(step=0, samples_consumed=0, rank=1, message="a connection was lost"))
    log.write(Failure(step=0, samples_consumed=0, rank=0, message="data.cache: no room", user_error=True))
    assert conclude(node, 1) == ""
    assert requeues(tmp_path) == 0


def test_an_interface_that_a_node_does_not_have_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    job_file(tmp_path)
    monkeypatch.setattr(slurm_node, "pause_on_sigterm", lambda run, mark: None)
    assert slurm_node.main([str(tmp_path), "12-0", "127.0.0.1:0", "n1=127.0.0.1"]) == 2
    (event,) = read_events(tmp_path)
    assert isinstance(event, Failure)
    assert event.user_error
    assert event.message.startswith("node n1: GLOO_SOCKET_IFNAME(eth99): this machine has no network interface eth99")


def test_the_users_stop_is_no_requeue(tmp_path: Path, node: Path) -> None:
    (node / "stop").touch()
    assert conclude(node, 0, signalled=True) == ""
    assert (node / "stop").read_text() == ""
    assert requeues(tmp_path) == 0


def test_a_finished_job_is_not_requeued_and_a_failed_one_a_limited_number_of_times(tmp_path: Path, node: Path) -> None:
    assert "its workers failed (srun: 1) (requeue 1, 1 of 1 without a new checkpoint)" in conclude(node, 1)
    assert "fails: 1 requeues without a new checkpoint" in conclude(node, 1, 1)
    assert requeues(tmp_path) == 1

    log = EventLog(node)
    log.write(Checkpoint(step=3, samples_consumed=12, path="checkpoints/samples-12", seconds=0.1, bytes=1))
    assert "(requeue 3, 1 of 1" in conclude(node, 1, 2)  # the attempt before left a checkpoint: the count begins anew
    log.write(End(step=9, samples_consumed=36, reason="finished", seconds=1.0))
    conclude(node, 0, 3)
    assert requeues(tmp_path) == 2


def test_requeues_by_slurm_itself_are_counted_too(tmp_path: Path) -> None:
    """A node dies: the attempt on it writes nothing down, and Slurm asks nobody."""
    assert [count_attempt(tmp_path, "12", number, 5).fruitless for number in (0, 1, 2, 4)] == [0, 1, 2, 4]
    assert count_attempt(tmp_path, "12", 5, 6).fruitless == 0
    assert count_attempt(tmp_path, "12", 6, 6).fruitless == 1
    assert count_attempt(tmp_path, "13", 0, 6).fruitless == 0


def test_a_job_that_the_run_does_not_belong_to_leaves_it_alone(
    node: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert slurm_job.main([str(node)]) == 1
    assert "does not belong to Slurm job 11" in capfd.readouterr().err
    assert not (node / "requeues.json").exists()


def test_logs_of_the_last_job_in_order_and_of_one_rank(
    tmp_path: Path, slurm: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(tmp_path)
    for name in ("11", "12", "12-0.node-0", "12-10.node-0", "12-2.node-0"):
        (run / "logs" / f"slurm-{name}.log").write_text(f"of {name}\n[rank0]:hello from {name}\n")
    capfd.readouterr()
    assert copus_here("logs", "small") == 0
    shown = re.findall(r"==> slurm-(\S+)\.log <==", capfd.readouterr().out)
    assert shown == ["12", "12-0.node-0", "12-2.node-0", "12-10.node-0"]
    assert copus_here("logs", "small", "--rank", "0") == 0
    assert capfd.readouterr().out.splitlines()[:2] == ["hello from 12", "hello from 12-0.node-0"]
    assert copus_here("logs", "small", "--rank", "1") == 0
    assert capfd.readouterr().out == ""
    assert copus_here("logs", "small", "--rank", "7") == 2
    assert "has ranks 0 to 1" in capfd.readouterr().err

"""The Kubernetes engine: its manifest by the models of Kubeflow's API, its requests to a server that stands for a
cluster, and what a pod does when it is evicted. No real cluster was ever asked."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubernetes_api import FakeCluster, fake_cluster
from launch_events import start, step
from launch_jobs import WORKER, copus_here, write_job
from test_end_to_end import _write_job as write_tiny_job

import launch.queued
from copus.event_log import EventLog
from copus.events import REQUEUED, End, Failure, Start, Step, read_events
from copus.fencing import FILE, TOKEN
from copus.job import load_job
from launch.engines import engine_state
from launch.engines import kubernetes_node as node
from launch.engines.agent import agent_environment
from launch.engines.kubernetes_manifest import job_name
from launch.engines.kubernetes_options import KubernetesOptions
from launch.engines.node_agent import start_agent
from launch.engines.requeues import AGAIN, HOPELESS
from launch.engines.ticket import Ticket, read_ticket, write_ticket
from launch.process import kill_family
from launch.run_directory import create_run, lock_run

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shakespeare.yaml"


def on_volume(folder: Path, **options: object) -> list[str]:
    """What `copus submit` needs for a cluster whose volume is mounted at this folder."""
    given = {"image": "registry.example/copus:1", "claim": "copus-runs", "mount": str(folder), **options}
    settings = {
        "data.cache": folder / "cache",
        "launch.runs": folder / "runs",
        "profile.table": folder / "table.jsonl",
        "launch.options": json.dumps(given),
    }
    return [
        "--engine",
        "kubernetes",
        *(part for each in settings.items() for part in ("--set", "=".join(map(str, each)))),
    ]


def manifests(folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str, **options: object) -> list[dict]:
    """What a dry run prints: the TrainJob, after its runtime where it has one of its own."""
    code = copus_here("submit", *(arguments or [str(EXAMPLE)]), *on_volume(folder, **options), "--dry-run")
    output, errors = capfd.readouterr()
    assert code == 0, errors
    return list(yaml.safe_load_all(output))


def manifest(folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str, **options: object) -> dict:
    return manifests(folder, capfd, *arguments, **options)[-1]


def test_the_manifest_is_one_that_kubeflow_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    found = manifest(
        tmp_path,
        capfd,
        namespace="research",
        resources={"memory": "64Gi"},
        env={"NCCL_DEBUG": "INFO"},
        secrets={"WANDB_API_KEY": "wandb/key"},
        service_account="trainer",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists", "tolerationSeconds": 60}],
        image_pull_secrets=["registry"],
        grace_seconds=300,
        labels={"kueue.x-k8s.io/queue-name": "research"},
        annotations={"example.com/cost-centre": "7 b"},
        volumes={"corpora": "/corpora"},
        capabilities=["IPC_LOCK"],
    )
    model = TrainerV1alpha1TrainJob.from_dict(found)
    assert model is not None
    assert model.to_dict() == found  # nothing is there that the models do not know
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert found["metadata"]["namespace"] == "research"
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 2)
    assert [*trainer["command"], *trainer["args"]] == [
        *("python3", "-m", "launch.engines.kubernetes_node", str(tmp_path / "runs" / "shakespeare"))
    ]
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "2", "memory": "64Gi"}
    environment = {each["name"]: each for each in trainer["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]["value"] == "1"
    assert environment["COPUS_JOB"]["value"] == found["metadata"]["name"]
    assert environment["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "key"}
    (patch,) = found["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "copus-runs"
    assert pod["volumes"][1] == {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    assert pod["volumes"][2]["persistentVolumeClaim"] == {"claimName": "corpora", "readOnly": True}
    (container,) = pod["containers"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [str(tmp_path), "/dev/shm", "/corpora"]
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    labels = {"kueue.x-k8s.io/queue-name": "research"}
    assert found["metadata"]["labels"] == labels | {"app.kubernetes.io/managed-by": "copus"}
    metadata = job["template"]["spec"]["template"]["metadata"]
    assert metadata == {"labels": labels, "annotations": {"example.com/cost-centre": "7 b"}}
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("trainer", {"pool": "gpu"})
    assert not (tmp_path / "runs").exists()


def test_a_job_without_a_runtime_has_one_in_which_evictions_are_no_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

    options = {"priority_class": "high", "host_network": True, "topology_key": "topology.kubernetes.io/rack"}
    runtime, job = manifests(tmp_path, capfd, **options)
    model = TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert model is not None
    assert model.to_dict() == runtime
    name = job["metadata"]["name"]
    assert (runtime["kind"], runtime["metadata"]["name"]) == ("TrainingRuntime", name)
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    assert job["spec"]["runtimeRef"] == reference
    (step,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert step["name"] == "node"
    assert step["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = step["template"]["spec"]
    actions = [
        (rule["action"], rule.get("onExitCodes", {}).get("values") or rule["onPodConditions"][0]["type"])
        for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert actions == [("FailJob", [HOPELESS]), ("Ignore", [AGAIN]), ("Ignore", "DisruptionTarget")]
    pod = spec["template"]["spec"]
    assert (pod["restartPolicy"], pod["priorityClassName"]) == ("Never", "high")
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    (patched,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    affinity = patched["template"]["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    assert affinity["requiredDuringSchedulingIgnoredDuringExecution"] == [
        {
            "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
            "topologyKey": "topology.kubernetes.io/rack",
        }
    ]


def test_a_runtime_of_the_cluster_is_taken_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = manifests(tmp_path, capfd, runtime="torch-distributed")
    assert job["spec"]["runtimeRef"]["kind"] == "ClusterTrainingRuntime"
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"


def test_gpus_are_asked_for_by_the_nodes_of_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cluster = ["--set", "cluster={nodes: 2, accelerators_per_node: 4, accelerator: h100-sxm}"]
    layout = ["--set", "training.layout={tp: 2, dp: 4}", "--set", "training.global_batch=8"]
    trainer = manifest(tmp_path, capfd, str(EXAMPLE), *cluster, *layout)["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "32", "nvidia.com/gpu": "4"}


def test_nothing_of_the_environment_is_in_a_manifest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert "canary" not in json.dumps(manifest(tmp_path, capfd))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": None}, "launch.options: image: "),
        ({"image": "a; rm -rf /"}, "launch.options: image: "),
        ({"claim": "$(id)"}, "launch.options: claim: "),
        ({"mount": "/"}, "launch.options: mount: "),
        ({"mount": "/elsewhere"}, "is not below launch.options.mount(/elsewhere)"),
        ({"namespace": "a/b"}, "launch.options: namespace: "),
        ({"env": {"HF_TOKEN": "abc"}}, "launch.options: env: HF_TOKEN looks like a secret"),
        ({"env": {"OMP_NUM_THREADS": "8"}}, "OMP_NUM_THREADS would be overridden: set launch.threads_per_rank"),
        ({"env": {"PET_NNODES": "2"}}, "PET_NNODES would be overridden: what starts the workers sets it"),
        ({"secrets": {"RANK": "a/b"}}, "RANK would be overridden: what starts the workers sets it"),
        ({"env": {"A": "1"}, "secrets": {"A": "a/b"}}, "launch.options: secrets: A is in env too"),
        ({"secrets": {"HF_TOKEN": "abc"}}, "launch.options: secrets.HF_TOKEN: "),
        ({"tolerations": [{"kee": "gpu"}]}, "launch.options: tolerations.0.kee"),
        ({"labels": {"queue name": "a"}}, "launch.options: labels.queue name"),
        ({"volumes": {"a": "/dev/shm/"}}, "a(/dev/shm/) is the place of the shared memory already"),
        ({"volumes": {"a": "/a/../b"}}, "a(/a/../b) is no folder to mount a volume at"),
        ({"capabilities": ["ipc-lock"]}, "launch.options: capabilities.0: "),
        ({"grace_seconds": "long"}, "launch.options: grace_seconds: "),
        ({"gpu": 8}, "launch.options: gpu: unknown key"),
        ({"runtime": "r", "priority_class": "high"}, "priority_class(high): a job cannot change this in runtime(r)"),
        ({"runtime": "r", "host_network": True}, "host_network(True): a job cannot change this in runtime(r)"),
    ],
)
def test_options_that_are_wrong_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, object], words: str
) -> None:
    assert copus_here("submit", str(EXAMPLE), *on_volume(tmp_path, **options), "--dry-run") == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert words in errors
    assert list(tmp_path.iterdir()) == []


def test_every_option_has_an_example_in_the_documentation_that_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (EXAMPLE.parent.parent / "docs" / "kubernetes.md").read_text()
    block = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[0]
    options = yaml.safe_load(block)["launch"]["options"]
    assert set(options) | {"runtime"} == set(KubernetesOptions.model_fields)
    assert len(manifests(tmp_path, capfd, **options | {"mount": str(tmp_path)})) == 2


def test_a_text_outside_the_volume_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = ["--set", "data.source=/elsewhere/my.txt"]
    assert copus_here("submit", str(EXAMPLE), *on_volume(tmp_path), *text, "--dry-run") == 2
    assert "data.source.0(/elsewhere/my.txt) is not below launch.options.mount" in capfd.readouterr().err


def test_the_image_is_made_of_files_that_are_here_and_extras_that_there_are() -> None:
    root = EXAMPLE.parent.parent
    text = (root / "Dockerfile").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {package for package in copied if (root / package).is_dir()} == {
        pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    sent = set(re.findall(r"^!(.*)$", (root / ".dockerignore").read_text(), re.MULTILINE))
    assert all((root / name).exists() for name in copied)
    assert sent == set(copied)
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_names_are_names_of_hosts() -> None:
    for name in ("shakespeare", "A.Long_Name" * 9, "0", "..."):
        found = job_name(Path("/runs") / name, "0123abcd")
        assert len(f"{found}-node-0-0") <= 63
        assert found.replace("-", "").isalnum()
        assert found == found.lower()
        assert found.endswith("-0123abcd")


class TestCluster:
    """Submitting, looking, cancelling and resuming, with a server that answers as a cluster does."""

    @pytest.fixture
    def cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
        write_job(tmp_path)
        monkeypatch.chdir(tmp_path)
        with fake_cluster(tmp_path) as (server, config):
            monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
            yield server

    def submit(self, folder: Path, *arguments: str) -> int:
        return copus_here("submit", *arguments, *on_volume(folder), "--detach")

    def test_from_submission_to_the_end(
        self, tmp_path: Path, cluster: FakeCluster, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert self.submit(tmp_path, "job.yaml") == 0, capfd.readouterr().err
        run = tmp_path / "runs" / "small"
        (name,) = cluster.jobs
        assert read_ticket(run) == Ticket(
            engine="kubernetes", job_id=name, submitted=read_ticket(run).submitted, place="default"
        )
        assert engine_state(run).phase == "queued"

        job = cluster.jobs[name]
        job["status"] = {"jobsStatus": [{"name": "node", "ready": 1, "active": 1}]}
        assert engine_state(run).words == f"TrainJob {name} runs"
        assert copus_here("submit", "--resume", "small") == 2
        assert f"TrainJob {name} runs" in capfd.readouterr().err
        cluster.pods = {f"{name}-node-0-0": "[rank0]:hello\n[rank1]:world\n"}
        assert copus_here("logs", "small") == 0
        assert capfd.readouterr().out.splitlines()[-2:] == ["[rank0]:hello", "[rank1]:world"]

        assert copus_here("cancel", "small") == 0  # the workers stop by themselves
        assert (run / "stop").read_text() == ""
        assert name in cluster.jobs
        job["status"]["conditions"] = [
            {"type": "Failed", "status": "True", "reason": "F", "message": "too many restarts"}
        ]
        assert engine_state(run).words == f"TrainJob {name} has ended: too many restarts"
        assert copus_here("cancel", "small") == 2

        assert copus_here("submit", "--resume", "small", "--detach") == 0, capfd.readouterr().err
        assert not (run / "stop").exists()
        assert len(cluster.jobs) == 2
        again = read_ticket(run)
        assert again is not None
        assert again.job_id != name
        assert copus_here("cancel", "small", "--now") == 0
        assert list(cluster.jobs) == [name]
        assert engine_state(run).phase == "ended"
        kind = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs"
        assert {f"POST {kind}", f"GET {kind}/{name}", f"DELETE {kind}/{again.job_id}"} <= set(cluster.asked)
        assert list(cluster.runtimes) == [name], "a runtime goes with its job"
        (owner,) = cluster.runtimes[name]["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("TrainJob", name, f"uid-of-{name}")

    def test_a_job_is_followed_to_its_end_and_watched(
        self,
        tmp_path: Path,
        cluster: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        run = tmp_path / "runs" / "small"
        slept: list[float] = []

        def train(seconds: float) -> None:
            """What the pods do between two looks: at first they come up, then they have trained."""
            slept.append(seconds)
            (job,) = cluster.jobs.values()
            if len(slept) == 1:
                job["status"] = {"jobsStatus": [{"name": "node", "ready": 1, "active": 1}]}
            elif len(slept) == 2:
                log = EventLog(run)
                log.write(start())
                log.write(step(4))
                log.write(End(step=1, samples_consumed=4, reason="finished", seconds=1.0))
                log.close()
                job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}

        monkeypatch.setattr(launch.queued, "STATE_SECONDS", 0)
        monkeypatch.setattr(launch.queued, "time", SimpleNamespace(monotonic=time.monotonic, sleep=train))
        assert copus_here("submit", "job.yaml", *on_volume(tmp_path)) == 0
        (name,) = cluster.jobs
        lines = capfd.readouterr().out.splitlines()
        told = [line for line in lines if line.startswith("TrainJob")]
        assert told == [
            f"TrainJob {name} waits for its pods",
            f"TrainJob {name} runs",
            f"TrainJob {name} has ended: complete",
        ]
        assert any(line.startswith("finished in ") for line in lines)
        assert copus_here("watch", "small") == 0
        assert "finished" in capfd.readouterr().out

    def test_a_run_of_the_same_name_as_one_that_was_removed_is_another_job(
        self, tmp_path: Path, cluster: FakeCluster
    ) -> None:
        for number in (1, 2):
            assert self.submit(tmp_path, "job.yaml") == 0
            assert len(cluster.jobs) == number
            shutil.rmtree(tmp_path / "runs" / "small")

    def test_what_the_cluster_refuses_is_one_line_and_leaves_nothing(
        self, tmp_path: Path, cluster: FakeCluster, capfd: pytest.CaptureFixture[str]
    ) -> None:
        cluster.refusal = (403, 'trainjobs is forbidden: User "jane"\ncannot create resource')
        assert self.submit(tmp_path, "job.yaml") == 2
        said = capfd.readouterr().err
        assert 'forbidden: User "jane" cannot create resource' in said
        assert said.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        assert cluster.runtimes == {}

    def test_a_runtime_that_cannot_be_given_to_its_job_leaves_neither(
        self, tmp_path: Path, cluster: FakeCluster, capfd: pytest.CaptureFixture[str]
    ) -> None:
        cluster.patches_refused = True
        assert self.submit(tmp_path, "job.yaml") == 2
        assert "cannot patch resource" in capfd.readouterr().err
        assert (cluster.jobs, cluster.runtimes) == ({}, {})
        assert not (tmp_path / "runs").exists()

    def test_a_cluster_that_is_down_is_not_taken_for_an_end(
        self, tmp_path: Path, cluster: FakeCluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.submit(tmp_path, "job.yaml") == 0
        monkeypatch.setattr("launch.engines.kubernetes_api.SECONDS", 0.5)
        cluster.shutdown()
        cluster.server_close()
        state = engine_state(tmp_path / "runs" / "small")
        assert state.phase == "unknown"
        assert "does not answer" in state.words


OPTIONS = 'launch.options={"image": "i", "claim": "c", "mount": "/m", "max_requeues": 1}'


class TestNode:
    """A pod of one node, with a worker that only counts."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        path = write_job(tmp_path)
        monkeypatch.chdir(tmp_path)
        run = create_run(load_job(path, ["launch.runs=runs", "launch.engine=kubernetes", OPTIONS]))
        (run / "logs").mkdir()
        write_ticket(run, Ticket(engine="kubernetes", job_id="copus-small-1", submitted=0.0))
        monkeypatch.setenv("COPUS_JOB", "copus-small-1")
        handler = signal.getsignal(signal.SIGTERM)
        yield run
        signal.signal(signal.SIGTERM, handler)

    def attempt(self, run: Path, monkeypatch: pytest.MonkeyPatch, *worker: str) -> int:
        command = [sys.executable, str(WORKER), *worker, str(run)]
        monkeypatch.setattr(node.Node, "command", lambda self: command)
        return node.main([str(run)])

    def when_training(self, run: Path, do) -> None:
        """Do something once some steps are made."""

        def wait() -> None:
            while sum(isinstance(event, Step) for event in read_events(run)) < 3:
                time.sleep(0.02)
            do()

        threading.Thread(target=wait, daemon=True).start()

    def test_a_finished_run_is_a_success(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.attempt(run, monkeypatch, "--steps", "3") == 0
        assert (run / "logs" / "copus-small-1.node-0.log").exists()
        assert REQUEUED not in node.Node(run, load_job(run / "job.yaml"), "copus-small-2", 0).environment()

    def test_an_evicted_pod_leaves_a_checkpoint_and_goes_on(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.when_training(run, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert self.attempt(run, monkeypatch, "--steps", "100000") == AGAIN
        done = int((run / "checkpoints" / "done").read_text())
        assert REQUEUED in node.Node(run, load_job(run / "job.yaml"), "copus-small-1", 0).environment()
        assert self.attempt(run, monkeypatch, "--steps", str(done + 2)) == 0
        assert [event.step for event in read_events(run) if isinstance(event, Step)] == list(range(1, done + 3))
        assert [event.resumed_from for event in read_events(run) if isinstance(event, Start)] == [
            None,
            "checkpoints/done",
        ]
        assert [event.reason for event in read_events(run) if isinstance(event, End)] == ["interrupted", "finished"]

    def test_a_pod_that_is_evicted_before_it_has_begun_is_started_again(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While it waits for the launcher to write the job's name down."""
        monkeypatch.setenv("COPUS_JOB", "copus-small-2")
        evict = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        monkeypatch.setattr(node, "time", evict)
        with pytest.raises(SystemExit) as left:
            self.attempt(run, monkeypatch, "--steps", "3")
        assert left.value.code == AGAIN
        assert not (run / "stop").exists()  # nobody else is asked for anything
        assert not (run / "requeues.json").exists()

    @pytest.mark.parametrize("workers", ["none yet", "there", "gone"])
    def test_a_further_pod_asks_for_a_checkpoint_only_once_it_has_workers(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, workers: str
    ) -> None:
        """Before that the first pod may not have begun, and would take the request for one to the attempt before."""
        monkeypatch.setenv("PET_NODE_RANK", "1")
        has_workers = workers != "none yet"
        said = "[rank1]: the last step" if workers == "gone" else "here"
        sleep = f"import time; print({said!r}, flush=True); time.sleep(600)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
        agent = parent if workers == "there" else sleep
        monkeypatch.setattr(node.Node, "command", lambda self: [sys.executable, "-c", agent])
        log = run / "logs" / "copus-small-1.node-1.log"
        agents: list[subprocess.Popen[bytes]] = []

        def start(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
            agents.append(start_agent(*arguments, **keywords))
            return agents[0]

        monkeypatch.setattr(node, "start_agent", start)

        def evict() -> None:
            while not (log.exists() and log.read_text()):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            while has_workers and not (run / "stop").exists():
                time.sleep(0.02)
            kill_family(agents[0].pid)

        thread = threading.Thread(target=evict, daemon=True)
        thread.start()
        if has_workers:
            assert node.main([str(run)]) == AGAIN
            assert (run / "stop").read_text() == node.EVICTED
        else:
            with pytest.raises(SystemExit) as left:
                node.main([str(run)])
            assert left.value.code == AGAIN
            assert not (run / "stop").exists()
        thread.join()
        agents[0].wait()

    def test_the_ranks_of_every_start_have_a_token_of_their_own(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = []
        for _ in range(2):
            assert self.attempt(run, monkeypatch, "--crash-at", "1") == AGAIN
            tokens.append((run / FILE).read_text())
        assert len(set(tokens)) == 2
        job = load_job(run / "job.yaml")
        assert node.Node(run, job, "copus-small-1", 0, tokens[1]).environment()[TOKEN] == tokens[1]
        assert TOKEN not in node.Node(run, job, "copus-small-1", 1).environment(), "its ranks hear of it from the first"

    def test_an_eviction_while_a_start_is_counted_is_a_checkpoint(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = node._is_hopeless

        def evicted(*arguments: Any) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return count(*arguments)

        monkeypatch.setattr(node, "_is_hopeless", evicted)
        assert self.attempt(run, monkeypatch, "--steps", "100000") == AGAIN
        assert (run / "stop").read_text() == node.EVICTED
        assert [event.reason for event in read_events(run) if isinstance(event, End)] == ["interrupted"]

    def test_a_run_that_the_user_stops_is_not_started_again(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.when_training(run, (run / "stop").touch)
        assert self.attempt(run, monkeypatch, "--steps", "100000") == 0
        assert self.attempt(run, monkeypatch, "--steps", "100000") == 0  # a pod that comes back finds it stopped
        assert sum(isinstance(event, Start) for event in read_events(run)) == 1

    def test_workers_that_fail_are_started_again(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.attempt(run, monkeypatch, "--fail-at", "2") == AGAIN

    def test_starts_that_lead_nowhere_end_the_job(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failing = ["--crash-at", "1"]
        assert [self.attempt(run, monkeypatch, *failing) for _ in range(3)] == [AGAIN, AGAIN, HOPELESS]
        failure = [event for event in read_events(run) if isinstance(event, Failure)][-1]
        assert failure.message.startswith("TrainJob copus-small-1 fails: 1 starts again without a new checkpoint")

    def test_no_number_of_evictions_ends_the_job(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(4):
            (run / "stop").write_text(node.EVICTED)  # by a node whose pod was taken away before anything was trained
            assert self.attempt(run, monkeypatch, "--crash-at", "1") == AGAIN

    def test_an_eviction_between_them_forgives_no_failed_start(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing = ["--crash-at", "1"]
        assert [self.attempt(run, monkeypatch, *failing) for _ in range(2)] == [AGAIN, AGAIN]
        (run / "stop").write_text(node.EVICTED)
        assert [self.attempt(run, monkeypatch, *failing) for _ in range(2)] == [AGAIN, HOPELESS]

    def test_an_interface_that_a_pod_does_not_have_is_not_tried_again(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")  # from launch.options.env
        assert self.attempt(run, monkeypatch, "--steps", "3") == 0
        (event,) = read_events(run)
        assert isinstance(event, Failure)
        assert event.user_error
        assert event.message.startswith("node 0: GLOO_SOCKET_IFNAME(eth99): this machine has no network interface")

    def test_an_error_that_the_user_has_to_fix_is_not_tried_again(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.attempt(run, monkeypatch, "--user-error-at", "0") == 0
        assert self.attempt(run, monkeypatch, "--fail-at", "2") == AGAIN  # the error before is not this one's

    def test_the_run_of_another_job_is_left_alone(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(node, "SECONDS", 0.1)
        monkeypatch.setenv("COPUS_JOB", "copus-small-2")
        assert self.attempt(run, monkeypatch) == 2
        assert "does not belong to TrainJob copus-small-2" in capfd.readouterr().err
        monkeypatch.setenv("COPUS_JOB", "copus-small-1")
        with lock_run(run):
            assert self.attempt(run, monkeypatch) == 2

    def test_nodes_meet_where_the_runtime_says(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        two = ["cluster={nodes: 2, accelerators_per_node: 2, accelerator: h100-sxm}", "training.layout={tp: 2, dp: 2}"]
        environment = {"PET_MASTER_ADDR": "j-node-0-0.j", "PET_MASTER_PORT": "29500", "POD_IP": "10.1.2.3"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for rank, hosts in ((0, "is_host=1"), (1, "is_host=0")):
            said = " ".join(node.Node(run, load_job(run / "job.yaml", two), "j", rank).command())
            assert "--rdzv-endpoint j-node-0-0.j:29500 --rdzv-id j --local-addr 10.1.2.3 --nnodes 2" in said
            assert hosts in said
        alone = " ".join(node.Node(run, load_job(run / "job.yaml"), "j", 0).command())
        assert "--rdzv-backend bound --rdzv-endpoint 127.0.0.1:0" in alone

        assert "copus.agent --signals-to-handle SIGINT,SIGHUP,SIGQUIT " in alone  # SIGTERM is not the agent's


@pytest.mark.dist
@pytest.mark.slow
def test_two_pods_train_and_go_on_after_one_is_evicted(tmp_path: Path) -> None:
    """What runs in the pods, for real: two nodes of a rank each, on this machine and in what the runtime gives them."""
    job = load_job(
        write_tiny_job(tmp_path),
        [
            "cluster={nodes: 2, accelerators_per_node: 1}",
            f"launch.runs={tmp_path}",
            "launch.engine=kubernetes",
            OPTIONS,
        ],
    )
    run = create_run(job)
    (run / "logs").mkdir()
    write_ticket(run, Ticket(engine="kubernetes", job_id="copus-tiny-1", submitted=0.0))
    subprocess.run([sys.executable, "-m", "copus.data", str(run / "job.yaml")], cwd=tmp_path, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def attempt() -> list[subprocess.Popen[bytes]]:
        given = {"COPUS_JOB": "copus-tiny-1", "POD_IP": "127.0.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
        given |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        given |= agent_environment(job, {})
        command = [sys.executable, "-m", "launch.engines.kubernetes_node", str(run)]
        environments = [os.environ | given | {"PET_NODE_RANK": str(rank)} for rank in (0, 1)]
        return [subprocess.Popen(command, env=each, cwd=tmp_path) for each in environments]

    pods = attempt()
    while sum(isinstance(event, Step) for event in read_events(run)) < 20:
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.05)
    pods[1].terminate()
    assert [pod.wait(timeout=120) for pod in pods] == [AGAIN, AGAIN]
    assert [pod.wait(timeout=300) for pod in attempt()] == [0, 0]
    assert [event.reason for event in read_events(run) if isinstance(event, End)] == ["interrupted", "finished"]
    steps = [event.step for event in read_events(run) if isinstance(event, Step)]
    assert steps == list(range(1, job.training.tokens // (16 * 4) + 1))
    logs = [(run / "logs" / f"copus-tiny-1.node-{rank}.log").stat().st_size >= 0 for rank in (0, 1)]
    assert logs == [True, True]

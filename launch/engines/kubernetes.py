"""Kubernetes, through Kubeflow Trainer: a job is a TrainJob on a runtime with torch's policy.

The pods run `launch.engines.kubernetes_node`, which is torch's elastic agent and what follows from its end. The run
directory and the data lie on a volume that is mounted at the same place in the pods and on the machine that submits, so
that every command reads a run as if it were here.
"""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from copus.job import JobConfig, JobError
from launch.engines.base import EngineState, QueuedEngine
from launch.engines.kubernetes_api import Cluster
from launch.engines.kubernetes_manifest import job_name, train_job, training_runtime
from launch.engines.kubernetes_options import KubernetesOptions
from launch.engines.ticket import Ticket, read_ticket

DRY = "xxxxxxxx"
"""At the end of the name in a dry run; eight random digits (hexadecimal) stand there in the cluster."""


class KubernetesEngine(QueuedEngine):
    """A TrainJob for each submission; a resume is another one."""

    Options = KubernetesOptions
    options: KubernetesOptions
    own_software = True
    job_noun = "TrainJob"
    between = "---\n"

    def check(self, job: JobConfig) -> None:
        """Raise JobError if something that the pods read or write is not on the volume."""
        source = job.data.source
        places = {"launch.runs": job.launch.runs, "data.cache": job.data.cache, "profile.table": job.profile.table}
        if isinstance(source, list):
            places |= {f"data.source.{index}": path for index, path in enumerate(source)}
        places |= {f"data.held_out_source.{index}": path for index, path in enumerate(job.data.held_out_source)}
        if job.data.tokenizer:
            places["data.tokenizer"] = job.data.tokenizer
        if job.data.chat_template:
            places["data.chat_template"] = job.data.chat_template
        data = self.options.volumes.values()
        for field, place in places.items():
            path = place.expanduser().absolute()
            mounts = [self.options.mount, *(data if field.startswith("data.") and field != "data.cache" else [])]
            if not any(map(path.is_relative_to, mounts)) or ".." in path.parts:
                raise JobError(
                    f"{field}({path}) is not below launch.options.mount({self.options.mount}), where the pods have the "
                    f"volume of claim {self.options.claim}"
                )

    def ready(self, job: JobConfig) -> None:
        """Raise JobError without the client or a cluster."""
        self._cluster(None)

    def describe(self, run: Path, job: JobConfig) -> str:
        """The manifests, as `kubectl create -f -` takes them."""
        made, runtime = self._manifests(run, job, DRY)
        documents = [made] if runtime is None else [runtime, made]
        return yaml.safe_dump_all(documents, sort_keys=False).rstrip()

    def submit(self, run: Path, job: JobConfig) -> Ticket:
        """Make the TrainJob, by a name that no other has: that of a removed run may still be in the cluster."""
        (run / "logs").mkdir(exist_ok=True)
        made, runtime = self._manifests(run, job, secrets.token_hex(len(DRY) // 2))
        self._cluster(None).create(made, runtime)
        name = made["metadata"]["name"]
        return Ticket(engine="kubernetes", job_id=name, submitted=time.time(), place=self.options.namespace)

    def job_state(self, ticket: Ticket) -> EngineState:
        """By the conditions of the TrainJob, then by the jobs below it."""
        name, status = self.name_of(ticket), self._cluster(ticket).status(ticket.job_id)
        if status is None:
            return EngineState("ended", f"{name} is gone")
        for condition in status.get("conditions") or []:
            kind, why = condition.get("type"), condition.get("message") or condition.get("reason") or ""
            if condition.get("status") != "True":
                continue
            if kind in ("Complete", "Failed"):
                return EngineState("ended", f"{name} has ended: {'complete' if kind == 'Complete' else why}")
            if kind == "Suspended":
                return EngineState("queued", f"{name} waits: {why}")
        jobs = status.get("jobsStatus") or []
        if any(job.get("ready") for job in jobs):
            return EngineState("running", f"{name} runs")
        return EngineState("queued", f"{name} waits for its pods")

    def withdraw(self, ticket: Ticket) -> str:
        """Delete the TrainJob."""
        self._cluster(ticket).delete(ticket.job_id)
        return "was deleted"

    def log_files(self, run: Path) -> list[Path]:
        """What each node of the last submission printed."""
        ticket = read_ticket(run)
        return sorted((run / "logs").glob(f"{ticket.job_id}.node-*.log")) if ticket else []

    def logs(self, run: Path, rank: int | None, *, follow: bool) -> Iterator[str]:
        """As the nodes wrote them into the run directory; where none came so far, what the cluster has of the pods."""
        ticket = read_ticket(run)
        if ticket is not None and not follow and not self.log_files(run):
            return self._cluster(ticket).logs(ticket.job_id)
        return super().logs(run, rank, follow=follow)

    def _manifests(self, run: Path, job: JobConfig, suffix: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The TrainJob, and the runtime of its own if the cluster's are not to be used."""
        name = job_name(run, suffix)
        try:
            own = training_runtime(name, job, self.options) if self.options.runtime is None else None
            return train_job(name, run, job, self.options), own
        except ImportError:
            raise JobError("launch.engine(kubernetes) needs its models: pip install 'copus[kubernetes]'") from None
        except ValueError as error:  # the models': a toleration, say
            raise JobError(f"launch.options: {' '.join(str(error).split())}") from None

    def _cluster(self, ticket: Ticket | None) -> Cluster:
        """The cluster, and the namespace that a job is in."""
        return Cluster(ticket.place if ticket and ticket.place else self.options.namespace, self.options.context)

"""What is asked of a Kubernetes cluster, through its official client: make, look at and delete a job, read its logs."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import yaml

from copus.job import JobError
from launch.engines.kubernetes_manifest import JOBSET_LABEL

GROUP = {"group": "trainer.kubeflow.org", "version": "v1alpha1"}
JOBS, RUNTIMES = "trainjobs", "trainingruntimes"
SECONDS = 10.0
"""Patience with one answer."""


class Cluster:
    """A cluster, as the kubeconfig or the pod that this runs in gives it. Whatever it refuses is a JobError."""

    def __init__(self, namespace: str, context: str | None = None) -> None:
        """Raises JobError without the client, or if nothing says which cluster."""
        try:
            from kubernetes import client, config
        except ImportError:
            raise JobError("launch.engine(kubernetes) needs its client: pip install 'copus[kubernetes]'") from None
        try:
            _configure(config, context)
        except (config.ConfigException, OSError, yaml.YAMLError) as error:
            raise JobError(f"launch.engine(kubernetes): no cluster: {_one_line(error)}") from None
        self._jobs, self._pods, self._namespace = client.CustomObjectsApi(), client.CoreV1Api(), namespace

    def create(self, job: dict[str, Any], runtime: dict[str, Any] | None) -> None:
        """Make a job, and before it the runtime that is its own, which goes when it goes. Raises JobError if the
        cluster does not want them, or does not know such things; then neither is left."""
        name = job["metadata"]["name"]
        if runtime is None:
            self._create(JOBS, job)
            return
        self._create(RUNTIMES, runtime)
        try:
            made = self._create(JOBS, job)
            kind = {key: job[key] for key in ("apiVersion", "kind")}
            owner = {**kind, "name": name, "uid": made["metadata"]["uid"]}
            change = {"metadata": {"ownerReferences": [owner]}}
            self._ask(
                f"TrainingRuntime {name}",
                lambda: self._jobs.patch_namespaced_custom_object(**self._kind(RUNTIMES), name=name, body=change),
            )
        except JobError:
            for plural in (JOBS, RUNTIMES):
                with contextlib.suppress(JobError):
                    self._delete(plural, name)
            raise

    def _create(self, plural: str, manifest: dict[str, Any]) -> Any:
        return self._ask(
            f"{manifest['kind']} {manifest['metadata']['name']}",
            lambda: self._jobs.create_namespaced_custom_object(**self._kind(plural), body=manifest),
        )

    def status(self, name: str) -> dict[str, Any] | None:
        """The status of a job, empty where there is none yet; None for a job that is gone."""
        answer = self._ask(
            f"TrainJob {name}",
            lambda: self._jobs.get_namespaced_custom_object(**self._kind(JOBS), name=name),
            missing_ok=True,
        )
        return None if answer is None else answer.get("status") or {}

    def delete(self, name: str) -> None:
        """Delete a job, and with it its pods and its runtime; nothing where it is gone already."""
        self._delete(JOBS, name)

    def _delete(self, plural: str, name: str) -> None:
        self._ask(
            f"{plural} {name}",
            lambda: self._jobs.delete_namespaced_custom_object(**self._kind(plural), name=name),
            missing_ok=True,
        )

    def logs(self, name: str) -> Iterator[str]:
        """What the containers of a job's pods have printed, pod after pod, each below a heading."""
        pods = self._ask(
            f"the pods of {name}",
            lambda: self._pods.list_namespaced_pod(
                self._namespace, label_selector=f"{JOBSET_LABEL}={name}", _request_timeout=SECONDS
            ),
        )
        for pod in pods.items:
            name, phase = pod.metadata.name, pod.status.phase
            yield f"==> {name} ({phase}) <=="
            read = partial(self._pods.read_namespaced_pod_log, name, self._namespace, _request_timeout=SECONDS)
            try:
                text = self._ask(f"pod {name}", partial(read, container="node"))
            except JobError as error:  # it has not begun to print
                text = str(error)
            yield from text.splitlines()

    def _kind(self, plural: str) -> dict[str, Any]:
        return {**GROUP, "plural": plural, "namespace": self._namespace, "_request_timeout": SECONDS}

    def _ask(self, what: str, question: Callable[[], Any], *, missing_ok: bool = False) -> Any:
        """The answer; None where it is not there and that is `missing_ok`. Raises JobError, one line, for the rest."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return question()
        except ApiException as error:
            if error.status == 404 and missing_ok:
                return None
            raise JobError(f"Kubernetes: {what}: {_said(error)}") from None
        except (HTTPError, OSError) as error:
            raise JobError(f"Kubernetes: {what}: the cluster does not answer: {_one_line(error)[:300]}") from None


def _configure(config: Any, context: str | None) -> None:
    """The kubeconfig; where there is none, and no context is named, the account of the pod that this runs in."""
    try:
        config.load_kube_config(context=context)
    except config.ConfigException:
        if context is not None or "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise
        config.load_incluster_config()


def _said(error: Any) -> str:
    """The cluster's own words."""
    try:
        return _one_line(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

"""As much of a Kubernetes cluster as the launcher asks for, on a port of the loopback interface."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml


class FakeCluster(ThreadingHTTPServer):
    """Keeps TrainJobs; whoever tests gives them their status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.runtimes: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, str] = {}
        """Name of each pod → what it has printed."""
        self.refusal: tuple[int, str] | None = None
        """Status and message for whoever wants to make a job."""
        self.patches_refused = False
        self.asked: list[str] = []
        """Every request: method and path."""


class Handler(BaseHTTPRequestHandler):
    """Answers as the API server does."""

    server: FakeCluster

    def do_POST(self) -> None:
        """Make a TrainJob or a TrainingRuntime."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["metadata"]["uid"] = f"uid-of-{body['metadata']['name']}"
        if body["kind"] == "TrainingRuntime":
            self.server.runtimes[body["metadata"]["name"]] = body
            return self._answer(201, body)
        if self.server.refusal:
            code, message = self.server.refusal
            return self._answer(code, {"kind": "Status", "message": message})
        self.server.jobs[body["metadata"]["name"]] = body
        return self._answer(201, body)

    def do_PATCH(self) -> None:
        """Change the metadata of a TrainingRuntime."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.patches_refused:
            return self._answer(403, {"kind": "Status", "message": "cannot patch resource"})
        runtime = self.server.runtimes[self.path.partition("?")[0].rpartition("/")[2]]
        runtime["metadata"] |= body["metadata"]
        return self._answer(200, runtime)

    def do_GET(self) -> None:
        """A TrainJob, the pods of one, or a pod's log."""
        name = self.path.partition("?")[0].rpartition("/")[2]
        if name == "pods":
            items = [{"metadata": {"name": pod}, "status": {"phase": "Running"}} for pod in self.server.pods]
            return self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": items})
        if name == "log":
            return self._answer(200, self.server.pods[self.path.split("/")[-2]])
        return self._answer_with_job(name, self.server.jobs.get(name))

    def do_DELETE(self) -> None:
        """Delete a TrainJob and the runtimes that it owns, or a runtime."""
        plural, name = self.path.partition("?")[0].rsplit("/", 2)[1:]
        if plural == "trainingruntimes":
            return self._answer_with_job(name, self.server.runtimes.pop(name, None))
        self.server.runtimes = {
            key: value
            for key, value in self.server.runtimes.items()
            if name not in [owner["name"] for owner in value["metadata"].get("ownerReferences", [])]
        }
        return self._answer_with_job(name, self.server.jobs.pop(name, None))  # gone before the client knows

    def _answer_with_job(self, name: str, job: dict[str, Any] | None) -> None:
        if job is not None:
            return self._answer(200, job)
        return self._answer(404, {"kind": "Status", "message": f'trainjobs "{name}" not found'})

    def _answer(self, code: int, body: dict[str, Any] | str) -> None:
        self.server.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def fake_cluster(folder: Path) -> Iterator[tuple[FakeCluster, Path]]:
    """A cluster and the kubeconfig that leads to it."""
    server = FakeCluster()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    values = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        "users": [{"name": "fake", "user": {}}],
    }
    config = folder / "kubeconfig"
    config.write_text(yaml.safe_dump(values))
    try:
        yield server, config
    finally:
        server.shutdown()
        server.server_close()

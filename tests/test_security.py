"""What docs/security.md promises, as far as it can be read off the source. What a run does is in test_end_to_end."""

import ast
import errno
import functools
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("profiles", "planner", "copus", "launch", "benchmarks", "examples")
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
LOADERS = {"torch.load", "np.load", "numpy.load"}


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every file of the product with its tree."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a name with attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def shells(tree: ast.AST) -> Iterator[int]:
    """Lines that hand text to a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            asks = any(keyword.arg == "shell" for keyword in node.keywords)
            if asks or dotted(node.func) in SHELLS:
                yield node.lineno


def yaml_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that read YAML otherwise than with `yaml.safe_load`."""
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith("yaml.") and "load" in name.lower() and name not in ("yaml.safe_load", "yaml.SafeLoader"):
            yield node.lineno


def unpicklings(tree: ast.AST) -> Iterator[int]:
    """Lines that import what unpickles, or call it."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        called = isinstance(node, ast.Call) and dotted(node.func) in LOADERS
        if called or any(name.partition(".")[0] in UNPICKLING for name in names):
            yield node.lineno


def whole_environments(tree: ast.AST) -> Iterator[int]:
    """Lines that take the environment as a whole, but to start a process with it (`env=`)."""
    named: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Attribute):  # os.environ["NAME"], os.environ.get
            named.add(node.value)
        elif isinstance(node, ast.Compare):  # "NAME" in os.environ
            named.update(node.comparators)
        elif isinstance(node, ast.keyword) and node.arg == "env":
            named.update(ast.walk(node.value))
    for node in ast.walk(tree):
        whole = isinstance(node, ast.Attribute) and node.attr in ("items", "copy", "values") and dotted(node.value)
        if whole == "os.environ" or (dotted(node) in ("os.environ", "os.environb") and node not in named):
            yield node.lineno


CHECKS = [shells, yaml_loads, unpicklings, whole_environments]
ALLOWED = {
    "yaml_loads": {"copus/job_text.py"},  # with a subclass of SafeLoader
    "unpicklings": {"copus/checkpoints/safe_loading.py"},
    "whole_environments": {
        *("benchmarks/live_profiler.py", "benchmarks/reshard.py"),  # for env=, one line on
        *("launch/engines/kubernetes_node.py", "launch/engines/slurm_node.py"),  # the workers', passed on
        "launch/engines/environment.py",  # for env=, less what belongs to other jobs
        # Looked through for names; values stay behind.
        *("launch/engines/local.py", "launch/engines/slurm.py", "launch/engines/slurm_step.py"),
        "copus/secret_names.py",  # to take secrets out of a text
    },
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_does_nothing_of_the_kind(check) -> None:
    allowed = ALLOWED.get(check.__name__, set())
    found = [f"{path}:{line}" for path, tree in sources() for line in check(tree) if path not in allowed]
    assert found == []


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (shells, "subprocess.run(text, shell=True)"),
        (shells, "os.system(text)"),
        (yaml_loads, "yaml.load(text, Loader=yaml.Loader)"),
        (yaml_loads, "yaml.unsafe_load(text)"),
        (yaml_loads, "yaml.full_load(text)"),
        (unpicklings, "import pickle"),
        (unpicklings, "from cloudpickle import loads"),
        (unpicklings, "torch.load(path)"),
        (whole_environments, "json.dumps(dict(os.environ))"),
        (whole_environments, "for name, value in os.environ.items(): pass"),
        (whole_environments, "record(os.environ)"),
    ],
)
def test_the_checks_find_what_they_look_for(check, bad: str) -> None:
    assert list(check(ast.parse(bad))) != []


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (shells, "subprocess.run(['ls'])"),
        (yaml_loads, "yaml.safe_load(text)"),
        (whole_environments, "Popen(command, env=os.environ | settings); os.environ['RANK']; os.environ.get('RANK')"),
    ],
)
def test_the_checks_pass_over_the_rest(check, good: str) -> None:
    assert list(check(ast.parse(good))) == []


def test_the_job_file_is_read_with_a_safe_loader() -> None:
    import yaml

    from copus import job_text

    assert issubclass(job_text._Loader, yaml.SafeLoader)
    assert job_text._Loader.yaml_constructors is yaml.SafeLoader.yaml_constructors  # none was added


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, (self.place,)


def test_orders_of_samples_with_code_in_them_are_not_run(tmp_path: Path) -> None:
    from copus.data.samples import DatasetReader, _Joined
    from copus.job import JobError

    forged = np.array([Malice(tmp_path / "trace")], dtype=object)
    for name in ("documents", "starts", "sequences"):
        np.save(tmp_path / f"{name}.npy", forged, allow_pickle=True)
    with pytest.raises(JobError, match="has no order of samples in it"):
        DatasetReader._open(SimpleNamespace(samples_per_epoch=1, _order_kind=_Joined), tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "trace").exists()


def test_the_store_of_one_machine_listens_on_loopback_alone() -> None:
    """And it works: a value that one end sets, the other reads."""
    import os

    from security_checks import listening

    from copus.stores import host_store, join_store

    before = listening(os.getpid())
    store = host_store("127.0.0.1", 0, timedelta(seconds=20))
    assert listening(os.getpid()) - before <= {"127.0.0.1"}
    joined = []
    other = threading.Thread(
        target=lambda: joined.append(join_store("127.0.0.1", store.port, timedelta(seconds=20)).get("key"))
    )
    other.start()
    store.set("key", "value")
    other.join(timeout=20)
    assert joined == [b"value"]
    with pytest.raises(OSError, match="in use") as taken:
        host_store("127.0.0.1", store.port, timedelta(seconds=1))
    assert taken.value.errno == errno.EADDRINUSE
    outside = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), store.port)} - {"127.0.0.1", "::1"}
    for address in outside:
        with pytest.raises(OSError):  # noqa: PT011 (refused, or unreachable: whatever the network says)
            socket.create_connection((address, store.port), timeout=2)

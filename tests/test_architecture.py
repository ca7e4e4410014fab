"""The house rules, checked: imports go down, torch stays where it belongs, everything public says what it is.

The first half is the checks, which read any tree of the same shape. The second half runs them on this one, and on a
small bad tree, so that a check which finds nothing is known to be able to find something.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("profiles", "planner", "copus", "launch")
"""Lowest first: each may import those before it, and itself."""
FRAMEWORKS = ("megatron", "deepspeed")
"""Each is imported by `copus/backends/<its name>` alone."""
HEAVY = ("torch", *FRAMEWORKS)
TORCH_FREE = ("profiles", "planner", "launch", "copus.job", "copus.events", "copus.event_lines", "copus.audit")
"""Modules, and all below them, that reach no torch, whatever they import on the way."""
VAGUE_NAMES = ("utils", "util", "helpers", "misc", "common")


def modules(root: Path) -> dict[str, Path]:
    """Module name → file, for every module of the four packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) for every import in a file, inside functions too.

    For `from a import b` both `a` and `a.b` are given, since `b` may be a module; relative imports are made absolute.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def top(module: str) -> str:
    """First part of a dotted name."""
    return module.partition(".")[0]


def upward_imports(root: Path) -> list[str]:
    """Imports that go up: launch → copus → planner → profiles is the only direction."""
    return sorted(
        {
            f"{path.relative_to(root)}:{line}: {top(name)} imports {top(imported)}"
            for name, path in modules(root).items()
            for line, imported in imports(name, path)
            if top(imported) in PACKAGES and PACKAGES.index(top(imported)) > PACKAGES.index(top(name))
        }
    )


def misplaced_imports(root: Path) -> list[str]:
    """Torch outside of copus, and a framework outside of its own backend."""
    found = set()
    for name, path in modules(root).items():
        for line, imported in imports(name, path):
            framework = top(imported) in FRAMEWORKS and not f"{name}.".startswith(f"copus.backends.{top(imported)}.")
            if framework or (top(imported) == "torch" and top(name) != "copus"):
                found.add(f"{path.relative_to(root)}:{line}: {name} imports {top(imported)}")
    return sorted(found)


def ways_to_torch(root: Path) -> list[str]:
    """Chains of imports that lead from a torch-free module to torch or a framework."""
    known = modules(root)
    found = []
    for start in known:
        if not any(f"{start}.".startswith(f"{free}.") for free in TORCH_FREE):
            continue
        chains, seen = [(start,)], {start}
        while chains:
            chain = chains.pop()
            for _, imported in imports(chain[-1], known[chain[-1]]):
                if top(imported) in HEAVY:
                    found.append(" → ".join((*chain, top(imported))))
                parts = imported.split(".")
                for name in (
                    ".".join(parts[:length]) for length in range(1, len(parts) + 1)
                ):  # parents are imported too
                    if name in known and name not in seen:
                        seen.add(name)
                        chains.append((*chain, name))
    return sorted(set(found))


def vague_files(root: Path) -> list[str]:
    """Files and folders whose name says nothing about what is in them."""
    return [
        str(path.relative_to(root)) for name, path in modules(root).items() if set(name.split(".")) & {*VAGUE_NAMES}
    ]


def undocumented(root: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring.

    A method needs none where another class of its file documents the method of that name (a protocol and what
    implements it), nor does torch's `forward`.
    """
    found = []
    for name, path in modules(root).items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            found.append(name)
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        known = {"forward"} | {node.name for body in classes for node in functions(body) if ast.get_docstring(node)}
        for node in (*functions(tree), *(node for node in tree.body if isinstance(node, ast.ClassDef))):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{name}.{node.name}")
        for body in classes:
            for node in functions(body):
                if (
                    not (body.name + node.name).startswith("_")
                    and not ast.get_docstring(node)
                    and node.name not in known
                ):
                    found.append(f"{name}.{body.name}.{node.name}")
    return found


def functions(body: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public functions that stand directly in a module or a class."""
    return [
        node
        for node in body.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]


def left_out(root: Path) -> list[str]:
    """Modules that the distribution would lack: in a folder without `__init__.py`, or not named in pyproject.toml."""
    setting = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packed = set(find_packages(str(root), include=setting["include"]))
    return [name for name, path in modules(root).items() if ".".join(path.relative_to(root).parent.parts) not in packed]


def dead_paths(root: Path) -> list[str]:
    """Files and folders that the documents name in backticks, and that are not there."""
    named = re.compile(rf"`((?:{'|'.join(PACKAGES)}|tests|docs|examples|benchmarks)/[\w./-]*)`")
    return [
        f"{document.relative_to(root)}: {path}"
        for document in sorted({*root.glob("*.md"), *root.glob("docs/*.md")})
        for path in named.findall(document.read_text())
        if not (root / path).exists() and not path.startswith("benchmarks/results")
    ]


CHECKS = (upward_imports, misplaced_imports, ways_to_torch, vague_files, undocumented, left_out, dead_paths)


@pytest.mark.parametrize("check", CHECKS)
def test_house(check) -> None:
    assert check(ROOT) == []


def test_distribution_holds_the_four_packages_and_no_other() -> None:
    setting = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {top(name) for name in find_packages(str(ROOT), include=setting["include"])} == set(PACKAGES)


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter; fails with its standard error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_launcher_loads_no_torch() -> None:
    loaded = run_python(
        "import launch.cli, copus.job, copus.events, planner, profiles, sys\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    ).split()
    assert "pydantic" in loaded
    assert not set(HEAVY) & set(loaded)


def test_planner_and_profiles_work_where_torch_is_not_installed() -> None:
    walked = run_python(
        f"""
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError("refused " + name)

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    sys.exit("torch was not refused")
import planner, profiles
for package in (planner, profiles):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
        print(found.name)
"""
    ).split()
    assert {"planner.config", "profiles.layout"} <= set(walked)


def job_fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted name, description) of every field of a model and of the models inside it."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from job_fields(field.annotation, f"{path}{name}.")


def test_every_field_of_a_job_file_is_documented() -> None:
    from copus.job import JobConfig

    fields = dict(job_fields(JobConfig))
    assert "training.layout.tp" in fields
    assert [name for name, description in fields.items() if not description] == []


BAD_TREE = {
    "pyproject.toml": '[tool.setuptools.packages.find]\ninclude = ["copus*", "planner*", "profiles*"]\n',
    "profiles/__init__.py": '"""."""\n',
    "profiles/utils.py": '"""."""\nfrom planner import choose\n',
    "profiles/lazy.py": '"""."""\ndef _f():\n    import importlib\n    importlib.import_module("copus.loop")\n',
    "planner/__init__.py": "",
    "planner/choose.py": '"""."""\nclass Choice:\n    def score(self): ...\n    def _private(self): ...\n'
    "class _Other:\n    def free(self): ...\ndef choose(): ...\n",
    "planner/known.py": '"""."""\nclass A:\n    """."""\n    def run(self):\n        """."""\n'
    'class B:\n    """."""\n    def run(self): ...\n    def forward(self): ...\n',
    "planner/deep/relative.py": '"""."""\nfrom ..up import rank\nfrom .. import choose\n',
    "planner/up.py": '"""."""\ntry:\n    from torch import nn\nexcept ImportError:\n    nn = None\n',
    "copus/__init__.py": '"""."""\n',
    "copus/events.py": '"""."""\nfrom copus import loop\n',
    "copus/loop.py": '"""."""\nimport torch\nfrom megatron.core import mpu\n',
    "copus/backends/__init__.py": '"""."""\n',
    "copus/backends/megatron/__init__.py": '"""."""\nimport megatron.core\nimport deepspeed\n',
    "launch/__init__.py": '"""."""\nfrom copus import events\n',
    "docs/rooms.md": "The loop is `copus/loop.py`, the view `launch/watch.py`, the rest `planner/`.",
}


@pytest.fixture
def bad_tree(tmp_path: Path) -> Path:
    """A tree with every kind of fault in it."""
    for name, text in BAD_TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_checks_find_what_is_wrong(bad_tree: Path) -> None:
    assert upward_imports(bad_tree) == [
        "profiles/lazy.py:4: profiles imports copus",
        "profiles/utils.py:2: profiles imports planner",
    ]
    assert misplaced_imports(bad_tree) == [
        "copus/backends/megatron/__init__.py:3: copus.backends.megatron imports deepspeed",
        "copus/loop.py:3: copus.loop imports megatron",
        "planner/up.py:3: planner.up imports torch",
    ]
    assert {
        "copus.events → copus.loop → torch",
        "launch → copus.events → copus.loop → torch",
        "planner.deep.relative → planner.up → torch",
        "profiles.lazy → copus.loop → megatron",
    } <= set(ways_to_torch(bad_tree))
    assert vague_files(bad_tree) == ["profiles/utils.py"]
    assert undocumented(bad_tree) == [
        "planner",
        "planner.choose.choose",
        "planner.choose.Choice",
        "planner.choose.Choice.score",
    ]
    assert left_out(bad_tree) == ["planner.deep.relative", "launch"]
    assert dead_paths(bad_tree) == ["docs/rooms.md: launch/watch.py"]

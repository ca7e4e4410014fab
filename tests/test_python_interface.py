"""copus as a library: its names, its types, and the examples of docs/python-*.md, which run as they stand."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import copus

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.read_text().partition("\n")[0].removeprefix("# copus."): page for page in ROOT.glob("docs/python-*.md")}
"""By name."""


def code_of(page: Path) -> str:
    """The Python of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_example_of_each_name_runs_as_it_stands(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code_of(PAGES[name]), PAGES[name].name, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out, "every example prints what it found"


def test_every_public_class_and_function_has_a_page_with_an_example() -> None:
    with_examples = {name for name, page in PAGES.items() if code_of(page)}
    assert with_examples == set(copus.__all__) - {"JobConfig", "JobError", "load_job"}


def test_stubs_and_module_name_the_same() -> None:
    stub = ast.parse((ROOT / "copus" / "__init__.pyi").read_text())
    typed = {
        alias.asname: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: (place, name) for name, place in copus._PLACES.items()}
    for name in copus.__all__:
        assert getattr(copus, name).__name__ == name
    assert set(copus.__all__) <= set(dir(copus))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Metre'"):
        _ = copus.Metre


def test_import_and_planning_load_no_torch() -> None:
    code = """
import sys
import copus
assert not {"torch", "numpy", "pydantic"} & set(sys.modules), "importing copus alone loads nothing"
copus.plan, copus.Planner, copus.ThroughputTable, copus.load_job
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_overrides_are_for_job_files() -> None:
    job = copus.load_job(ROOT / "examples" / "shakespeare.yaml")
    with pytest.raises(ValueError, match="has its values already"):
        copus.plan(job, overrides=["training.lr=1"])

"""The documentation: links lead somewhere, commands and fields exist, and generated pages leave nothing out."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))

import commands  # noqa: E402
import figures  # noqa: E402
import job_file  # noqa: E402
import reference  # noqa: E402

from copus.job import JobConfig, parse_job  # noqa: E402
from copus.trackers import BUILT_IN  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Text of a page, generated parts included, without code."""
    return re.sub(r"`[^`\n]*`", "code", FENCED.sub("", reference.on_page_markdown(page.read_text())))


def anchors(page: Path) -> set[str]:
    """What a link can lead to on a page: on the site, and in the repository's own view (which keeps letters like β)."""
    text = FENCED.sub("", reference.on_page_markdown(page.read_text()))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        site = slugify(plain, "-")
        if site == re.sub(r"[^\w -]", "", plain.lower()).replace(" ", "-"):
            found.add(site)
    return found


@each_page
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert page.parent != DOCS or file.is_relative_to(DOCS), f"{page.name}: {target} is not on the site"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_begins_with_a_title_and_a_sentence(page: Path) -> None:
    title, blank, sentence = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"[\w`]", sentence), f"{page.name} begins with {sentence!r}"


def test_the_navigation_has_every_page_once() -> None:
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from files(inner)

    listed = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_generated_part_stands_in_its_page_as_it_has_to_be_now() -> None:
    pages = {page.name: page.read_text() for page in DOCS.glob("*.md")}
    parts = [part for text in pages.values() for part in reference.PART.findall(text)]
    assert sorted(parts) == sorted(reference.GENERATED)
    old = [name for name, text in pages.items() if reference.current(text) != text]
    assert old == [], "make reference writes them anew"


# Words


def test_no_page_uses_a_word_that_the_glossary_avoids() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|(.*)\|$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    avoided = [word for *_, words in rows if words.strip() not in ("not", "") for word in words.strip().split(", ")]
    assert len(rows) > 50
    assert len(avoided) > 10
    for page in PAGES:
        if page.name in ("glossary.md", "CHANGELOG.md"):
            continue
        written = FENCED.sub("", reference.PART.sub("", page.read_text()))
        text = " ".join(re.sub(r"`[^`\n]*`", "", written).split()).lower()
        assert [word for word in avoided if re.search(rf"\b{word}\b", text)] == [], page.name


# Commands


def command_lines(page: Path) -> Iterator[str]:
    """Calls of `copus` in code: lines of blocks, and code in the running text."""
    text = page.read_text()
    for line in [*text.splitlines(), *re.findall(r"`([^`\n]+)`", text)]:
        call = re.match(r"(?:    |\$ )?(?:\.venv/bin/)?(copus [a-z].*)", line)
        if call:
            yield re.split(r"\s\|\s|\s·\s|\s--\s", call[1])[0]  # what follows ` -- ` is another tool's


@each_page
def test_commands_and_flags_exist(page: Path) -> None:
    names = set(dict(commands.commands()))
    for line in command_lines(page):
        words = [word.strip("[].,;") for word in shlex.split(line, comments=True)][1:]
        name = words[0] if " ".join(words[:2]) not in names else " ".join(words[:2])
        assert name in names, f"{page.name}: {line}"
        name = "profile run" if name == "profile" and len(words) > 1 else name
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= commands.flags(name) | {"--help"}, f"{page.name}: {line}"


# Benchmarks


def test_the_page_of_benchmarks_has_every_benchmark_and_every_kept_result() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    named = set(re.findall(r"python -m benchmarks\.([a-z_]+)", page))
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    # Those that only a benchmark starts, in processes of its own, and the one that `make gpu-check` is for.
    inner = {name for name in programs if name.endswith(("_ranks", "_worker"))} | {"gpu_check"}
    assert named == programs - inner
    for result in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"`{result.name}`" in page, f"{result.name} is kept, and not on the page"


@pytest.mark.parametrize("claim", figures.CLAIMS, ids=lambda claim: f"{claim.benchmark} in {claim.pages[0]}")
def test_the_figures_of_kept_results_are_the_newest_ones(claim: figures.Claim) -> None:
    for page in claim.pages:
        (said,) = claim.pattern().finditer((ROOT / page).read_text())
        assert " ".join(said[0].split()) == claim.said(), f"{page}: make figures writes it anew"


def test_a_figure_that_changed_is_found_and_replaced() -> None:
    claim = figures.Claim("reshard", "{a} times as fast", (), lambda result: {"a": "2.5"})
    assert claim.pattern().sub(claim.said(), "moves are 1,234.5 times\nas fast") == "moves are 2.5 times as fast"


# Fields of the job file


def fields() -> dict[str, set[str]]:
    """Place in the job file → names of its fields, from the JSON schema: not the way that the reference goes."""
    schema = JobConfig.model_json_schema()
    found: dict[str, set[str]] = {}

    def add(place: str, model: dict[str, Any]) -> None:
        found[place] = set(model["properties"])
        for name, field in model["properties"].items():
            where = f"{place}.{name}".strip(".")
            kinds = [kind["$ref"] for kind in field.get("oneOf", [])]
            for inner in [field["$ref"]] if "$ref" in field else kinds:
                section = schema["$defs"][inner.removeprefix("#/$defs/")]
                kind = f" ({section['properties']['kind']['const']})" if kinds else ""
                add(where + kind, section)

    add("", schema)
    return found


def field_names() -> set[str]:
    """`training.layout.tp` and the like, options of trackers included."""
    without_kind = ((place.partition(" (")[0], names) for place, names in fields().items())
    named = {f"{place}.{name}".strip(".") for place, names in without_kind for name in names}
    options = {
        f"{place.partition(' (')[0]}.{field}"
        for place, model in job_file.OPTIONS.items()
        for field in model.model_fields
    }
    return named | options | set(job_file.OPTIONS)


def test_the_reference_has_every_field_with_its_default_and_meaning() -> None:
    parts = re.split(r"^## (.+)$", job_file.page(), flags=re.MULTILINE)
    tables = {title.strip("`"): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    for place, names in fields().items():
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (.*) \| (.+) \|$", tables[place or "The file"], re.MULTILINE)
        assert {row[0] for row in rows} == names
        assert all(len(meaning) > 5 for *_, meaning in rows)
    assert "| `global_batch` | int > 0 | **required** | sequences |" in tables["training"]
    assert "| `recompute` | `none` or `selective` or `full` | `none` |  |" in tables["training.layout"]
    assert "| `timeout_seconds` | number > 0 ≤ 2592000 | `600.0` | seconds |" in tables["launch"]


def test_the_reference_has_the_options_of_every_built_in_tracker() -> None:
    assert {place for place in job_file.OPTIONS if place.startswith("tracking.")} == {f"tracking.{n}" for n in BUILT_IN}
    assert "| `mode` | `online` or `offline` | `online` |" in job_file.page()


def test_every_field_named_beside_an_argument_of_megatron_exists() -> None:
    known = field_names()
    rows = re.findall(r"^\| (`--.+?) \| (.+) \|$", (DOCS / "from-megatron.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    for argument, becomes in rows:
        named = [name for name in re.findall(r"`([a-z_0-9.]+)`", becomes) if "." in name and name != "tokenizer.json"]
        assert set(named) <= known, f"{argument}: {set(named) - known}"
        assert named or re.match(r"not (needed|supported|a field)", becomes), f"{argument}: says nothing"


@each_page
def test_fields_set_on_a_command_line_exist(page: Path) -> None:
    for name in re.findall(r"--set ([a-z_0-9.]+)=", page.read_text()):
        if name not in ("section.field", "model.from"):  # `from` stands for the fields of a known model
            assert name in field_names(), f"{page.name}: --set {name}"


def test_the_job_files_of_the_documentation_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [
        values
        for page in PAGES
        for text in re.findall(r"^```yaml\n(.+?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        if isinstance(values := yaml.safe_load(text), dict) and "name" in values
    ]
    assert len(whole) >= 2
    for values in whole:
        parse_job(values)

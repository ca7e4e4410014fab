"""docs/events.md and docs/cli.md say what the code says."""

import re
from pathlib import Path

import pytest
from test_cli import COMMANDS

from copus.events import KINDS, SCHEMA_VERSION, DecisionMade, Event
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale

DOCS = Path(__file__).resolve().parent.parent / "docs"


def sections() -> dict[str, str]:
    """Heading, without backticks → text below it."""
    parts = re.split(r"^## (.+)$", (DOCS / "events.md").read_text(), flags=re.MULTILINE)
    return {heading.strip("`"): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def rows(text: str) -> dict[str, str]:
    """First cell, without backticks → second cell, of every row that describes a field."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_field_of_every_event_is_described_and_no_other(name: str) -> None:
    described = rows(sections()[name])
    assert set(described) == set(KINDS[name].model_fields) - set(Event.model_fields)


def test_the_sections_are_the_event_types() -> None:
    assert set(sections()) == set(KINDS) | {"Every event", "Whole decisions", "Reading it"}
    common = rows(sections()["Every event"])
    assert set(common) == set(Event.model_fields)
    assert common["schema_version"] == str(SCHEMA_VERSION)


def test_what_is_inside_of_fields_is_named() -> None:
    def named(text: str) -> set[str]:
        return set(re.findall(r"[`\"](\w+)[`\"]", text))

    whole = rows(sections()["Whole decisions"])
    assert set(whole) == set(DecisionMade.model_fields) - set(Event.model_fields)
    assert set(Decision.model_fields) <= named(whole["decision"])
    assert set(NoiseScale.model_fields) <= named(rows(sections()["noise"])["noise"])
    introduction = (DOCS / "events.md").read_text().partition("## ")[0]
    assert {*Layout.model_fields, *Configuration.model_fields} <= named(introduction)


def test_every_command_is_listed() -> None:
    listed = set(re.findall(r"`copus ([\w-]+(?: \w+)?)", (DOCS / "cli.md").read_text()))
    assert {part for entry in listed for part in (entry, entry.split()[0])} >= set(COMMANDS)

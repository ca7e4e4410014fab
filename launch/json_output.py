"""What `--json` prints, of every command: one object, with the version of its schema; an error is an object too."""

import json
from collections.abc import Mapping

SCHEMA_VERSION = 1
"""Goes up when a field changes its meaning or goes away; new fields do not count."""


def as_json_line(values: Mapping[str, object]) -> str:
    """A result as one line."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **values})

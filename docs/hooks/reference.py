"""MkDocs hook: puts the generated tables into the pages that have a place for them.

A place is a line `<!-- generated: NAME -->`. On a page that is read in the repository it shows nothing.
"""

import re
from collections.abc import Callable
from typing import Any

import commands
import job_file

GENERATED: dict[str, Callable[[], str]] = {"job file": job_file.page, "commands": commands.page}
PLACE = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
CODE_IN_TABLE = re.compile(r"(?<=[ (])`[^`\n]*\\\|[^`\n]*`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places of a page. A pipe in code in a table has a backslash for the repository's view, not for this."""
    filled = PLACE.sub(lambda place: GENERATED[place[1]](), markdown)
    return CODE_IN_TABLE.sub(lambda code: code[0].replace("\\|", "|"), filled)

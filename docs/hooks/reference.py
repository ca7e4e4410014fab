"""The generated parts of the documentation: `make reference` writes them into their pages, where the view of the
repository and the site show them. A test fails while they are not current.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. This file is a MkDocs hook as well.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import job_file

GENERATED: dict[str, Callable[[], str]] = {"job file": job_file.page, "commands": commands.page}
PART = re.compile(r"^<!-- generated: (.+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
CODE_IN_TABLE = re.compile(r"(?<=[ (])`[^`\n]*\\\|[^`\n]*`")


def current(markdown: str) -> str:
    """A page with its generated parts as they have to be now."""
    return PART.sub(lambda part: f"<!-- generated: {part[1]} -->\n\n{GENERATED[part[1]]()}\n\n<!-- end -->", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A pipe in code in a table has a backslash for the repository's view, and none for the site."""
    return CODE_IN_TABLE.sub(lambda code: code[0].replace("\\|", "|"), markdown)


if __name__ == "__main__":
    for page in sorted(Path(__file__).parent.parent.glob("*.md")):
        page.write_text(current(page.read_text(encoding="utf-8")), encoding="utf-8")

"""Names that say that a value is secret: of environment variables and of fields of a job file.

One list for all of them: what a job file may not hold, what a report leaves out, what a library's message loses.
"""

import os
import re

SECRET_NAME = re.compile(
    r"secret|passw(or)?d|credential|private|(?<![be]os_)token(?!iz|s$)|(api|access)_?key|_key$", re.IGNORECASE
)
"""Found in the name of a secret. `tokenizer`, `tokens` and `eos_token` are none."""


def is_secret(name: str) -> bool:
    """Whether a variable or a field of this name holds a secret."""
    return SECRET_NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """A library's message without the secrets of the environment, should it quote one."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text

"""Conversations into tokens, with a mark on those that the assistant says: only they are learned.

A Jinja template turns the messages into one text, as `apply_chat_template` of transformers does, in a sandbox. It is
Hugging Face's of the tokenizer, the job's own, or a plain one.
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from copus.data.tokenizer import brief
from copus.job import DataConfig, JobError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\\n\\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""
"""For tokenizers without a template."""
ASSISTANT = "assistant"
"""Role of the messages that are learned."""


def template_text(data: DataConfig) -> str:
    """The template of a job's conversations. Raises JobError if it cannot be read."""
    if data.chat_template is not None:
        return _read(data.chat_template.expanduser(), "data.chat_template")
    if data.tokenizer is not None:
        folder = data.tokenizer.expanduser().parent
        if (folder / "chat_template.jinja").is_file():
            return _read(folder / "chat_template.jinja", "data.tokenizer")
        if (folder / "tokenizer_config.json").is_file():
            try:
                template = json.loads(_read(folder / "tokenizer_config.json", "data.tokenizer")).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise JobError(f"data.tokenizer: {folder / 'tokenizer_config.json'}: not JSON: {error}") from None
            if isinstance(template, list):  # several by name
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
    return PLAIN_TEMPLATE


def encode_conversation(
    tokenizer: "Tokenizer", template: str, messages: list[dict[str, Any]], bos: str, eos: str, eod: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Tokens of a conversation, the end-of-document token last, and 1 for each that the assistant says, its end
    included. Shapes (tokens,). Names of special tokens are special tokens here, since templates are made of them.

    What the assistant says is what the text grows by with its message, after the prompt that asks for it. Raises
    JobError if the template fails, or writes the beginning of a conversation otherwise when more follows.
    """
    values = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
    render = functools.partial(_render, _template(template), name, values)
    text = render(messages, False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        prompt, answered = render(messages[:number], True), render(messages[: number + 1], False)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise JobError(
                f"data.chat_template: {name}: the text up to message {number} is another one without what follows: it "
                "cannot be told what the assistant says"
            )
        if len(answered) == len(prompt) and message["content"].strip():
            raise JobError(f"data.chat_template: {name}: it leaves out message {number}, which the assistant says")
        spans.append((len(prompt), len(answered)))
    tokenizer.encode_special_tokens = False
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.int64)
    starts = np.array([first for first, _ in encoding.offsets], np.int64)
    said = np.zeros(len(ids), np.uint8)
    for first, last in spans:
        said |= ((starts >= first) & (starts < last)).astype(np.uint8)
    if not len(ids) or ids[-1] != eod:
        ends_with_answer = bool(messages) and messages[-1]["role"] == ASSISTANT
        ids, said = np.append(ids, eod), np.append(said, np.uint8(ends_with_answer))
    return ids, said


@functools.lru_cache(maxsize=4)
def _template(text: str) -> "Template":
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise JobError(f"data.chat_template: {brief(error)}") from None


def _render(template: "Template", name: str, values: dict[str, Any], messages: list[dict[str, Any]], asks: bool) -> str:
    try:
        return template.render(messages=messages, add_generation_prompt=asks, **values)
    except Exception as error:  # whatever the template makes of the messages
        raise JobError(f"data.chat_template: {name}: {brief(error)}") from None


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{setting}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise JobError(f"{setting}: {path}: not UTF-8 text") from None

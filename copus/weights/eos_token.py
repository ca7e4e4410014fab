"""Which token ends a document, by the small files beside a Hugging Face tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from copus.data.tokenizer import END_OF_DOCUMENT, brief
from copus.job import JobError


def eos_token_of(folder: Path, tokens: dict[str, int]) -> str | None:
    """`data.eos_token` for text in the tokenizer of a folder; None if that is the token that is taken anyway.

    transformers' order: `tokenizer_config.json`, over which `special_tokens_map.json` goes unless the former lists all
    added tokens. If they name none of the tokens, and there is no usual one, the ids in `generation_config.json` and
    `config.json` say; where there is a usual one, they are often the defaults of another vocabulary. Raises JobError
    for a file that cannot be read.
    """
    usual = next((token for token in END_OF_DOCUMENT if token in tokens), None)
    settings = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read(folder / "special_tokens_map.json")
    named = settings.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if isinstance(named, str) and named in tokens:
        return named if named != usual else None
    return next(_by_ids(folder, tokens), None) if usual is None else None


def _by_ids(folder: Path, tokens: dict[str, int]) -> Iterator[str]:
    by_id = {number: token for token, number in tokens.items()}
    for file in ("generation_config.json", "config.json"):
        ids = _read(folder / file).get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            if isinstance(number, int) and number in by_id:
                yield by_id[number]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise JobError(f"data.eos_token: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise JobError(f"data.eos_token: {path} is not JSON: {brief(error)}") from None
    if not isinstance(values, dict):
        raise JobError(f"data.eos_token: {path} is not a JSON object")
    return values

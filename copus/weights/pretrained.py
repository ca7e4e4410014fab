"""What a run keeps of the Hugging Face folder that it began with: the small files beside the weights. No torch.

They lie in `RUN/pretrained`, so that an export has the tokenizer and the configuration when the folder is gone.
"""

import shutil
from pathlib import Path

from copus.job import JobError
from copus.weights.source import CONFIG, TOKENIZER, Source

FOLDER = "pretrained"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
_LARGEST_BYTES = 64 * 2**20


def keep_small_files(run: Path, source: Source) -> None:
    """Copy configuration, generation defaults and tokenizer into the run, if the weights come with them."""
    folder = run / FOLDER
    if source.kind == "run":
        _copy(source.folder.parent.parent / FOLDER, folder)
    elif source.kind == "hugging_face":
        _copy(source.folder, folder)


def _copy(source: Path, target: Path) -> None:
    names = [name for name in (CONFIG, GENERATION, *TOKENIZER_FILES) if (source / name).is_file()]
    if names:
        target.mkdir(exist_ok=True)
    for name in names:
        size = (source / name).stat().st_size
        if size > _LARGEST_BYTES:
            raise JobError(f"training.init_from: {source / name} has {size} bytes; at most {_LARGEST_BYTES} are copied")
        shutil.copyfile(source / name, target / name)

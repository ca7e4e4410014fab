"""The one place that knows which megatron-core is installed: 0.16.1 (the newest for Python 3.11) to 0.19 (Python 3.12).

What has another name in another version is found by what is there. What is patched goes through `patch`, which names
the versions that the patch was written for and fails if what it replaces is gone.
"""

import importlib.metadata
import re
from typing import Any

OLDEST, NEWEST = (0, 16), (0, 19)
"""Releases that the tests run on: `make test` and `make test-next`."""


def installed() -> str:
    """Version of the megatron-core that is installed."""
    return importlib.metadata.version("megatron-core")


def check_installed() -> None:
    """Raise RuntimeError for a version that nobody has tried: patches may miss, and gradients may be wrong silently."""
    if not OLDEST <= _release(installed()) <= NEWEST:
        raise RuntimeError(
            f"megatron-core {installed()} is not supported: {_text(OLDEST)} to {_text(NEWEST)} are (pyproject.toml)"
        )


def patch(owner: Any, name: str, replacement: Any, oldest: tuple[int, int], newest: tuple[int, int]) -> None:
    """Replace an attribute of a module or class of megatron's, in the releases from `oldest` to `newest`.

    Does nothing in others, whose defect or need is another. Raises RuntimeError if there is nothing to replace.
    """
    if not oldest <= _release(installed()) <= newest:
        return
    if not hasattr(owner, name):
        raise RuntimeError(
            f"megatron-core {installed()} has no {owner.__name__}.{name}, which copus replaces in {_text(oldest)} to "
            f"{_text(newest)}"
        )
    setattr(owner, name, replacement)


def main_grads(wrapper: Any) -> list[Any]:
    """The gradients of one of megatron's optimizers, without those that another rank counts."""
    if hasattr(wrapper, "get_grads_for_grad_norm"):  # from 0.19 on
        return list(wrapper.get_grads_for_grad_norm())
    return list(wrapper.get_main_grads_for_grad_norm())


def _release(version: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1])


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"

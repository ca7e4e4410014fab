"""The one place that depends on the version of megatron-core: 0.16.1 (the newest for Python 3.11) to 0.19 (3.12).

Renamed functions are looked up under both names. Patches go through `patch`, which names the versions that a patch was
written for and fails if the thing that it replaces is gone.
"""

import importlib.metadata
import re
from typing import Any

OLDEST, NEWEST = (0, 16), (0, 19)
"""Releases that the tests run on: `make test` and `make test-next`."""


def installed() -> str:
    """The installed version of megatron-core."""
    return importlib.metadata.version("megatron-core")


def check_installed() -> None:
    """Raise RuntimeError for an untested version: patches may miss, and gradients may be silently wrong."""
    if not OLDEST <= _release(installed()) <= NEWEST:
        raise RuntimeError(
            f"megatron-core {installed()} is not supported: {_text(OLDEST)} to {_text(NEWEST)} are (pyproject.toml)"
        )


def patch(owner: Any, name: str, replacement: Any, oldest: tuple[int, int], newest: tuple[int, int]) -> None:
    """Replace an attribute of one of Megatron's modules or classes, in the releases from `oldest` to `newest` alone.

    Raises RuntimeError if there is nothing to replace.
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
    """The gradients of one of Megatron's optimizers, without those that another rank counts."""
    if hasattr(wrapper, "get_grads_for_grad_norm"):  # from 0.19 on
        return list(wrapper.get_grads_for_grad_norm())
    return list(wrapper.get_main_grads_for_grad_norm())


def _release(version: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1])


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"

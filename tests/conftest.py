"""What every test has: one thread a process, properties without a clock, and GPU tests only where there is a GPU."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share the machine's cores
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that a test starts would compile scipy and copus anew
os.environ.pop("COLUMNS", None)  # of a terminal, or of pytest-xdist: tables would be as narrow

import pytest
from hypothesis import settings

from tests import ranks

sys.dont_write_bytecode = False

# A shared machine makes single examples slow, which is no failure. In CI the examples are the same every time.
settings.register_profile("copus", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("copus")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nccl`, of the multi-process tests."""
    parser.addoption(
        "--nccl", action="store_true", help="ranks that tests start share this machine's GPUs, on NCCL 2.31 or newer"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from every suite that does not ask for them: without them the code under test runs on CPU and gloo,
    as in CI."""
    if config.option.nccl:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--nccl: no CUDA device")
        os.environ[ranks.NCCL] = "1"
    elif config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks come first: of two workers (`make test`), the last to finish then has a short file.

    Tests marked `gpu` are skipped where torch sees no CUDA device. Torch is imported only when there is such a test.
    """
    start_ranks = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in start_ranks)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

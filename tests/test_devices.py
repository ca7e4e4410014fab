"""Which device a rank gets, without any GPU: torch is told that there are some."""

import os

import pytest
import torch

from copus.devices import SHARING, check_accelerator, rank_device
from copus.hardware import peak_memory_bytes


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two of them; the devices that were made current, in order."""
    made_current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", made_current.append)
    monkeypatch.delenv(SHARING, raising=False)
    return made_current


def test_without_gpus_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert rank_device(3, 4) == torch.device("cpu")


def test_each_rank_has_a_gpu_of_its_own(two_gpus: list[torch.device]) -> None:
    assert [rank_device(rank, 2).index for rank in range(2)] == [0, 1]
    assert two_gpus == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_more_ranks_than_gpus_are_refused(two_gpus: list[torch.device]) -> None:
    with pytest.raises(ValueError, match=rf"accelerators_per_node\(4\) is more than the 2 GPUs .* \({SHARING}=1 "):
        rank_device(0, 4)
    assert not two_gpus


def test_more_ranks_than_gpus_share_them_where_nccl_lets_them(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARING, "1")
    assert [rank_device(rank, 4).index for rank in range(4)] == [0, 1, 0, 1]


def test_a_gpu_job_does_not_run_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_accelerator("cpu")
    with pytest.raises(ValueError, match=r"accelerator\(h100-sxm\): this machine shows no GPU"):
        check_accelerator("h100-sxm")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_accelerator("h100-sxm")


def test_memory_that_libraries_and_the_allocator_hold_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (50 * gib, 80 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 24 * gib)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 40 * gib)
    assert peak_memory_bytes() == 46 * gib  # 6 GiB beside torch


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "x:y"}])
def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(
    given: dict[str, str], two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    rank_device(0, 2)
    expected = {} if given else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in os.environ if name.endswith("ALLOC_CONF")} == {**given, **expected}

"""Which device a rank gets, without any GPU: torch is told that there are some."""

import pytest
import torch

from copus.devices import SHARING, check_accelerator, rank_device


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

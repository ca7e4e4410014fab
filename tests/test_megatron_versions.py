"""Two Megatrons from one code base: what is patched is there, and what nobody has tried is refused."""

from types import SimpleNamespace

import pytest

from copus.backends.megatron import versions


@pytest.mark.parametrize("installed", ["0.16.1", "0.19.2", "0.19.0rc1"])
def test_a_patch_replaces_what_it_names(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: installed)
    owner = SimpleNamespace(__name__="module", defect="upstream's")
    versions.patch(owner, "defect", "ours", oldest=(0, 16), newest=(0, 19))
    assert owner.defect == "ours"


def test_a_patch_of_other_versions_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.19.2")
    owner = SimpleNamespace(__name__="module", defect="upstream's")
    versions.patch(owner, "defect", "ours", oldest=(0, 16), newest=(0, 18))
    assert owner.defect == "upstream's"


def test_a_patch_with_nothing_to_replace_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.19.2")
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.19\.2 has no module\.gone, which copus replaces"):
        versions.patch(SimpleNamespace(__name__="module"), "gone", "ours", oldest=(0, 16), newest=(0, 19))


@pytest.mark.parametrize(
    ("installed", "supported"), [("0.15.3", False), ("0.16.1", True), ("0.19.2", True), ("0.20.0", False)]
)
def test_versions_that_were_never_tried_are_refused(
    installed: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: installed)
    if supported:
        versions.check_installed()
        return
    with pytest.raises(RuntimeError, match=rf"megatron-core {installed} is not supported: 0\.16 to 0\.19"):
        versions.check_installed()


def test_main_gradients_are_asked_for_by_the_name_that_there_is() -> None:
    old = SimpleNamespace(get_main_grads_for_grad_norm=lambda: ["old"])
    new = SimpleNamespace(get_grads_for_grad_norm=lambda: ["new"])
    assert (versions.main_grads(old), versions.main_grads(new)) == (["old"], ["new"])

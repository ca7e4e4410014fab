"""`copus watch --web`: the page is there for whoever has its address, on this machine, and follows the run."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from launch_events import step, write_run
from launch_jobs import copus_here
from told_run import write_told_run

import launch.web
from launch.web import HOST, Server

NEWS = """
new Promise((done) => {
  const tokens = () => document.querySelector('.tiles .value').textContent;
  const look = () => tokens() === '12.8 k' ? done(true) : setTimeout(look, 50);
  look();
})
"""
"""Waits until the page shows the tokens of the last step."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_told_run(tmp_path / "told")


@pytest.fixture
def server(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(launch.web, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(launch.web, "RENDERING_SHARE", 1e6)
    with Server(run) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(address: str, **headers: str) -> tuple[int, str, str]:
    """Status, text, version."""
    request = urllib.request.Request(address, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers.get("ETag") or ""
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), ""


def test_the_page_is_served_to_whoever_has_its_address_and_to_nobody_else(server: Server) -> None:
    assert server.server_address[0] == HOST == "127.0.0.1"
    status, text, _ = get(server.address)
    assert status == 200
    assert "<h1>told" in text
    assert "connect-src 'self'" in text
    root = server.address.removesuffix(f"{server.token}/")
    strangers = [
        root,
        f"{root}{'x' * len(server.token)}/",
        f"{server.address}../../etc/passwd",
        f"{server.address}job.yaml",
    ]
    assert [get(address)[:2] for address in strangers] == [(404, "")] * len(strangers)
    assert get(server.address, Host="evil.example")[:2] == (404, ""), "a name that was made to mean 127.0.0.1"
    assert get(server.address, Host=f"localhost:{server.server_port}")[0] == 200, "through a tunnel"


def test_news_come_without_the_library_and_only_if_there_are_any(server: Server, run: Path) -> None:
    status, text, version = get(f"{server.address}update")
    assert status == 200
    assert len(text) < 1_000_000
    assert get(f"{server.address}update", If_None_Match=version)[0] == 304
    write_run(run, step(400, 0.2, 16))
    status, text, newer = get(f"{server.address}update", If_None_Match=version)
    assert (status, newer != version) == (200, True)
    assert "12.8 k" in text


def test_a_page_has_no_part_in_what_a_frame_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("watch", str(run), "--web", "--once") == 2
    assert "--web is a page in a browser" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_news_and_keeps_what_was_chosen(server: Server, run: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.visit(server.address)
        tab.evaluate("document.querySelector('[data-view=overview-tokens]').click()")
        tab.evaluate("document.querySelector('#details summary').parentElement.open = true")
        write_run(run, step(400, 0.2, 16))
        assert tab.evaluate(NEWS)
        pressed = "document.querySelector('[data-view=overview-tokens]').getAttribute('aria-pressed')"
        assert tab.evaluate(pressed) == "true"
        assert tab.evaluate("document.querySelector('#details details').open")
        assert {address.startswith(server.address) for address in tab.requests} == {True}
        assert tab.complaints == []

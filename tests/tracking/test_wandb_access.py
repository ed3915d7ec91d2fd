"""Whether W&B can be reached is known before anything of it starts, within two seconds, and without a question."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import socket
import time
from pathlib import Path

import pytest
from wandb_server import Fault, WandbServer

from trietune.tracking.wandb.access import Access, find_access, is_installed, probe

KEY = "a" * 40


def access(tmp_path: Path, url: str = "http://127.0.0.1:9", **environ: str) -> Access:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return find_access({"HOME": str(home), "WANDB_BASE_URL": url, **environ}, working_directory=tmp_path, timeout_s=0.5)


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = access(tmp_path, WANDB_API_KEY=KEY)
    assert found.mode == "off"
    assert found.reason == "not installed, the run continues without it; `pip install 'trietune[wandb]'`"


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves a folder `wandb` in working directories; Python takes it for a namespace package."""
    spec = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert not is_installed("wandb")


@pytest.mark.parametrize("environ", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_disabled(tmp_path: Path, environ: dict[str, str]) -> None:
    assert access(tmp_path, **environ).mode == "off"


@pytest.mark.parametrize("mode", ["offline", "dryrun", "OFFLINE"])
def test_offline_needs_no_login_and_no_network(tmp_path: Path, mode: str) -> None:
    assert access(tmp_path, WANDB_MODE=mode) == Access("offline", "http://127.0.0.1:9")


def test_no_login_is_one_line_with_the_next_step(tmp_path: Path) -> None:
    found = access(tmp_path, url="https://api.wandb.ai")
    assert found.mode == "off"
    assert found.reason == "no login for api.wandb.ai, the run continues without it; `wandb login`, or WANDB_API_KEY"


def test_a_login_is_found_where_wandb_keeps_it(tmp_path: Path) -> None:
    with WandbServer() as server:
        assert access(tmp_path, server.url).mode == "off"
        assert access(tmp_path, server.url, WANDB_API_KEY=KEY).mode == "online"
        host = server.url.removeprefix("http://")
        (tmp_path / "home" / ".netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
        assert access(tmp_path, server.url).mode == "online"
        elsewhere = tmp_path / "netrc"
        elsewhere.write_text("machine api.wandb.ai login user password " + KEY)
        assert access(tmp_path, server.url, NETRC=str(elsewhere)).mode == "off"


def test_settings_files_of_wandb_count(tmp_path: Path) -> None:
    config = tmp_path / "home" / ".config" / "wandb"
    config.mkdir(parents=True)
    (config / "settings").write_text("[default]\nbase_url = http://127.0.0.1:10\nmode = offline\n")
    found = find_access({"HOME": str(tmp_path / "home")}, working_directory=tmp_path)
    assert found == Access("offline", "http://127.0.0.1:10")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    assert find_access({"HOME": str(tmp_path / "home")}, working_directory=tmp_path).mode == "off"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "answers with HTTP status 500"), ("hang", "did not answer"), ("garbage", "gives no usable answer")],
)
def test_a_server_in_trouble_means_offline(tmp_path: Path, fault: Fault, reason: str) -> None:
    with WandbServer(fault) as server:
        began = time.monotonic()
        found = access(tmp_path, server.url, WANDB_API_KEY=KEY)
        assert time.monotonic() - began < 1.5
    assert found.mode == "offline"
    assert found.reason is not None
    assert found.reason.startswith(f"{server.url} {reason}")


def test_a_refused_connection_means_offline(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening
        found = access(tmp_path, f"http://127.0.0.1:{held.getsockname()[1]}", WANDB_API_KEY=KEY)
    assert found.mode == "offline"
    assert "cannot be reached: [Errno 111] Connection refused" in str(found.reason)


def test_a_name_that_never_resolves_takes_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(30))
    began = time.monotonic()
    assert probe("http://wandb.example.org", 0.3) == "did not answer within 0.3 s"
    assert time.monotonic() - began < 1.0


def test_only_http_is_asked() -> None:
    assert probe("file:///etc/hostname", 0.5) == "is not an http address"

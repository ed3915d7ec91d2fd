"""A base model by hub id, against a hub on loopback: fetched, refused, gone, gated, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants
from pytest_httpserver import HTTPServer

from model.fake_hub import COMMIT, FakeHub, Repository
from trietune.errors import UserError
from trietune.model.base import hub as hub_module
from trietune.model.base.locate import locate_model

TOKEN = "hf_notarealtokenatall"
CONFIG = json.dumps({"model_type": "llama"}).encode()
FILES = {
    "config.json": CONFIG,
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.safetensors": b"the same weights again",
    "onnx/model.onnx": b"and again",
    "setup.py": b"print('hello')",
}


@pytest.fixture
def hub(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    endpoint = httpserver.url_for("").rstrip("/")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return FakeHub(httpserver, {"owner/tiny": Repository(dict(FILES))})


def test_a_hub_id_becomes_a_folder_and_its_commit(hub: FakeHub) -> None:
    found = locate_model("owner/tiny")
    assert (found.name, found.source, found.revision) == ("owner/tiny", "hub", COMMIT)
    assert (found.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_only_what_is_needed_is_fetched(hub: FakeHub) -> None:
    found = locate_model("owner/tiny")
    assert hub.fetched_files() == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert sorted(path.name for path in found.path.rglob("*")) == sorted(hub.fetched_files())


def test_a_second_time_fetches_nothing(hub: FakeHub) -> None:
    first = locate_model("owner/tiny")
    hub.requests.clear()
    assert locate_model("owner/tiny") == first
    assert hub.fetched_files() == set()


def test_a_revision_is_resolved_to_its_commit(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"] = Repository(dict(FILES), revisions=("main", "v2"), commit="b" * 40)
    found = locate_model("owner/tiny@v2")
    assert (found.name, found.revision) == ("owner/tiny", "b" * 40)
    assert locate_model(f"owner/tiny@{'b' * 40}") == found


def test_bytes_are_reported_while_they_come(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].files["model.safetensors"] = FILES["model.safetensors"] + bytes(300_000)
    seen: list[tuple[str, int, int | None]] = []
    locate_model("owner/tiny", progress=lambda *update: seen.append(update))
    assert {phase for phase, _, _ in seen} == {"fetching owner/tiny"}
    assert max(done for _, done, _ in seen) >= 300_000


def test_the_token_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["owner/tiny"].needs_token = TOKEN
    locate_model("owner/tiny")
    assert {request.headers.get("Authorization") for request in hub.requests} == {f"Bearer {TOKEN}"}


def _error(name: str) -> str:
    with pytest.raises(UserError) as caught:
        locate_model(name)
    assert TOKEN not in str(caught.value)
    assert caught.value.next_step
    return str(caught.value)


def test_gated_without_a_token(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].needs_token = TOKEN
    error = _error("owner/tiny")
    assert "`owner/tiny` is gated" in error
    assert f"{constants.ENDPOINT}/owner/tiny; no token was sent" in error
    assert "hf auth login" in error


def test_gated_with_a_token_that_may_not_read_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    hub.repositories["owner/tiny"].needs_token = TOKEN
    error = _error("owner/tiny")
    assert "is gated" in error
    assert "no token was sent" not in error


def test_misspelt_names_the_nearest(hub: FakeHub) -> None:
    error = _error("google/gema-1.1-2b-it")
    assert "the hub has no model `google/gema-1.1-2b-it`" in error
    assert "did you mean `google/gemma-1.1-2b-it`?" in error


def test_the_right_name_under_the_wrong_owner(hub: FakeHub) -> None:
    assert "did you mean `Qwen/Qwen2.5-0.5B-Instruct`?" in _error("qwenlm/Qwen2.5-0.5B-instruct")


def test_unlike_anything_asks_for_the_spelling(hub: FakeHub) -> None:
    assert "check the spelling" in _error("somebody/somewhat")


def test_a_refused_token_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "hf auth whoami" in _error("somebody/somewhat")


def test_no_such_revision(hub: FakeHub) -> None:
    error = _error("owner/tiny@v9")
    assert "`owner/tiny` has no revision `v9`" in error
    assert "model_name: owner/tiny" in error


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble(hub: FakeHub, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library waits and asks again; how long is its own affair.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken_with = status
    error = _error("owner/tiny")
    assert f"the hub answered {status}" in error
    assert "try again" in error


def test_a_hub_in_trouble_with_a_copy_on_the_disk(hub: FakeHub) -> None:
    first = locate_model("owner/tiny")
    hub.broken_with = 500
    said: list[str] = []
    assert locate_model("owner/tiny", report=said.append) == first
    assert said == [f"the hub answered 500; using the copy of owner/tiny on this disk, commit {COMMIT[:12]}"]


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 discards; nothing listens there.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = _error("owner/tiny")
    assert "is not on this disk, and the hub cannot be reached" in error
    assert "http://127.0.0.1:9" in error


def test_no_network_with_a_copy_on_the_disk(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate_model("owner/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert locate_model("owner/tiny", report=said.append) == first
    assert "cannot be reached" in said[0]


def test_half_a_copy_is_no_copy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate_model("owner/tiny")
    (found.path / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "is not on this disk, and the hub cannot be reached" in _error("owner/tiny")


def test_offline_and_not_in_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = _error("owner/tiny")
    assert "HF_HUB_OFFLINE prevents" in error
    assert "hf download owner/tiny" in error
    assert hub.requests == []


def test_offline_and_in_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate_model("owner/tiny")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_model("owner/tiny") == first
    assert hub.requests == []


def test_pickles_alone_are_refused_before_anything_is_fetched(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].files = {"config.json": CONFIG, "pytorch_model.bin": b"a pickle"}
    error = _error("owner/tiny")
    assert "`pytorch_model.bin`, a pickle" in error
    assert hub.fetched_files() == set()


def test_an_adapter_is_not_a_base_model(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    assert "is an adapter, not a base model" in _error("owner/tiny")


def test_gguf_alone(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].files = {"tiny.Q4_0.gguf": b"GGUF", "README.md": b""}
    assert "holds GGUF files only" in _error("owner/tiny")


def test_a_disk_too_small_is_said_before_the_first_byte(hub: FakeHub) -> None:
    hub.repositories["owner/tiny"].claimed_sizes = {"model.safetensors": 10**18}
    error = _error("owner/tiny")
    assert "needs 1000000000.0 GB of disk" in error
    assert "HF_HOME" in error
    assert hub.fetched_files() == set()


def test_a_disk_that_becomes_full(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    error = _error("owner/tiny")
    assert "the disk filled up while `owner/tiny` was being downloaded" in error
    assert "HF_HOME" in error


def test_free_space_is_not_asked_for_what_is_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    locate_model("owner/tiny")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    assert locate_model("owner/tiny").revision == COMMIT


def test_variables_of_the_hub_are_honored(httpserver: HTTPServer, tmp_path: Path) -> None:
    """A process of its own, because the hub's library reads them when it is imported."""
    hub = FakeHub(httpserver, {"owner/tiny": Repository(dict(FILES), needs_token=TOKEN)})
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": httpserver.url_for("").rstrip("/"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    script = "import sys; from trietune.model.base.locate import locate_model\n"
    script += "print(locate_model('owner/tiny').path); assert 'torch' not in sys.modules"
    online = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert online.returncode == 0, online.stderr
    assert online.stdout.startswith(str(tmp_path / "hf"))
    assert {request.headers.get("Authorization") for request in hub.requests} == {f"Bearer {TOKEN}"}

    hub.requests.clear()
    environ["HF_HUB_OFFLINE"] = "1"
    offline = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert offline.stdout == online.stdout, offline.stderr
    assert hub.requests == []

    shutil.rmtree(tmp_path / "hf")
    empty = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert "HF_HUB_OFFLINE prevents" in empty.stderr

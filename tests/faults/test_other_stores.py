"""The same upload, retention and download on Google's, Microsoft's and Hugging Face's stores, as emulators go."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub
from light_writer import contents_of, weights_at

from trietune.checkpoints.remote import retry as attempts
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.open import open_storage
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.uploads import fetch, synchronize
from trietune.checkpoints.store import CheckpointStore
from trietune.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
# The well-known account of the emulator, the same on every machine.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the emulator did not start")


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    program = shutil.which("gcp-storage-emulator") or shutil.which(
        "gcp-storage-emulator", path=Path(sys.executable).parent
    )
    if program is None:
        pytest.skip("gcp-storage-emulator is not installed")
    port = free_port()
    process = subprocess.Popen(
        [program, "start", f"--port={port}", "--host=127.0.0.1", "--in-memory", "--default-bucket=bucket"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, process)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "bucket/runs"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is not installed (npm install -g azurite)")
    port = free_port()
    process = subprocess.Popen(
        [program, "--blobPort", str(port), "--location", str(tmp_path / "blobs"), "--silent", "--skipApiVersionCheck"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, process)
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING",
            f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;",
        )
        import adlfs

        adlfs.AzureBlobFileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "bucket/runs"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        import huggingface_hub.constants

        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
        yield hub


@pytest.mark.parametrize("backend", ["gcs", "azure", "hf"])
def test_a_run_goes_there_and_comes_back(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place = "me/adapters/runs" if backend == "hf" else None
    fixture = request.getfixturevalue("hub" if backend == "hf" else backend)
    remote = RemoteRun(open_storage(backend, place or fixture), "run", policy())
    store = make_store(tmp_path / "a")
    for step in (1, 2, 3):
        save(store, step)
        synchronize(store, remote)
    copies = remote.scan()
    assert [(copy.step, copy.damage) for copy in copies] == [(2, None), (3, None)]
    other = make_store(tmp_path / "b")
    assert remote.find_run_id() == "run1"
    assert fetch(other, remote, "last") == [f"step-00000003 was copied from {remote.storage.location}"]
    loaded = other.load("last")
    assert loaded is not None
    assert loaded.contents == contents_of(weights_at(3), 3, 20_000)
    foreign = CheckpointStore(tmp_path / "a", "run2", 2, 0, "eval/loss", "min")
    with pytest.raises(UserError, match="another run"):
        synchronize(foreign, remote)


def test_on_the_hub_a_checkpoint_is_one_commit_in_a_private_repository(hub: FakeHub, tmp_path: Path) -> None:
    remote = RemoteRun(open_storage("hf", "me/adapters"), "run", policy())
    store = make_store(tmp_path)
    save(store, 1)
    synchronize(store, remote)
    assert hub.private == {"me/adapters"}
    assert len(hub.commits) == 1
    assert {path.rpartition("/")[2] for path in hub.commits[0]} == {*contents_of(b"", 1, 1), "manifest.json"}


def test_the_hub_is_not_asked_for_ever(hub: FakeHub, tmp_path: Path) -> None:
    remote = RemoteRun(open_storage("hf", "me/adapters"), "run", policy())
    store = make_store(tmp_path)
    save(store, 1)
    hub.answer_first = lambda method, path: 403
    with pytest.raises(Exception) as caught:
        synchronize(store, remote)
    assert attempts.status_of(caught.value) == 403
    assert len(hub.requests) <= 2
    assert "hunter2" not in attempts.describe(caught.value)


def make_store(folder: Path) -> CheckpointStore:
    folder.mkdir(parents=True, exist_ok=True)
    return CheckpointStore(folder, "run1", 2, 0, "eval/loss", "min")


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, contents_of(weights_at(step), step, 20_000), metrics={"eval/loss": 0.5})


def policy() -> RetryPolicy:
    def sleep(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    return RetryPolicy(sleep, 4, first_wait_s=0.01, longest_wait_s=0.05, randomness=random.Random(1))

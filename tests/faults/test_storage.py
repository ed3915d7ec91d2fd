"""S3 behind a proxy that misbehaves in every way that a network and a store can; other stores where they install."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from light_writer import contents_of, weights_at
from storage_proxy import Fault, Proxy, proxy_to

from fault_table import Tally
from trietune.checkpoints.remote import retry as attempts
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FsspecStorage
from trietune.checkpoints.remote.uploads import Uploader, fetch, synchronize
from trietune.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLIENT = Path(__file__).with_name("storage_client.py")
OUTAGE_S = float(os.environ.get("TRIETUNE_OUTAGE_S", "10"))


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()[1]
    moto.stop()


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_to(s3_port) as proxy:
        for name, value in client_environment(proxy).items():
            monkeypatch.setenv(name, value)
        import fsspec

        system = fsspec.filesystem("s3", skip_instance_cache=True)
        if system.exists("bucket"):
            system.rm("bucket", recursive=True)
        system.makedirs("bucket")
        proxy.forget()
        yield proxy


def client_environment(proxy: Proxy) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def policy(num_attempts: int = 4, longest_wait_s: float = 0.05) -> RetryPolicy:
    def sleep(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    return RetryPolicy(
        sleep, num_attempts, first_wait_s=0.01, longest_wait_s=longest_wait_s, randomness=random.Random(1)
    )


def remote_of(num_attempts: int = 4, *, read_timeout_s: float = 30) -> RemoteRun:
    timeouts = {"config_kwargs": {"connect_timeout": 30, "read_timeout": read_timeout_s}}
    return RemoteRun(FsspecStorage("s3", "bucket/runs", timeouts), "run", policy(num_attempts))


def make_store(folder: Path, keep_last_n: int = 2) -> CheckpointStore:
    folder.mkdir(parents=True, exist_ok=True)
    return CheckpointStore(folder, "run1", keep_last_n, 0, "eval/loss", "min")


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, contents_of(weights_at(step), step, 20_000), metrics={"eval/loss": 0.5})


def whole_copies(remote: RemoteRun) -> list[int]:
    """Steps whose manifest is there; each must be whole and downloadable."""
    found = []
    for copy in remote.scan():
        if copy.manifest is not None:
            assert copy.damage is None, copy.damage
            assert remote.download(copy)[1] == contents_of(weights_at(copy.step), copy.step, 20_000)
            found.append(copy.step)
    return found


def test_a_run_goes_to_s3_and_comes_back(proxy: Proxy, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a"), remote_of()
    for step in (1, 2, 3):
        save(store, step)
        synchronize(store, remote)
    assert whole_copies(remote) == [2, 3]
    other = make_store(tmp_path / "b")
    assert remote.find_run_id() == "run1"
    fetch(other, remote, "last")
    loaded = other.load("last")
    assert loaded is not None
    assert loaded.contents == contents_of(weights_at(3), 3, 20_000)
    assert remote.discard_unfinished() == 0


def start_client(run: Path, proxy: Proxy) -> subprocess.Popen[str]:
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **client_environment(proxy),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(CLIENT), str(run)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_client_killed_at_any_request_leaves_whole_copies_alone(
    moment: str, proxy: Proxy, tmp_path: Path, tally: Tally
) -> None:
    """The client uploads steps 2 and 3 and removes step 1, which is there and whole to begin with."""
    import fsspec

    def begin(folder: Path) -> None:
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        if system.exists("bucket/runs"):
            system.rm("bucket/runs", recursive=True)
        store = make_store(folder, keep_last_n=1)
        save(store, 1)
        synchronize(store, remote_of())
        proxy.forget()

    begin(tmp_path / "clean")
    client = start_client(tmp_path / "clean", proxy)
    output, errors = client.communicate()
    assert client.returncode == 0, errors
    num_requests = len(proxy.requests)
    assert whole_copies(remote_of()) == [3]
    failures = []
    for number in range(1, num_requests + 1):
        folder = tmp_path / f"{number}"
        begin(folder)
        client = start_client(folder, proxy)

        def kill(client: subprocess.Popen[str] = client) -> None:
            client.kill()
            client.wait()

        proxy.rule = lambda n, *_, kill=kill, number=number: Fault(**{moment: kill}) if n == number else None
        output, errors = client.communicate()
        assert client.returncode == -9, f"request {number} of {num_requests} never came: {output}{errors}"
        assert proxy.num_faults == 1
        proxy.forget()
        try:
            found = whole_copies(remote_of())
            copied = [int(line.split()[1]) for line in output.splitlines() if line.startswith("copied")]
            assert found, "no whole copy is left"
            assert max(found) >= max(copied, default=1), f"copied {copied}, found {found}"
            synchronize(make_store(folder, keep_last_n=1), remote_of())
            assert whole_copies(remote_of())[-1] == make_store(folder).scan()[-1].step
        except AssertionError as error:
            failures.append(f"request {number}: {error}")
    tally(f"SIGKILL {moment} each storage request", num_requests, num_requests - len(failures))
    assert num_requests >= 20
    assert not failures, "\n".join(failures)


TRANSIENT: dict[str, Fault] = {
    "500": Fault(status=500),
    "502": Fault(status=502),
    "503": Fault(status=503, headers={"Retry-After": "1"}),
    "408": Fault(status=408),
    "429 with Retry-After": Fault(status=429, headers={"Retry-After": "1"}),
    "a dropped connection": Fault(drop=True),
    "a slow answer": Fault(before=lambda: time.sleep(0.4)),
    "no answer in time": Fault(before=lambda: time.sleep(1.5)),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_an_upload_survives_one_request_in_three_failing(name: str, proxy: Proxy, tmp_path: Path, tally: Tally) -> None:
    store, remote = make_store(tmp_path), remote_of(9, read_timeout_s=1)
    save(store, 1)
    dice = random.Random(5)
    proxy.rule = lambda number, *_: TRANSIENT[name] if dice.random() < 1 / 3 else None
    synchronize(store, remote)
    num_faults = proxy.num_faults
    proxy.forget()
    assert num_faults >= 3
    assert whole_copies(remote_of()) == [1]
    tally(f"storage requests answered by {name}", num_faults, num_faults)


def test_an_answer_cut_in_the_middle_is_asked_for_again(proxy: Proxy, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a"), remote_of()
    save(store, 1)
    synchronize(store, remote)
    proxy.forget()
    seen = set()

    def cut_first_answers(number: int, method: str, path: str) -> Fault | None:
        if method == "GET" and "adapter_model" in path and path not in seen:
            seen.add(path)
            return Fault(drop=True, after_bytes=1000)
        return None

    proxy.rule = cut_first_answers
    other = make_store(tmp_path / "b")
    fetch(other, remote, "last")
    assert proxy.num_faults == 1
    assert other.load("last") is not None


def test_a_download_that_lies_is_not_believed(proxy: Proxy, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a"), remote_of()
    save(store, 1)
    save(store, 2)
    synchronize(store, remote)
    proxy.forget()

    def flip(body: bytes) -> bytes:
        return body[:-1] + bytes([body[-1] ^ 1])

    proxy.rule = lambda number, method, path: (
        Fault(change=flip) if method == "GET" and "step-00000002/adapter_model" in path else None
    )
    other = make_store(tmp_path / "b")
    notes = fetch(other, remote, "last")
    assert proxy.num_faults >= 1
    assert "step-00000002 is not whole" in notes[0]
    assert [item.step for item in other.scan()] == [1]


def test_an_upload_that_arrives_short_is_sent_again(proxy: Proxy, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path), remote_of()
    save(store, 1)
    system = remote.storage._system  # type: ignore[attr-defined]

    def shorten() -> None:
        system.pipe_file("bucket/runs/run/checkpoints/step-00000001/optimizer.safetensors", b"short")

    spoiled = []

    def spoil_once(number: int, method: str, path: str) -> Fault | None:
        if method == "PUT" and "trainer_state" in path and not spoiled:
            spoiled.append(path)
            return Fault(status=503, before=lambda: None)
        return None

    proxy.rule = spoil_once
    real_put = remote.storage.put

    def put(sources: Any) -> None:
        real_put(sources)
        if sources[0][0].endswith("trainer_state.json") and len(spoiled) == 1:
            spoiled.append("short")
            shorten()

    remote.storage.put = put  # type: ignore[method-assign]
    synchronize(store, remote)
    assert spoiled[1:] == ["short"]
    assert whole_copies(remote) == [1]


def test_a_permanent_refusal_costs_one_request(proxy: Proxy, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path), remote_of(6)
    save(store, 1)
    proxy.rule = lambda *_: Fault(status=403)
    with pytest.raises(Exception) as caught:
        synchronize(store, remote)
    assert len(proxy.requests) == 1
    assert attempts.status_of(caught.value) == 403
    assert "hunter2" not in attempts.describe(caught.value)


def test_training_goes_on_while_the_store_is_away_and_catches_up(proxy: Proxy, tmp_path: Path, tally: Tally) -> None:
    seconds = OUTAGE_S
    longest_wait_s = min(30.0, seconds / 10)
    store = make_store(tmp_path)
    uploader = Uploader(store, remote_of(2), resumed_step=None, longest_wait_s=longest_wait_s)
    uploader.start()
    proxy.rule = lambda *_: Fault(drop=True)
    begun, step, longest, news = time.monotonic(), 0, 0.0, []
    while time.monotonic() - begun < seconds:
        step += 1
        before = time.monotonic()
        save(store, step)
        uploader.saved()
        news += uploader.news()
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.3)
    assert proxy.num_faults > 5
    assert whole_on_disk(store) == [step - 1, step]
    assert [sentence for sentence in news if "training continues" in sentence] == news, "more was said than the failure"
    num_faults = proxy.num_faults
    proxy.rule = lambda *_: None
    deadline = time.monotonic() + 2 * longest_wait_s + 30
    while not any("is back" in sentence for sentence in news):
        assert time.monotonic() < deadline, f"the copies did not catch up by themselves: {news}"
        time.sleep(0.1)
        news += uploader.news()
    assert whole_copies(remote_of()) == [step - 1, step]
    result = uploader.close(60)
    assert result.is_complete, result
    assert whole_copies(remote_of()) == [step - 1, step]
    assert longest < 5, "a save waited for the store"
    tally(f"saves while the store was away for {seconds:g} s, {num_faults} requests dropped", step, step)


def test_a_store_that_stays_away_leaves_everything_here_for_later(proxy: Proxy, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    uploader = Uploader(store, remote_of(2), resumed_step=None, longest_wait_s=0.5)
    uploader.start()
    proxy.rule = lambda *_: Fault(before=lambda: time.sleep(0.2), drop=True)
    save(store, 1)
    uploader.saved()
    begun = time.monotonic()
    result = uploader.close(3)
    assert time.monotonic() - begun < 5
    assert (result.is_complete, result.missing) == (False, ("step-00000001",))
    proxy.forget()
    assert whole_on_disk(store) == [1]
    assert synchronize(store, remote_of()).is_complete
    assert whole_copies(remote_of()) == [1]


def whole_on_disk(store: CheckpointStore) -> list[int]:
    return [item.step for item in store.scan() if item.damage is None]


def test_remains_of_a_killed_upload_in_parts_are_dropped(proxy: Proxy) -> None:
    remote = remote_of()
    system = remote.storage._system  # type: ignore[attr-defined]
    for key in ("runs/run/checkpoints/step-00000001/big", "runs/other/big"):
        system.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    assert remote.discard_unfinished() == 1
    left = system.list_multipart_uploads("bucket")
    assert [upload["Key"] for upload in left] == ["runs/other/big"]

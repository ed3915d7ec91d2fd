"""Copies elsewhere: payload first, manifest last, tried again when it helps, never over another run's."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from trietune.checkpoints.overview import list_checkpoints
from trietune.checkpoints.remote import retry as attempts
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.open import open_storage
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FolderStorage, FsspecStorage, Storage
from trietune.checkpoints.remote.uploads import Uploader, fetch, synchronize
from trietune.checkpoints.store import CheckpointStore
from trietune.errors import UserError


class Answered(Exception):  # noqa: N818
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__("https://user:hunter2@host/?sig=hunter2")
        self.status_code = status
        self.headers = headers or {}


class Flaky:
    """A storage that notes every request and fails when told to."""

    is_atomic = False

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.location = inner.location
        self.requests: list[tuple[str, str]] = []
        self.failure: Callable[[int], BaseException | None] = lambda number: None

    def _ask(self, verb: str, key: str) -> None:
        self.requests.append((verb, key))
        if failure := self.failure(len(self.requests)):
            raise failure

    def put(self, sources: Sequence[tuple[str, Path]]) -> None:
        for source in sources:
            self._ask("put", source[0])
            self.inner.put([source])

    def get(self, key: str, max_bytes: int) -> bytes:
        self._ask("get", key)
        return self.inner.get(key, max_bytes)

    def list(self, prefix: str) -> dict[str, int]:
        self._ask("list", prefix)
        return self.inner.list(prefix)

    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._ask("delete", key)
            self.inner.delete([key])

    def discard_unfinished(self, prefix: str) -> int:
        return self.inner.discard_unfinished(prefix)


def policy(waits: list[float] | None = None, **changes: Any) -> RetryPolicy:
    def sleep(seconds: float) -> bool:
        if waits is not None:
            waits.append(seconds)
        return False

    return RetryPolicy(sleep=sleep, randomness=random.Random(1), **changes)


def make_store(run: Path, **changes: Any) -> CheckpointStore:
    run.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "run_id": "run1", "keep_last_n": 3, "keep_best_n": 0, "metric": "eval/loss", "mode": "min",
    }  # fmt: skip
    return CheckpointStore(run, **{**settings, **changes})


def save(store: CheckpointStore, step: int, loss: float = 0.5, salt: str = "") -> Path:
    contents = {"adapter_model.safetensors": f"weights{salt} {step}".encode() * 50, "adapter_config.json": b"{}\n"}
    return store.save(step, contents, metrics={"eval/loss": loss}).path


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Flaky]:
    if request.param == "folder":
        yield Flaky(open_storage("local", str(tmp_path / "mirror")))
    else:
        yield Flaky(FsspecStorage("memory", "bucket/runs"))
        fsspec.filesystem("memory").store.clear()


def test_a_copy_is_whole_and_comes_back_on_an_empty_machine(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a" / "run"), RemoteRun(storage, "run", policy())
    for step in (50, 100):
        save(store, step)
    (store.run_directory / "metrics.jsonl").write_text("{}\n")
    result = synchronize(store, remote)
    assert (result.uploaded, result.is_complete) == (("step-00000100", "step-00000050"), True)
    assert storage.exists("run/metrics.jsonl")

    empty = tmp_path / "b" / "run"
    empty.mkdir(parents=True)
    run_id = remote.find_run_id()
    assert run_id is not None
    other = make_store(empty, run_id=run_id)
    assert fetch(other, remote, "last") == [f"step-00000100 was copied from {storage.location}"]
    loaded, original = other.load("last"), store.load("last")
    assert loaded is not None
    assert original is not None
    assert loaded.contents == original.contents
    assert (other.folder / "step-00000100" / "manifest.json").read_bytes() == (
        store.folder / "step-00000100" / "manifest.json"
    ).read_bytes()
    assert fetch(other, remote, "last") == []


def test_the_manifest_is_put_last_and_deleted_first(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run", keep_last_n=1), RemoteRun(storage, "run", policy())
    for step in (50, 100):
        save(store, step)
        synchronize(store, remote)
    puts = [key.rpartition("/")[2] for verb, key in storage.requests if verb == "put"]
    assert puts == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"] * 2
    deleted = [key.split("/", 2)[2] for verb, key in storage.requests if verb == "delete"]
    assert deleted[0] == "step-00000050/manifest.json"
    assert len(deleted) == 3
    assert [copy.step for copy in remote.scan()] == [100]


def test_the_same_bytes_are_not_sent_twice_and_others_replace_them(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    path = save(store, 50)
    remote.upload(path)
    before = len(storage.requests)
    remote.upload(path)
    assert [verb for verb, _ in storage.requests[before:]] == ["list", "get"]
    save(store, 50, salt="new")
    before = len(storage.requests)
    remote.upload(path)
    changes = [(verb, key.rpartition("/")[2]) for verb, key in storage.requests[before:] if verb in ("put", "delete")]
    assert changes[0] == ("delete", "manifest.json")
    assert changes[-1] == ("put", "manifest.json")
    assert remote.download(remote.scan()[0])[1]["adapter_model.safetensors"].startswith(b"weightsnew")


def test_a_foreign_run_is_an_error_and_is_left_alone(storage: Flaky, tmp_path: Path) -> None:
    theirs, ours = make_store(tmp_path / "a" / "run", run_id="theirs"), make_store(tmp_path / "b" / "run")
    remote = RemoteRun(storage, "run", policy())
    save(theirs, 50)
    synchronize(theirs, remote)
    save(ours, 100)
    before = storage.list("run")
    for action in (lambda: synchronize(ours, remote), lambda: fetch(ours, remote, "last")):
        with pytest.raises(UserError, match="holds checkpoints of another run"):
            action()
    assert storage.list("run") == before


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_answers_are_tried_again(storage: Flaky, tmp_path: Path, status: int) -> None:
    waits: list[float] = []
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy(waits))
    path = save(store, 50)
    storage.failure = lambda number: Answered(status, {"Retry-After": "7"}) if number % 2 else None
    remote.upload(path)
    assert len(waits) == len(storage.requests) / 2
    assert min(waits) >= 7


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
def test_permanent_answers_are_asked_once(storage: Flaky, tmp_path: Path, status: int) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    path = save(store, 50)
    storage.failure = lambda number: Answered(status)
    with pytest.raises(Answered):
        remote.upload(path)
    assert len(storage.requests) == 1


def test_attempts_end(storage: Flaky) -> None:
    waits: list[float] = []
    storage.failure = lambda number: ConnectionResetError()
    with pytest.raises(ConnectionResetError):
        RemoteRun(storage, "run", policy(waits, num_attempts=4)).scan()
    assert len(storage.requests) == 4
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0 <= waits[2] <= 2.0


def test_an_upload_cut_at_any_request_never_shows_a_manifest_without_its_payload(
    storage: Flaky, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "run", keep_last_n=1)
    remote = RemoteRun(storage, "run", policy(num_attempts=1))
    save(store, 50)
    synchronize(store, remote)
    save(store, 100)
    number_of_requests = None
    for cut in range(1, 100):
        storage.requests.clear()
        storage.failure = lambda number, cut=cut: Answered(403) if number >= cut else None
        try:
            synchronize(store, remote, final=False)
        except Answered:
            storage.failure = lambda number: None
            whole = [copy.step for copy in remote.scan() if copy.damage is None]
            assert whole, f"no whole copy after a cut at request {cut}"
            for copy in remote.scan():
                assert copy.damage is None or "did not finish" in copy.damage
        else:
            number_of_requests = cut - 1
            break
    assert number_of_requests is not None
    assert number_of_requests >= 8, "the cuts reached every kind of request"
    storage.failure = lambda number: None
    assert [copy.step for copy in remote.scan()] == [100]


def test_a_changed_download_is_not_believed_and_the_next_is_taken(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a" / "run"), RemoteRun(storage, "run", policy())
    for step in (50, 100, 150):
        save(store, step)
    synchronize(store, remote)
    wrong = tmp_path / "wrong"
    good = (store.folder / "step-00000150" / "adapter_model.safetensors").read_bytes()
    wrong.write_bytes(good[:-1] + b"x")
    storage.put([("run/checkpoints/step-00000150/adapter_model.safetensors", wrong)])
    wrong.write_bytes(good[:9])
    storage.put([("run/checkpoints/step-00000100/adapter_model.safetensors", wrong)])
    other = make_store(tmp_path / "b" / "run")
    notes = fetch(other, remote, "last")
    assert "step-00000150 is not whole" in notes[0]
    assert "adapter_model.safetensors has 9 of" in notes[1]
    assert "step-00000050 was copied" in notes[2]


def test_best_and_path_are_fetched_too(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "a" / "run"), RemoteRun(storage, "run", policy())
    for step, loss in ((50, 0.3), (100, 0.1), (150, 0.2)):
        save(store, step, loss)
    synchronize(store, remote)
    other = make_store(tmp_path / "b" / "run")
    fetch(other, remote, "best")
    fetch(other, remote, "path", other.folder / "step-00000050")
    assert [item.step for item in other.scan()] == [50, 100]


def test_a_damaged_local_one_is_healed_from_its_copy(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    path = save(store, 50)
    synchronize(store, remote)
    (path / "adapter_config.json").write_bytes(b"[]\n")
    fetch(store, remote, "last")
    loaded = store.load("last")
    assert loaded is not None
    assert loaded.contents["adapter_config.json"] == b"{}\n"
    assert (store.folder / ".damaged-step-00000050-1").is_dir()


def test_a_newer_local_one_is_not_overruled(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    save(store, 50)
    synchronize(store, remote)
    save(store, 100)
    (store.folder / "step-00000050").rename(tmp_path / "elsewhere")
    assert fetch(store, remote, "last") == []


def test_going_back_replaces_the_line_that_was_given_up(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    for step in (50, 100, 150):
        save(store, step)
    synchronize(store, remote)
    store.set_aside_newer(50)
    assert fetch(store, remote, "last") == [], "a checkpoint that was given up does not come back"
    save(store, 75, salt="new")
    synchronize(store, remote, resumed_step=50)
    assert [copy.step for copy in remote.scan()] == [50, 75]


def test_a_restart_on_an_empty_machine_keeps_the_best_copy(storage: Flaky, tmp_path: Path) -> None:
    limits = {"keep_last_n": 1, "keep_best_n": 1}
    store, remote = make_store(tmp_path / "a" / "run", **limits), RemoteRun(storage, "run", policy())
    save(store, 50, 0.1)
    save(store, 100, 0.4)
    synchronize(store, remote)
    other = make_store(tmp_path / "b" / "run", **limits)
    fetch(other, remote, "last")
    save(other, 150, 0.3)
    synchronize(other, remote, resumed_step=100)
    assert [copy.step for copy in remote.scan()] == [50, 150]


def test_a_checkpoint_that_is_uploaded_is_not_removed_meanwhile(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run", keep_last_n=1), RemoteRun(storage, "run", policy())
    save(store, 50)

    def save_during_upload(number: int) -> None:
        if storage.requests[-1][0] == "put" and number < 10:
            storage.failure = lambda number: None
            save(store, 100)
            assert [item.step for item in store.scan()] == [50, 100]

    storage.failure = save_during_upload
    synchronize(store, remote)
    assert [copy.step for copy in remote.scan()] == [100]


def uploader_for(store: CheckpointStore, storage: Storage) -> Uploader:
    remote = RemoteRun(storage, "run", RetryPolicy(sleep=lambda s: False, first_wait_s=0.01, longest_wait_s=0.02))
    return Uploader(store, remote, resumed_step=None, longest_wait_s=0.05)


def test_uploads_happen_in_the_background_and_are_drained(storage: Flaky, tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", keep_last_n=2)
    uploader = uploader_for(store, storage)
    uploader.start()
    for step in (50, 100, 150):
        save(store, step)
        uploader.saved()
    result = uploader.close(20)
    assert result.is_complete
    assert [copy.step for copy in RemoteRun(storage, "run", policy()).scan()] == [100, 150]


def test_a_foreign_run_is_an_error_before_training(storage: Flaky, tmp_path: Path) -> None:
    theirs = make_store(tmp_path / "a" / "run", run_id="theirs")
    save(theirs, 50)
    synchronize(theirs, RemoteRun(storage, "run", policy()))
    with pytest.raises(UserError, match="another run"):
        uploader_for(make_store(tmp_path / "b" / "run"), storage).start()


def test_a_storage_that_cannot_be_read_is_a_refusal_to_resume_and_not_to_train(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    storage.failure = lambda number: Answered(403)
    for read in (remote.find_run_id, lambda: fetch(store, remote, "last")):
        with pytest.raises(UserError, match=r"cannot be read: the store answered 403 \(no right\)") as caught:
            read()
        assert caught.value.exit_code == 6
        assert "hunter2" not in str(caught.value)
    uploader = uploader_for(store, storage)
    uploader.start()
    storage.failure = lambda number: None
    assert uploader.close(20).is_complete


def test_an_outage_is_said_once_and_caught_up_with(storage: Flaky, tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    uploader = uploader_for(store, storage)
    storage.failure = lambda number: ConnectionRefusedError()
    uploader.start()
    save(store, 50)
    uploader.saved()
    wait_until(lambda: len(storage.requests) > 20)
    assert [text for text in uploader.news() if "no copy" in text]
    storage.failure = lambda number: None
    result = uploader.close(20)
    assert result.is_complete
    assert [text for text in uploader.news() if "is back" in text]
    assert [copy.step for copy in RemoteRun(storage, "run", policy()).scan()] == [50]


def test_a_storage_that_stays_away_is_waited_for_within_bounds_and_synced_later(storage: Flaky, tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    uploader = uploader_for(store, storage)
    storage.failure = lambda number: TimeoutError()
    uploader.start()
    save(store, 50)
    uploader.saved()
    started = time.monotonic()
    result = uploader.close(0.5)
    assert time.monotonic() - started < 2
    assert (result.is_complete, result.missing) == (False, ("step-00000050",))
    assert result.error == "the store did not answer in time"
    storage.failure = lambda number: None
    assert synchronize(store, RemoteRun(storage, "run", policy())).is_complete


def test_a_permanent_refusal_is_not_asked_for_ever(storage: Flaky, tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    uploader = uploader_for(store, storage)
    storage.failure = lambda number: Answered(403)
    uploader.start()
    save(store, 50)
    uploader.saved()
    time.sleep(0.5)
    assert len(storage.requests) <= 3, "one at the start, one for each turn"
    result = uploader.close(20)
    assert result.error == "the store answered 403 (no right)"
    assert "hunter2" not in " ".join(uploader.news())


def test_a_second_signal_ends_the_drain(storage: Flaky, tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    uploader = uploader_for(store, storage)
    uploader.start()
    storage.failure = lambda number: time.sleep(3)
    save(store, 50)
    uploader.saved()
    started = time.monotonic()
    result = uploader.close(60, must_leave=lambda: time.monotonic() - started > 0.3)
    assert time.monotonic() - started < 1.5
    assert not result.is_complete


def test_the_list_shows_both_places(storage: Flaky, tmp_path: Path) -> None:
    store, remote = make_store(tmp_path / "run"), RemoteRun(storage, "run", policy())
    save(store, 50, 0.4)
    save(store, 100, 0.3)
    synchronize(store, remote)
    save(store, 150, 0.35)
    (store.folder / "step-00000050").rename(tmp_path / "gone")
    (store.folder / "step-00000150" / "adapter_config.json").unlink()
    rows = list_checkpoints(store, remote)
    assert [(row.step, row.place, row.is_best, row.metric) for row in rows] == [
        (50, "remote", False, 0.4), (100, "both", True, 0.3), (150, "local", False, None),
    ]  # fmt: skip
    assert rows[2].damage == "adapter_config.json is missing"
    assert rows[0].size_bytes > 0


@pytest.mark.parametrize(
    "path",
    ["s3://KEY:hunter2@bucket/x", "https://host/x?sig=hunter2", "ftp://me:hunter2@host/x", "b/x?X-Amz-Signature=1"],
)
def test_credentials_in_the_path_are_refused_and_not_repeated(path: str) -> None:
    with pytest.raises(UserError, match="carries a password") as caught:
        open_storage("s3", path)
    assert "hunter2" not in str(caught.value)


def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`storage_backend: floppy` is unknown"):
        open_storage("floppy", "disk/1").list("x")


def test_keys_do_not_leave_the_folder(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    for key in ("../x", "a/../../x", "/etc/passwd", "a//b", ""):
        with pytest.raises(ValueError, match="is not a key"):
            storage.get(key, 1)


def test_leftovers_of_a_killed_copy_are_dropped(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".staging-manifest.json-0123456789ab").write_text("{")
    assert storage.list("run") == {}
    assert RemoteRun(storage, "run", policy()).discard_unfinished() == 1


def test_descriptions_never_quote() -> None:
    assert attempts.describe(Answered(503)) == "the store answered 503"
    assert attempts.describe(RuntimeError("https://user:hunter2@host")) == "RuntimeError"
    assert attempts.describe(PermissionError("hunter2")) == "no right to do that"
    assert attempts.describe(ConnectionRefusedError(111, "hunter2")) == "Connection refused"


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)

"""One run's checkpoints: what is saved is listed, loaded, retained, and fallen back from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from trietune.checkpoints.store import CheckpointStore
from trietune.errors import UserError
from trietune.io import directory, files
from trietune.io.disk_errors import SaveFailed


def make_store(folder: Path, **changes: Any) -> CheckpointStore:
    settings: dict[str, Any] = {
        "run_id": "run1", "keep_last_n": 3, "keep_best_n": 0, "metric": "eval/loss", "mode": "min",
    }  # fmt: skip
    return CheckpointStore(folder, **{**settings, **changes})


def contents_of(step: int) -> dict[str, Any]:
    return {"adapter_model.safetensors": f"weights of {step}".encode() * 100, "optimizer.safetensors": b"moments"}


def save(store: CheckpointStore, step: int, loss: float | None = None) -> Path:
    return store.save(step, contents_of(step), metrics={} if loss is None else {"eval/loss": loss}).path


def damage(path: Path, name: str = "adapter_model.safetensors") -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def steps(store: CheckpointStore) -> list[int]:
    return [item.step for item in store.scan()]


def test_the_newest_is_loaded_with_the_bytes_that_were_saved(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (50, 100):
        store.save(step, contents_of(step), metrics={"eval/loss": 0.1}, details={"seed": 7})
    loaded = make_store(tmp_path).load("last")
    assert loaded is not None
    assert (loaded.step, loaded.contents, loaded.details, loaded.notes) == (100, contents_of(100), {"seed": 7}, ())


def test_last_falls_back_and_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    paths = {step: save(store, step) for step in (50, 100, 150)}
    damage(paths[150])
    (paths[100] / "optimizer.safetensors").unlink()
    loaded = store.load("last")
    assert loaded is not None
    assert loaded.step == 50
    assert loaded.notes == (
        "step-00000150 is not whole: adapter_model.safetensors does not hold the bytes that were written "
        "(its SHA-256 differs); resuming from step-00000050",
        "step-00000100 is not whole: optimizer.safetensors is missing; resuming from step-00000050 "
        "(`--allow-change optimizer_state` would resume from step-00000100 with a fresh optimizer)",
    )


def test_best_is_by_metric_and_falls_back_to_the_newest(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last_n=9)
    paths = {step: save(store, step, loss) for step, loss in [(50, 0.3), (100, 0.1), (150, float("nan")), (200, 0.2)]}
    loaded = store.load("best")
    assert loaded is not None
    assert loaded.step == 100
    damage(paths[100])
    loaded = store.load("best")
    assert loaded is not None
    assert loaded.step == 200
    assert "step-00000100 is not whole" in loaded.notes[0]


def test_best_without_any_value_takes_the_newest_and_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 50)
    loaded = store.load("best")
    assert loaded is not None
    assert loaded.notes == ("no whole checkpoint has a value for `eval/loss`; using the newest instead",)


def test_all_damaged_refuses_and_is_no_fresh_start(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (50, 100):
        damage(save(store, step))
    with pytest.raises(UserError, match="none of the 2 checkpoints") as caught:
        store.load("last", fresh_if_none=True)
    assert caught.value.exit_code == 6
    assert "step-00000100 is not whole" in str(caught.value)


def flip(path: Path) -> None:
    damage(path, "optimizer.safetensors")


def cut(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 3)


def remove(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


@pytest.mark.parametrize("harm", [flip, cut, remove])
@pytest.mark.parametrize("option", ["last", "best", "path"])
def test_a_damaged_optimizer_is_left_out_only_when_allowed(tmp_path: Path, option: Any, harm: Any) -> None:
    store = make_store(tmp_path)
    path = save(store, 50, 0.5)
    whole = store.load(option, path, expendable={"optimizer.safetensors"})
    assert whole is not None
    assert (whole.left_out, whole.notes, set(whole.contents)) == (frozenset(), (), set(contents_of(50)))
    harm(path)
    with pytest.raises(UserError, match="--allow-change optimizer_state") as caught:
        store.load(option, path)
    assert caught.value.exit_code == 6
    loaded = store.load(option, path, expendable={"optimizer.safetensors"})
    assert loaded is not None
    assert loaded.contents == {"adapter_model.safetensors": contents_of(50)["adapter_model.safetensors"]}
    assert loaded.left_out == {"optimizer.safetensors"}
    assert "it is left out, as `--allow-change optimizer_state` says" in loaded.notes[-1]
    damage(path)
    with pytest.raises(UserError, match="adapter_model"):
        store.load(option, path, expendable={"optimizer.safetensors"})


def test_a_newer_one_with_a_damaged_optimizer_is_passed_over_unless_it_is_allowed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 50)
    flip(save(store, 100))
    for allowed, step in ((set(), 50), ({"optimizer.safetensors"}, 100)):
        loaded = store.load("last", expendable=allowed)
        assert loaded is not None
        assert loaded.step == step
        assert "--allow-change optimizer_state" in loaded.notes[0]


def test_nothing_there_is_a_fresh_start_only_when_asked_for(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.load("last", fresh_if_none=True) is None
    with pytest.raises(UserError, match="there is no checkpoint to resume from") as caught:
        store.load("last")
    assert caught.value.exit_code == 6
    (tmp_path / "checkpoints" / ".damaged-step-00000050-1").mkdir(parents=True)
    with pytest.raises(UserError, match="but there were some"):
        store.load("last", fresh_if_none=True)


def test_path_takes_one_of_this_run_through_links_and_relative_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "läufe und mehr" / "run"
    run.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(run)
    store = make_store(link)
    save(store, 50)
    save(store, 100)
    monkeypatch.chdir(run)
    loaded = store.load("path", Path("checkpoints/step-00000050"))
    assert loaded is not None
    assert loaded.step == 50


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "`resume_option: path` needs `checkpoint_path`, which is empty"),
        ("nowhere", "does not exist"),
        (".", "is not a checkpoint of this run"),
    ],
)
def test_a_path_that_is_not_ours_names_the_newest_whole_one(tmp_path: Path, path: str | None, message: str) -> None:
    store = make_store(tmp_path)
    newest = save(store, 50)
    with pytest.raises(UserError) as caught:
        store.load("path", None if path is None else tmp_path / path)
    assert message in str(caught.value)
    assert f"checkpoint_path: {newest}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_damaged_path_refuses_and_names_another(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 50)
    path = save(store, 100)
    damage(path)
    with pytest.raises(UserError) as caught:
        store.load("path", path)
    assert caught.value.exit_code == 6
    assert "step-00000050 is whole" in str(caught.value)


@pytest.mark.parametrize("what", ["run id", "step", "link"])
def test_what_is_not_this_runs_checkpoint_is_neither_loaded_nor_removed(tmp_path: Path, what: str) -> None:
    other = make_store(tmp_path / "other", run_id="run1" if what != "run id" else "run2")
    (tmp_path / "other").mkdir()
    (tmp_path / "ours").mkdir()
    path = save(other, 50)
    store = make_store(tmp_path / "ours", keep_last_n=1)
    save(store, 100)
    guest = store.folder / ("step-00000060" if what == "step" else "step-00000050")
    guest.symlink_to(path) if what == "link" else path.rename(guest)
    save(store, 150)
    assert {item.step for item in store.scan() if item.damage} == {int(guest.name[5:])}
    assert steps(store)[-1] == 150
    assert os.path.lexists(guest)


def test_retention_keeps_last_and_best(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last_n=2, keep_best_n=1)
    for step, loss in [(50, 0.40), (100, 0.31), (150, 0.5), (200, 0.35), (250, float("nan")), (300, 0.33)]:
        save(store, step, loss)
    assert steps(store) == [100, 250, 300]


def test_keeping_none_still_keeps_the_last_whole_one(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last_n=0)
    for step in (50, 100):
        save(store, step, 0.1)
    assert steps(store) == [100]


def test_before_the_newest_goes_the_best_is_read_in_full(tmp_path: Path) -> None:
    save(make_store(tmp_path, keep_last_n=0, keep_best_n=1), 50, 0.1)
    damage(tmp_path / "checkpoints" / "step-00000050")
    saved = make_store(tmp_path, keep_last_n=0, keep_best_n=1).save(100, contents_of(100), metrics={"eval/loss": 0.9})
    assert saved.removed == ()
    loaded = make_store(tmp_path).load("last")
    assert loaded is not None
    assert loaded.step == 100


def test_pinned_and_resumed_ones_stay(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last_n=1)
    save(store, 50)
    with store.pinned(50) as is_there:
        assert is_there
        save(store, 100)
        assert steps(store) == [50, 100]
    save(store, 150)
    assert steps(store) == [150]
    with store.pinned(100) as is_there:
        assert not is_there


def test_going_back_sets_newer_ones_aside_and_deletes_none(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last_n=9)
    for step in (50, 100, 150):
        save(store, step)
    moved = store.set_aside_newer(50)
    assert [path.name for path in moved] == ["abandoned-1-step-00000150", "abandoned-1-step-00000100"]
    assert steps(store) == [50]
    directory.verify_directory(moved[1])
    assert store.set_aside_newer(50) == []
    save(store, 100)
    assert store.set_aside_newer(50)[0].name == "abandoned-2-step-00000100"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission to write"),
        (errno.EIO, "dmesg"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_a_failed_save_says_what_to_do_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    store = make_store(tmp_path)
    save(store, 50)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", fail)
        with pytest.raises(SaveFailed) as caught:
            save(store, 100)
    assert caught.value.number == number
    assert remedy in str(caught.value)
    assert "step-00000050 is whole and stays" in str(caught.value)
    assert steps(store) == [50]
    save(store, 150)
    assert steps(store) == [50, 150]


def test_a_removal_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, keep_last_n=1)
    save(store, 50)

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_file", fail)
        saved = store.save(100, contents_of(100))
    assert list(saved.warnings) == [
        "step-00000050 is removed, but a file of it stays on the disk: Permission denied; the next start tries again"
    ]
    assert [path.name for path in saved.removed] == ["step-00000050"]
    assert steps(store) == [100]
    assert len(store.clean_leftovers()) == 1
    assert [entry.name for entry in store.folder.iterdir()] == ["step-00000100"]


def test_logs_reach_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_flush_file, real_rename = files.flush_file, files.rename
    monkeypatch.setattr(files, "flush_file", lambda path: (order.append(path.name), real_flush_file(path)))
    monkeypatch.setattr(files, "rename", lambda old, new: (order.append(new.name), real_rename(old, new)))
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 50}\n')
    make_store(tmp_path).save(50, contents_of(50), flush_first=[log, tmp_path / "batches.jsonl"])
    assert order == ["metrics.jsonl", "step-00000050"]


def test_a_second_spelling_of_a_step_is_not_a_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 50).rename(store.folder / "step-0000000050")
    assert store.scan() == []


def test_leftovers_of_the_whole_run_are_cleaned_and_nothing_else(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 50)
    ours = [
        tmp_path / ".staging-adapter-0123456789ab",
        tmp_path / ".staging-metrics.jsonl-0123456789ab",
        tmp_path / ".staging-.run-id-0123456789ab",
        tmp_path / ".staging-report.html-0123456789ab",
        tmp_path / ".staging-config.yaml-0123456789ab",
        store.folder / ".staging-step-00000100-0123456789ab",
    ]
    strangers = [tmp_path / ".staging-notes-0123456789ab", tmp_path / "adapter-copy", store.folder / "mine"]
    for path in ours + strangers:
        path.mkdir()
    assert sorted(store.clean_leftovers()) == sorted(ours)
    assert all(path.is_dir() for path in strangers)
    assert store.clean_leftovers() == []

"""Flipped bits, cut files, full and read-only disks: always seen, always said, never believed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from light_writer import contents_of, make_store, weights_at

from fault_table import Tally
from trietune.checkpoints.lock import RunLock
from trietune.checkpoints.resume import abandon_lines, keep_run_id, new_run_id
from trietune.errors import UserError
from trietune.io.directory import DamagedDirectory, read_directory, verify_directory
from trietune.io.disk_errors import SaveFailed


def save(run: Path, step: int, size: int = 2_000) -> Path:
    return make_store(run).save(step, contents_of(weights_at(step), step, size), metrics={"eval/loss": 0.5}).path


def damage_at_random(folder: Path, num_damages: int) -> tuple[int, list[str]]:
    """Damages made to a whole checkpoint, one after another and undone, and those that no reader noticed."""
    randomness = random.Random(3)
    path = save(folder, 50)
    originals = {file.name: file.read_bytes() for file in path.iterdir()}
    missed = []
    for number in range(num_damages):
        name = randomness.choice(sorted(originals))
        data = bytearray(originals[name])
        if number % 5 == 4:
            what = f"cut to {(length := randomness.randrange(len(data)))}"
            del data[length:]
        elif number % 5 == 3:
            what = "one byte more"
            data.append(randomness.randrange(256))
        else:
            position, bit = randomness.randrange(len(data)), randomness.randrange(8)
            what = f"bit {bit} of byte {position}"
            data[position] ^= 1 << bit
        assert bytes(data) != originals[name]
        (path / name).write_bytes(data)
        for reader in (verify_directory, read_directory):
            try:
                reader(path)
                missed.append(f"{name}, {what}: not noticed by {reader.__name__}")
            except DamagedDirectory as damage:
                if damage.file != name:
                    missed.append(f"{name}, {what}: blamed on {damage.file}")
        (path / name).write_bytes(originals[name])
    verify_directory(path)
    return num_damages, missed


@pytest.mark.slow
def test_10000_damages_are_all_noticed_and_the_file_is_named(tmp_path: Path, tally: Tally) -> None:
    num_done, missed = damage_at_random(tmp_path, 10_000)
    tally("flipped bits, cut and longer files", num_done, num_done - len(missed))
    assert not missed, "\n".join(missed[:5])


def test_damages_are_noticed(tmp_path: Path) -> None:
    assert damage_at_random(tmp_path, 200) == (200, [])


def test_every_checkpoint_damaged_is_a_refusal(tmp_path: Path) -> None:
    for step in (50, 100):
        os.truncate(save(tmp_path, step) / "manifest.json", 100)
    with pytest.raises(UserError) as caught:
        make_store(tmp_path).load("last", fresh_if_none=True)
    assert caught.value.exit_code == 6


@contextmanager
def mounted_tmpfs(point: Path, options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    point.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=256k", "size=3m,nr_inodes=14"])
def test_a_disk_that_is_full_keeps_what_it_has_and_takes_the_next_when_there_is_room(
    options: str, tmp_path: Path
) -> None:
    with mounted_tmpfs(tmp_path / "small", options) as disk:
        limit = 20 if "inodes" in options else 1
        steps, failure = [], None
        for step in range(1, limit):
            try:
                steps.append(int(save(disk, step, size=40_000).name[5:]))
            except SaveFailed as error:
                failure = error
                break
        if "inodes" not in options:
            with pytest.raises(SaveFailed) as caught:
                save(disk, 1, size=40_000)
            failure = caught.value
        assert failure is not None, "the disk never filled up"
        assert failure.number == errno.ENOSPC
        assert "free some space" in str(failure)
        store = make_store(disk)
        assert [item.step for item in store.scan() if item.damage is None] == steps[-2:]
        assert not list(disk.rglob(".staging*"))
        subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=100", str(disk)], check=True)
        save(disk, 30)
        loaded = make_store(disk).load("last")
        assert loaded is not None
        assert loaded.step == 30


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_file_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.io import directory

    monkeypatch.setattr(directory, "check_space", lambda folder, num_bytes: None)
    with mounted_tmpfs(tmp_path / "small", "size=300k") as disk:
        save(disk, 1, size=100_000)
        with pytest.raises(SaveFailed) as caught:
            save(disk, 2, size=250_000)
        assert caught.value.number == errno.ENOSPC
        assert "step-00000001 is whole and stays" in str(caught.value)
        assert [entry.name for entry in (disk / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_a_mount_that_turns_read_only_is_named_and_still_read(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=8m") as disk:
        save(disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(SaveFailed) as caught:
            save(disk, 2)
        assert caught.value.number == errno.EROFS
        with pytest.raises(UserError, match="cannot be written to"), RunLock(disk):
            pass
        loaded = make_store(disk).load("last")
        assert loaded is not None
        assert loaded.step == 1
        with pytest.raises(UserError, match="could not be written"):
            keep_run_id(disk, new_run_id())


@pytest.mark.slow
def test_a_folder_that_root_itself_may_not_change(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    if subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode != 0:
        pytest.skip("this file system has no immutable flag, or we may not set it")
    try:
        with pytest.raises(SaveFailed) as caught:
            save(tmp_path, 2)
        assert caught.value.number == errno.EPERM
        assert "permission to write" in str(caught.value)
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    import resource

    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(SaveFailed) as caught:
            save(tmp_path, 2, size=200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.number == errno.EFBIG
    assert [item.step for item in make_store(tmp_path).scan()] == [1]


@pytest.mark.slow
def test_another_user_can_read_what_the_umask_lets_him(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    before = os.umask(0o022)
    try:
        (tmp_path / "run").mkdir()
        path = save(tmp_path / "run", 1)
    finally:
        os.umask(before)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder not in (Path("/"), Path("/tmp")):
            folder.chmod(folder.stat().st_mode | 0o055)
    names = sorted(file.name for file in path.iterdir())
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "cat", *[str(path / n) for n in names]],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"".join((path / name).read_bytes() for name in names)


def test_a_log_on_a_full_disk_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune.io import files

    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write", fail)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        abandon_lines(log, 1)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]

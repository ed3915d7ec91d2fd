"""A directory is whole or absent; readers believe nothing that they did not check."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from trietune.checkpoints.retention import STEP_NAME
from trietune.io import directory, files, manifest
from trietune.io.directory import (
    DamagedDirectory,
    LazyContent,
    clean_leftovers,
    read_directory,
    remove_directory,
    verify_directory,
    write_directory,
)
from trietune.io.disk_errors import SaveFailed
from trietune.io.manifest import ManifestInfo

INFO = ManifestInfo(run_id="run-1", step=50, metrics={"eval/loss": 0.5, "eval/accuracy": float("nan")})
CONTENTS = {"adapter_model.safetensors": b"weights" * 1000, "adapter_config.json": b"{}\n", "empty.bin": b""}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = write_directory(tmp_path / "step-00000050", CONTENTS, info=INFO)
    found, contents = read_directory(written.path)
    assert contents == CONTENTS
    assert found == written.manifest or found.info.metrics == {"eval/loss": 0.5, "eval/accuracy": None}
    assert verify_directory(written.path).extra == ()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000050"]


def test_a_streamed_file_is_hashed_on_its_way(tmp_path: Path) -> None:
    pieces = [os.urandom(3 * 2**20 + 1) for _ in range(3)]
    size = sum(map(len, pieces))
    written = write_directory(tmp_path / "adapter", {"big.bin": LazyContent(size, lambda: iter(pieces))}, info=INFO)
    assert read_directory(written.path)[1]["big.bin"] == b"".join(pieces)


def test_a_streamed_file_that_breaks_its_word_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"big\.bin has 5 bytes, 6 were promised"):
        write_directory(tmp_path / "adapter", {"big.bin": LazyContent(6, lambda: iter([b"123", b"45"]))}, info=INFO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["create_file", "write", "flush", "close"])
def test_a_streamed_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fail_always(monkeypatch, call)
    with pytest.raises(SaveFailed, match="adapter was not saved: Input/output error"):
        write_directory(tmp_path / "adapter", {"big.bin": LazyContent(6, lambda: iter([b"123", b"456"]))}, info=INFO)
    assert list(tmp_path.iterdir()) == []


def test_space_is_looked_for_before_a_streamed_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: _Usage(free=2**20))
    with pytest.raises(SaveFailed, match=r"1,000,000 bytes and one megabyte to spare"):
        write_directory(tmp_path / "adapter", {"big.bin": LazyContent(10**6, lambda: pytest.fail("asked"))}, info=INFO)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        written = write_directory(tmp_path / "adapter", CONTENTS, info=INFO)
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in written.path.iterdir()} == {0o640}


@pytest.mark.parametrize("name", [*CONTENTS, "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    written = write_directory(tmp_path / "adapter", CONTENTS, info=INFO)
    (written.path / name).unlink()
    with pytest.raises(DamagedDirectory) as caught:
        verify_directory(written.path)
    assert (caught.value.file, caught.value.reason) == (name, "is missing")


def test_a_short_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    written = write_directory(tmp_path / "adapter", CONTENTS, info=INFO)
    os.truncate(written.path / "adapter_model.safetensors", 1234)
    with pytest.raises(DamagedDirectory, match=r"adapter_model\.safetensors has 1,234 of 7,000 bytes"):
        read_directory(written.path)


def test_every_flipped_bit_of_a_manifest_is_damage() -> None:
    data = manifest.serialize(manifest.Manifest(INFO, {"a.bin": manifest.FileEntry(1, "0" * 64)}))
    manifest.parse(data)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(manifest.ManifestError):
                manifest.parse(bytes(flipped))


def test_a_newer_format_is_refused_by_name() -> None:
    data = manifest.serialize(manifest.Manifest(INFO, {})).replace(b'"1.0"', b'"1.7"')
    with pytest.raises(manifest.ManifestError, match=r"its format 1\.7 is newer than 1\.0"):
        manifest.parse(data)


def test_a_damaged_directory_in_the_way_is_moved_aside_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "step-00000050"
    for number in (1, 2):
        write_directory(target, CONTENTS, info=INFO)
        (target / "adapter_config.json").write_bytes(b"[]\n")
        written = write_directory(target, CONTENTS, info=INFO)
        assert written.moved_aside == tmp_path / f".damaged-step-00000050-{number}"
        assert (written.moved_aside / "adapter_config.json").read_bytes() == b"[]\n"
    verify_directory(target)


def test_a_whole_directory_in_the_way_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_directory(target, CONTENTS, info=INFO)
    write_directory(target, {"new.bin": b"new"}, info=INFO)
    assert read_directory(target)[1] == {"new.bin": b"new"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_replaced_directory_comes_back_when_its_successor_never_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step-00000050"
    write_directory(target, CONTENTS, info=INFO)
    real_rename = files.rename

    def stop_before_the_last_rename(source: Path, to: Path) -> None:
        if to == target:
            raise KeyboardInterrupt
        real_rename(source, to)

    monkeypatch.setattr(files, "rename", stop_before_the_last_rename)
    monkeypatch.setattr(files, "discard", lambda path: None)
    with pytest.raises(KeyboardInterrupt):
        write_directory(target, {"new.bin": b"new"}, info=INFO)
    assert not target.exists()
    monkeypatch.undo()
    assert len(clean_leftovers(tmp_path, STEP_NAME)) == 2
    assert read_directory(target)[1] == CONTENTS
    assert clean_leftovers(tmp_path, STEP_NAME) == []


@pytest.mark.parametrize("call", ["make_folder", "create_file", "write", "flush", "close", "rename"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_directory(tmp_path / "step-00000050", CONTENTS, info=INFO)
    calls = fail_always(monkeypatch, call)
    with pytest.raises(SaveFailed, match="step-00000100 was not saved: Input/output error"):
        write_directory(tmp_path / "step-00000100", CONTENTS, info=INFO)
    assert calls == [call], "a failed call is never tried again"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000050"]


def fail_always(monkeypatch: pytest.MonkeyPatch, call: str) -> list[str]:
    """Let a function of `files` fail; returns the list that notes each call."""
    calls = []
    real = getattr(files, call)

    def fail(*arguments: object) -> object:
        calls.append(call)
        if call == "close":
            real(*arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, call, fail)
    return calls


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: _Usage(free=2**20))
    with pytest.raises(SaveFailed, match=r"No space left on device \(7,003 bytes and one megabyte to spare") as caught:
        write_directory(tmp_path / "adapter", CONTENTS, info=INFO)
    assert caught.value.number == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_removal_hides_first_and_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("stays")
    written = write_directory(tmp_path / "step-00000050", CONTENTS, info=INFO)
    (written.path / "link").symlink_to(outside)
    remove_directory(written.path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["outside"]
    assert (outside / "precious").read_text() == "stays"


def test_cleaning_touches_only_names_of_ours(tmp_path: Path) -> None:
    strangers = [".staging-step-00000050", ".staging-notes-0123456789ab", ".removed-x", "step-1.tmp", ".git"]
    ours = [".staging-step-00000050-0123456789ab", ".removed-step-00000100-ffffffffffff"]
    for name in strangers + ours:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    dealt_with = clean_leftovers(tmp_path, STEP_NAME)
    assert sorted(path.name for path in dealt_with) == sorted(ours)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(strangers)

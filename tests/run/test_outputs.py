"""What a command is asked to write is a new file or replaces a plain one; links and devices are left alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from trietune import load_config, train
from trietune.cli.app import main


@pytest.fixture
def run(overrides: dict[str, object]) -> Path:
    return train(load_config(None, overrides)).directory


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")


KINDS: dict[str, Callable[[Path], object]] = {
    "a device": make_device,
    "a link": lambda path: path.symlink_to("target"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_refused_and_stays(
    kind: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "target").write_text("mine")
    place = tmp_path / "place"
    KINDS[kind](place)
    before = place.lstat()
    for command in (
        ["predict", str(run), "--text", "a", "--output", str(place)],
        ["report", str(run), "--out", str(place)],
        ["evaluate", str(run), "--predictions", str(place)],
        ["init", "sst2", "--out", str(place)],
    ):
        assert main(command) == 2, command
        assert capfd.readouterr().err.startswith("error: ")
        now = place.lstat()
        assert (now.st_mode, now.st_ino, now.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert (tmp_path / "target").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    (run / "report.html").unlink()
    KINDS[kind](run / "report.html")
    assert main(["report", str(run)]) == 2, "its usual place is no other"


def test_the_schema_beside_a_new_configuration_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "trietune.schema.json").symlink_to("mine")
    assert main(["init", "sst2"]) == 2
    assert "trietune.schema.json" in capfd.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "sst2.yaml").exists(), "nothing is half done"


def test_a_missing_folder_is_said_before_anything_slow(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["predict", "nowhere/at/all", "--text", "a", "--output", str(tmp_path / "no" / "a.jsonl")]) == 2
    assert f"mkdir -p {tmp_path / 'no'}" in capfd.readouterr().err


def test_a_dash_is_standard_output(run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capfd.readouterr()
    assert main(["predict", str(run), "--text", "a fine film", "--text", "dull", "--output", "-"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [record["input"] for record in records] == ["a fine film", "dull"]
    assert main(["report", str(run), "--out", "-"]) == 0
    assert capfd.readouterr().out.startswith("<!doctype html>")
    assert not Path("-").exists()

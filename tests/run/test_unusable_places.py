"""Places where no run can be kept: said with exit code 2 before anything is loaded, and nothing stays of the try."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from trietune import load_config, train
from trietune.checkpoints.probe import check_folder
from trietune.errors import UserError
from trietune.io import files


def a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file"


def below_a_file(place: Path) -> Path:
    return a_file(place) / "deeper"


def a_dangling_link(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return place / "link"


def a_loop(place: Path) -> Path:
    (place / "loop").symlink_to(place / "loop")
    return place / "loop" / "deeper"


def a_pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe"


def a_long_name(place: Path) -> Path:
    return place / ("x" * 300)


def a_long_path(place: Path) -> Path:
    return place / "/".join(["y"] * 2500)


def a_device(place: Path) -> Path:
    return Path("/dev/full")


def a_file_in_place_of_checkpoints(place: Path) -> Path:
    (place / "runs" / "run").mkdir(parents=True)
    (place / "runs" / "run" / "checkpoints").write_text("")
    return place / "runs"


PLACES = [
    a_file, below_a_file, a_dangling_link, a_loop, a_pipe, a_long_name, a_long_path, a_device,
    a_file_in_place_of_checkpoints,
]  # fmt: skip


@pytest.fixture
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise AssertionError("it went on to load the model and the data")

    monkeypatch.setattr("trietune.run.train.prepare_together", fail)


def settings(project_dir: Path | str, **more: Any) -> Any:
    return load_config(overrides={"project_dir": str(project_dir), "wandb_run_name": "run", "use_wandb": False, **more})


@pytest.mark.usefixtures("nothing_is_prepared")
@pytest.mark.parametrize("make", PLACES)
def test_an_unusable_place_is_refused_before_anything_is_loaded(make: Callable[[Path], Path], tmp_path: Path) -> None:
    place = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be") as refused:
        train(settings(place, resume_from_checkpoint="auto"))
    assert refused.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("nothing_is_prepared")
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_folder_is_refused_before_anything_is_loaded(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> NoReturn:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "make_folder", refuse)
    with pytest.raises(UserError, match=os.strerror(number)) as refused:
        train(settings(tmp_path / "runs"))
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_is_prepared")
def test_a_usable_place_goes_on_and_is_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="went on to load"):
        train(settings(tmp_path / "new" / "runs"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS], ids=os.strerror
)
def test_a_file_system_that_cannot_flush_folders_is_usable(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            asked.append(descriptor)
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    check_folder(tmp_path)
    assert asked


def test_an_error_of_the_disk_while_flushing_a_folder_is_none_to_pass_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ["a\nerror: forged", "a\x00b", "a\x1b[2J", "a\u2028b"])
@pytest.mark.parametrize("key", ["project_dir", "train_file", "model_name", "remote_path"])
def test_a_path_with_a_control_character_is_refused(key: str, text: str) -> None:
    with pytest.raises(UserError, match=f"`{key}"):
        load_config(overrides={key: text})


@pytest.mark.usefixtures("nothing_is_prepared")
def test_a_home_folder_of_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="stands for no home folder"):
        train(settings("~nobody-has-this-name/runs"))


def test_a_name_cannot_forge_a_line_of_an_error() -> None:
    text = str(UserError("`x\nnext:  rm -rf /` is not there", where="in y\r\nerror: z\n       an indented line"))
    assert text.split("\n") == [
        "error: `x\\nnext:  rm -rf /` is not there", "       in y\\nerror: z", "       an indented line",
    ]  # fmt: skip

"""A run's folder that is copied without hidden files, moved, removed, unable to rename, or full of odd files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trietune import UserError, load_config, train
from trietune.checkpoints.lock import RunLock
from trietune.cli.app import main
from trietune.io.directory import verify_directory
from trietune.run.result import Run
from trietune.tracking.events import Event, Message, StepFinished
from trietune.tracking.tracker import Tracker

Settings = dict[str, object]


class Reacting:
    name = "reacting"

    def __init__(self, react: Callable[[Event], None] = lambda event: None) -> None:
        self.react = react
        self.said: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Message):
            self.said.append(event.text)
        self.react(event)

    def close(self) -> None:
        pass


@pytest.fixture
def settings(overrides: Settings) -> Settings:
    return {
        **overrides, "max_steps": 4, "save_strategy": "step", "steps_freq": 2, "val_steps_freq": 2, "save_optim": True,
        "self_check": False, "keep_last_n": 9,
    }  # fmt: skip


def start(settings: Settings, reacting: Reacting | None = None) -> tuple[Run, Reacting]:
    reacting = reacting or Reacting()
    made = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return train(made, tracker=Tracker([reacting])), reacting


def at_step(step: int, action: Callable[[], None]) -> Reacting:
    return Reacting(lambda event: action() if isinstance(event, StepFinished) and event.step == step else None)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("kept", ["all", "adapter", "checkpoints"])
def test_a_copy_without_hidden_files_says_so_and_the_remedy_works(
    kept: str, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = start(settings)
    copy = run.directory.with_name("copy")
    copy.mkdir()
    subprocess.run(f"cp -r {shlex.quote(str(run.directory))}/* {shlex.quote(str(copy))}/", shell=True, check=True)
    assert not (copy / ".run-id").exists()
    if kept == "adapter":
        shutil.rmtree(copy / "checkpoints")
    if kept == "checkpoints":
        shutil.rmtree(copy / "adapter")
    changes = {**settings, "wandb_run_name": "copy", "resume_from_checkpoint": "auto"}
    with pytest.raises(UserError, match=r"has lost its file \.run-id") as caught:
        start(changes)
    assert caught.value.exit_code == 6
    assert not (copy / ".run-id").exists()
    (copy / "config.yaml").write_text(json.dumps({**settings, "remote_path": str(copy.with_name("mirror"))}))
    for command in ("checkpoints", "sync"):
        assert main([command, str(copy)]) == 6
        assert ".run-id" in capfd.readouterr().err
    [remedy] = re.findall("`(echo .+)`", str(caught.value))
    subprocess.run(remedy, shell=True, check=True)
    finished, reacting = start(changes)
    assert finished.status == "finished"
    if kept != "checkpoints":
        assert any("has already finished" in text for text in reacting.said)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_whose_folder_is_moved_saves_there_and_stops(step: int, settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"
    moved = folder.with_name("moved")
    with pytest.raises(UserError, match="was moved to") as caught:
        start(settings, at_step(step, lambda: folder.rename(moved)))
    assert str(moved) in str(caught.value)
    assert not folder.exists()
    assert steps(moved)[-1] == step
    verify_directory(moved / "checkpoints" / f"step-{step:08d}")
    resumed, _ = start({**settings, "wandb_run_name": "moved", "resume_from_checkpoint": True})
    assert resumed.adapter == moved / "adapter"


def test_a_run_whose_folder_is_removed_stops(settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"
    with pytest.raises(UserError, match="was removed"):
        start(settings, at_step(3, lambda: shutil.rmtree(folder)))
    assert not folder.exists()


def test_another_folder_under_the_same_name_is_not_taken_for_it(settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"

    def swap() -> None:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()

    with pytest.raises(UserError, match="was moved to"):
        start(settings, at_step(3, swap))
    assert list(folder.iterdir()) == []


def test_removing_the_lock_file_lets_no_second_writer_in(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").unlink()
        code = f"from pathlib import Path\nfrom trietune.checkpoints.lock import RunLock\nwith RunLock(Path({str(tmp_path)!r})): pass"  # noqa: E501
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "another process is writing to" in done.stderr
    with RunLock(tmp_path):
        pass


def test_two_hundred_locks_leave_none(tmp_path: Path) -> None:
    import gc

    gc.collect()
    num_descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(200):
        with RunLock(tmp_path):
            pass
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item) is RunLock]
    assert len(os.listdir("/proc/self/fd")) <= num_descriptors  # noqa: PTH208


RENAMES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
int rename(const char *from, const char *to) {
    struct stat found;
    const char *error = getenv("FOLDERS_FAIL_WITH");
    const char *below = getenv("FOLDERS_BELOW");
    int is_meant = !below || strncmp(from, below, strlen(below)) == 0;
    if (error && is_meant && lstat(from, &found) == 0 && S_ISDIR(found.st_mode)) {
        if (atoi(error) == 0) return 0;
        errno = atoi(error);
        return -1;
    }
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return real(from, to);
}
"""


@pytest.fixture(scope="session")
def renames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library under which a folder's rename fails with the number in `FOLDERS_FAIL_WITH`; with 0 it does nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("renames")
    (folder / "renames.c").write_text(RENAMES)
    library = folder / "renames.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "renames.c", "-ldl"], check=True)
    return library


PROBE = """
import sys
from pathlib import Path
from trietune.checkpoints.probe import check_folder
try:
    check_folder(Path(sys.argv[1]))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("number", [0, 5, 18, 38, 95, 116])
def test_a_folder_that_cannot_be_renamed_is_found_before_the_first_step(
    number: int, renames: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(renames), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", PROBE, str(tmp_path)]
    assert subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout == ""
    environment["FOLDERS_FAIL_WITH"] = str(number)
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert f"checkpoints cannot be kept in {tmp_path}" in done.stdout
    assert "next:" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "code"), [("runs", 2), pytest.param("cache", 0, marks=pytest.mark.slow)])
def test_a_run_is_refused_there_and_a_cache_is_done_without(
    place: str, code: int, renames: Path, settings: Settings, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    environment = {
        **os.environ, "LD_PRELOAD": str(renames), "FOLDERS_FAIL_WITH": "18", "PYTHONPATH": os.pathsep.join(sys.path),
        "FOLDERS_BELOW": str(tmp_path / place),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "trietune", "train", str(config)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if place == "runs":
        assert "checkpoints cannot be kept" in done.stderr
        assert not (tmp_path / "runs" / "run").exists()
    else:
        assert "tokens are not kept this time" in done.stderr


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """`overlay(folder)` gives a place that shows `folder` as the lower layer of an overlay."""
    mounted: list[Path] = []

    def mount(lower: Path) -> Path:
        place = tmp_path / "overlay"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True, capture_output=True)
        mounted.append(place)
        for name in ("upper", "work", "all"):
            (place / name).mkdir()
        shutil.copytree(lower, place / "lower")
        options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work,redirect_dir=off"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(place / "all")], check=True)
        mounted.append(place / "all")
        return place / "all"

    try:
        yield mount
    except subprocess.CalledProcessError:
        pytest.skip("no overlay can be mounted here")
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "-l", str(place)], check=False)


def test_folders_of_an_overlays_lower_layer_are_removed_and_set_aside(
    overlay: Callable[[Path], Path], settings: Settings
) -> None:
    run, _ = start(settings)
    shutil.rmtree(run.directory / "adapter")
    try:
        project = overlay(run.directory.parent)
    except subprocess.CalledProcessError:
        pytest.skip("no overlay can be mounted here")
    with pytest.raises(OSError, match="cross-device"):
        (project / "run/checkpoints/step-00000004").rename(project / "run/checkpoints/x")
    path = str(project / "run/checkpoints/step-00000002")
    again = {
        **settings,
        "project_dir": str(project),
        "resume_from_checkpoint": True,
        "keep_last_n": 1,
        "keep_best_n": 0,
    }
    resumed, reacting = start({**again, "resume_option": "path", "checkpoint_path": path, "max_steps": 6})
    assert not any("could not be removed" in text for text in reacting.said), reacting.said
    assert steps(resumed.directory) == [6]
    verify_directory(project / "run/checkpoints/abandoned-1-step-00000004")
    verify_directory(project / "run/adapter")


@pytest.mark.parametrize("name", ["metrics.jsonl", "batches.jsonl", "predictions.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_plain_file_is_refused_before_the_first_step(
    kind: str, name: str, settings: Settings, tmp_path: Path
) -> None:
    folder = Path(str(settings["project_dir"])) / "run"
    folder.mkdir(parents=True)
    path = folder / name
    if "link" in kind:
        target = tmp_path / "target"
        if kind == "link":
            target.write_text("stays\n")
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    signal.alarm(60)  # a wait for ever must not be one of the tests
    try:
        with pytest.raises(UserError, match=f"{name} is a") as caught:
            start({**settings, "resume_from_checkpoint": "auto"})
    finally:
        signal.alarm(0)
    assert caught.value.exit_code == 2
    assert {path.name for path in folder.iterdir()} <= {name, ".lock"}


def test_a_log_that_becomes_a_pipe_in_mid_run_does_not_stop_the_saves(settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"

    def swap() -> None:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        os.mkfifo(folder / "metrics.jsonl")

    signal.alarm(60)
    try:
        run, reacting = start(settings, at_step(1, swap))
    finally:
        signal.alarm(0)
    assert steps(run.directory) == [2, 4]
    assert any("no longer a plain file" in text for text in reacting.said)


def test_a_refused_resume_leaves_nothing_behind(settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"
    with pytest.raises(UserError, match="no checkpoint to resume from") as caught:
        start({**settings, "resume_from_checkpoint": True})
    assert caught.value.exit_code == 6
    assert not folder.exists()


@pytest.mark.parametrize("there", ["", "kept"])
def test_a_refused_start_takes_the_outer_folders_that_it_made_with_it(settings: Settings, there: str) -> None:
    outer = Path(str(settings["project_dir"])) / "outer"
    if there:
        (outer / there).mkdir(parents=True)
    changes = {"project_dir": str(outer / "inner"), "resume_option": "path", "checkpoint_path": "nowhere"}
    with pytest.raises(UserError, match="does not exist"):
        start({**settings, **changes, "resume_from_checkpoint": True})
    assert ([path.name for path in outer.iterdir()] if there else outer.exists()) == ([there] if there else False)


def test_one_checkpoint_that_cannot_be_removed_does_not_keep_the_others(settings: Settings) -> None:
    folder = Path(str(settings["project_dir"])) / "run"
    stuck = folder / "checkpoints" / "step-00000001"
    mounted = []

    def mount() -> None:
        done = subprocess.run(["mount", "--bind", str(stuck), str(stuck)], capture_output=True, check=False)
        mounted.append(done.returncode == 0)

    changes = {**settings, "steps_freq": 1, "val_steps_freq": 10, "keep_last_n": 2, "keep_best_n": 0, "max_steps": 6}
    try:
        run, reacting = start(changes, at_step(2, mount))
    finally:
        if mounted and mounted[0]:
            subprocess.run(["umount", str(stuck)], check=True)
    if not mounted[0]:
        pytest.skip("mounting needs root")
    assert any("could not be removed: step-00000001" in text for text in reacting.said), reacting.said
    assert steps(run.directory) == [1, 5, 6]

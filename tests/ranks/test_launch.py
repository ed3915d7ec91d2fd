"""`--nproc`: who fell is said, the others end, exit codes and signals pass through, restarts go on with `--resume`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ranks.test_runs import command_line, trietune
from trietune.cli.app import main
from trietune.ranks.launch import environment_of, launch

# Small stand-ins for a training, which need no torch.
WAITS = "import time; time.sleep(60)"


def script(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, signal; rank = os.environ['RANK']\n{text}"]


def run(text: str, count: int = 3, restarts: int = 0) -> tuple[int, str]:
    said: list[str] = []
    code = launch(script(text), count, restarts=restarts, say=said.append)
    return code, "\n".join(said)


def test_all_ending_well_is_well() -> None:
    assert run("") == (0, "")


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    code, _ = run(f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(' '.join(os.environ[n] for n in {names}))")
    assert code == 0
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 3, 1)))
    for number in range(3):
        assert (tmp_path / str(number)).read_text() == f"{number} 3 {number} 3 127.0.0.1 {threads}"


def test_threads_that_were_set_stay() -> None:
    assert environment_of(0, 2, 1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert environment_of(0, 10_000, 1, {})["OMP_NUM_THREADS"] == "1"


def test_a_killed_process_is_named_and_the_others_end() -> None:
    began = time.monotonic()
    code, said = run(f"os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else None\n{WAITS}")
    assert code == 7
    assert "error: rank 1 of 3 (process " in said
    assert "was killed by SIGKILL; the others were ended" in said
    assert "`--resume` resumes from the newest whole checkpoint" in said
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("code", [2, 5, 6])
def test_a_mistake_ends_all_with_its_code_and_without_a_word(code: int) -> None:
    assert run(f"sys.exit({code})") == (code, "")


def test_a_messenger_is_not_called_the_culprit() -> None:
    code, said = run("sys.exit(7) if rank == '2' else None\n" + WAITS)
    assert code == 7
    assert not said  # the messenger has said who it was, and what comes next


def test_a_failure_that_is_missed_before_it_has_ended_gives_the_code() -> None:
    text = "import time; time.sleep(0.5 * (rank == '2')); sys.exit(1 if rank == '2' else 7)"
    assert run(text) == (1, "")


def test_a_kill_that_is_missed_before_it_is_seen_is_named() -> None:
    text = "import time; time.sleep(0.5 * (rank == '2')); os.kill(os.getpid(), 9) if rank == '2' else sys.exit(7)"
    code, said = run(text)
    assert code == 7
    assert "error: rank 2 of 3 (process " in said


def test_a_restart_goes_on_with_resume(tmp_path: Path) -> None:
    text = (
        f"open(os.path.join({str(tmp_path)!r}, 'starts'), 'a').write(f'{{rank}} {{sys.argv[1:]}}\\n')\n"
        "if '--resume' not in sys.argv and rank == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if '--resume' not in sys.argv:\n"
        f"    {WAITS}"
    )
    code, said = run(text, count=2, restarts=1)
    assert code == 0
    assert "starting again from the newest whole checkpoint (1 of 1)" in said
    starts = sorted((tmp_path / "starts").read_text().splitlines())
    assert [line for line in starts if "--resume" in line] == ["0 ['--resume']", "1 ['--resume']"]


def test_restarts_end(tmp_path: Path) -> None:
    code, said = run("os.kill(os.getpid(), signal.SIGKILL)", count=2, restarts=2)
    assert code == 7
    assert said.count("starting again") == 2


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    text = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trietune.ranks.launch import Processes\n"
        f"processes = Processes({script('')!r}, 2)\n"
        "with processes.forwarding_signals():\n"
        "    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "    assert callable(signal.getsignal(signal.SIGTERM))\n"
        "processes.wait()\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)


def test_processes_are_told_when_the_command_began(tmp_path: Path) -> None:
    told = f"from trietune.ranks.launched import command_began; open({str(tmp_path)!r} + '/' + rank, 'w').write"
    began = time.monotonic() - 5
    assert launch(script(f"{told}(repr(command_began()))"), 2, began=began, say=print) == 0
    assert [float((tmp_path / str(number)).read_text()) for number in range(2)] == [began, began]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    child = (
        "def note(number, frame):\n"
        f"    open(os.path.join({str(tmp_path)!r}, 'heard'), 'a').write(f'{{rank}} {{number}}\\n')\n"
        "    sys.exit(128 + number)\n"
        f"for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP): signal.signal(one, note)\n"
        f"open(os.path.join({str(tmp_path)!r}, 'ready' + rank), 'w')\n{WAITS}"
    )
    parent = (
        "import sys, signal; from trietune.ranks.launch import launch\n"
        # Tests that run in the background, or under nohup, are started with some of them ignored.
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"sys.exit(launch({script(child)!r}, 2, say=print))"
    )  # fmt: skip
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready0").exists() or not (tmp_path / "ready1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(60) == 128 + number
    assert sorted((tmp_path / "heard").read_text().split("\n")) == ["", f"0 {number}", f"1 {number}"]


def test_a_second_ctrl_c_ends_processes_that_hear_nothing(tmp_path: Path) -> None:
    # As one that waits for another process in a collective.
    child = f"signal.signal(2, signal.SIG_IGN)\nopen(os.path.join({str(tmp_path)!r}, 'ready' + rank), 'w')\n{WAITS}"
    parent = (
        "import sys, signal; from trietune.ranks.launch import launch\n"
        "signal.signal(2, signal.default_int_handler)\n"
        f"sys.exit(launch({script(child)!r}, 2, say=print))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready0").exists() or not (tmp_path / "ready1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(40) == 128 + signal.SIGKILL


def test_more_processes_than_memory_holds_are_refused_before_any_starts(capfd: pytest.CaptureFixture[str]) -> None:
    started = main(["train", "--nproc", "100000"])
    assert started == 2
    assert "error: 100,000 processes need 30,000 GB for their libraries" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_nobody_trains_on_without_the_launcher() -> None:
    parent = f"from trietune.ranks.launch import launch; launch({script(WAITS)!r}, 2, say=print)"
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    children: list[psutil.Process] = []
    while len(children) < 2:
        children = psutil.Process(launcher.pid).children()
        time.sleep(0.05)
    time.sleep(0.5)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def kill_at_first_checkpoint(run_folder: Path, launcher: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send `number` to rank 1 once a checkpoint is there."""
    deadline = time.monotonic() + 250
    while not list(run_folder.glob("checkpoints/step-*")):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(launcher.pid).children()}
    ranks["1"].send_signal(number)


def long_run(overrides: dict[str, object]) -> dict[str, object]:
    return {**overrides, "max_steps": 400, "num_epochs": 60, "save_strategy": "step", "steps_freq": 2,
            "save_optim": True, "val_steps_freq": 1000}  # fmt: skip


def start_training(settings: dict[str, object], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trietune", "train", "--nproc", "2", *options, *command_line(settings)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_training_whose_process_was_killed_goes_on_with_any_number(overrides: dict[str, object]) -> None:
    settings = long_run(overrides)
    launcher = start_training(settings)
    folder = Path(str(overrides["project_dir"])) / "run"
    kill_at_first_checkpoint(folder, launcher, signal.SIGKILL)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 7, err
    assert "error: rank 1 of 2 (process " in err
    settings["max_steps"] = 40
    resumed = trietune("train", "--resume", "--allow-change", "max_steps", *command_line(settings))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stderr


@pytest.mark.slow
def test_a_stopped_process_is_named_by_the_one_that_waits(overrides: dict[str, object]) -> None:
    launcher = start_training(long_run(overrides))
    kill_at_first_checkpoint(Path(str(overrides["project_dir"])) / "run", launcher, signal.SIGSTOP)
    _, err = launcher.communicate(timeout=180)
    assert launcher.returncode == 7, err
    assert "has not been heard of for" in err
    assert "is whole; the same command with `--resume` continues, with any number of processes" in err


@pytest.mark.slow
def test_restarts_finish_a_training(overrides: dict[str, object]) -> None:
    settings = {**long_run(overrides), "max_steps": 30}
    launcher = start_training(settings, "--restarts", "1")
    folder = Path(str(overrides["project_dir"])) / "run"
    kill_at_first_checkpoint(folder, launcher, signal.SIGKILL)
    _, err = launcher.communicate(timeout=280)
    assert launcher.returncode == 0, err
    assert "starting again from the newest whole checkpoint (1 of 1)" in err
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

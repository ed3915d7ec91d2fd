"""Send a run to W&B without ever asking, waiting or failing because of it.

    training thread            thread `wandb`                    process of its own
    handle(event)  --outbox--> decides, starts, feeds  --pipe--> wandb.init, log, finish

`handle` only appends to a bounded outbox. While W&B is slow, new histograms are left out where two are waiting, and
beyond a hundred thousand measurements the oldest ones are; both are counted and told. When `wandb.init` fails although
the host had answered, a second process records the same run offline: nothing has been sent before the first one was
ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import string
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from trietune.io import files
from trietune.tracking.events import Evaluated, Event, Histograms, RunFinished, RunStarted, Saved, StepFinished
from trietune.tracking.jsonl import plain
from trietune.tracking.wandb.access import Access, find_access
from trietune.tracking.wandb.outbox import Outbox
from trietune.tracking.wandb.process import STEP_AXIS

RUN_FILE = "wandb.json"
INIT_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 30.0
SILENT_WAIT_S = 5.0  # a slow machine needs some seconds to start and end W&B's process; not worth a message
FINISH_MARGIN_S = 3.0  # W&B gives up by itself first, and then leaves its files whole
OFFLINE_TIMEOUT_S = 10.0
GRACE_S = 1.0
WatchMode = Literal["all", "gradients", "parameters"] | None


class WandbListener:
    """One W&B run.

    Args:
        say: receives one line for the user at a time, and whether it is a warning; called within `handle` and `close`.
        project, name, tags: what the W&B run is called and filed under; `name` None takes the run's own.
        uploads_model: every saved checkpoint and the adapter become artifacts (`model_to_wandb`).
        access: decides whether and how W&B is reached; called once, in the listener's thread.
        init_timeout_s: how long W&B's process waits for the server to open the run; training does not wait.
        drain_timeout_s: how long `close` waits for W&B to take the rest.
    """

    name = "W&B"

    def __init__(
        self,
        say: Callable[[str, bool], None],
        *,
        project: str | None,
        name: str | None = None,
        tags: Sequence[str] = (),
        uploads_model: bool = False,
        access: Callable[[], Access] = lambda: find_access(os.environ),
        init_timeout_s: float = INIT_TIMEOUT_S,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self._say = say
        self._project = project
        self._run_name = name
        self._tags = list(tags)
        self._uploads_model = uploads_model
        self._access = access
        self._init_timeout_s = init_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._outbox = Outbox()
        self._told: deque[tuple[str, bool]] = deque()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._has_given_up = False
        self._has_finished = False
        self._is_offline = False
        self._trouble: str | None = None
        self._directory: Path | None = None
        self._run_id = ""
        self._config: Mapping[str, object] = {}
        self._finish: dict[str, object] = {"do": "finish", "exit_code": 1, "summary": {}}

    def handle(self, event: Event) -> None:
        """Queue what W&B should hear of `event`; takes microseconds."""
        self._pass_on_what_was_told()
        match event:
            case RunStarted():
                self._start(event)
            case StepFinished() if event.is_logged:
                self._log(event.step, event.epoch, event.metrics)
            case Evaluated() if event.is_point:
                self._log(event.step, event.epoch, event.metrics)
            case Histograms():
                self._outbox.put(event)
            case Saved() if self._uploads_model:
                self._outbox.put(artifact_message(event, self._config, self._run_id))
            case RunFinished():
                summary = {"status": event.status, "seconds": event.seconds, **plain(event.summary)}
                exit_code = 1 if event.status == "failed" else 0
                self._finish = {"do": "finish", "exit_code": exit_code, "summary": summary}
            case _:
                pass

    def close(self) -> None:
        """Finish the W&B run, within the time allowed; what it has not taken by then stays on disk for a sync."""
        if self._thread is None:
            return
        self._outbox.put(self._finish)
        self._outbox.close()
        try:
            self._thread.join(min(SILENT_WAIT_S, self._drain_timeout_s))
            if self._thread.is_alive():
                self._pass_on_what_was_told()
                if not self._has_finished and not self._is_offline:  # else its process is only ending or writing
                    limit = f"{self._drain_timeout_s:g} s"
                    self._say(f"W&B: waiting up to {limit} for the server to receive the rest", False)
                self._thread.join(max(0.0, self._drain_timeout_s - 2.0))
            is_late = self._thread.is_alive() and self._outbox.is_begun and not self._has_finished
            if self._thread.is_alive() and not self._outbox.is_begun:
                self._end_process()  # still in `init`: the thread records everything offline instead
                self._thread.join(OFFLINE_TIMEOUT_S)
        finally:
            self._has_given_up = True
            self._end_process()
        self._thread.join(5.0)
        self._thread = None
        self._pass_on_what_was_told()
        if is_late:
            self._say(late_line(self._directory), True)
        if dropped := self._outbox.describe_dropped():
            self._say(f"W&B was too slow: {dropped}; the run's own files have all", True)

    def _start(self, event: RunStarted) -> None:
        self._directory = event.directory
        self._config = plain(event.config)
        self._run_id = find_run_id(event.directory, os.environ)
        self._run_name = self._run_name or event.name
        self._thread = threading.Thread(target=self._serve, daemon=True, name="wandb")
        self._thread.start()

    def _log(self, step: int, epoch: float, metrics: Mapping[str, float | int | None]) -> None:
        known = {key: value for key, value in metrics.items() if value is not None}
        self._outbox.put({"do": "log", "values": {STEP_AXIS: step, "epoch": epoch, **known}})

    def _tell(self, text: str, *, is_warning: bool = False) -> None:
        self._told.append((text, is_warning))

    def _pass_on_what_was_told(self) -> None:
        while self._told:
            self._say(*self._told.popleft())

    def _serve(self) -> None:
        """The thread: decide, start the process, feed it. Ends when the run is finished or W&B is out of reach."""
        assert self._directory is not None
        try:
            access = self._access()
            if access.mode == "off":
                self._outbox.close(discard=True)
                self._tell(f"W&B: {access.reason}")
                return
            if access.reason:
                self._tell(f"W&B: {access.reason}; later: {sync_command(self._directory)}", is_warning=True)
            elif access.mode == "offline":
                self._is_offline = True
                self._tell(f"W&B: offline, as its settings say; later: {sync_command(self._directory)}")
            keep_run_id(self._directory, self._run_id)
            trouble = self._feed(access.mode, access.url)
            if self._has_given_up:
                return
            if trouble and access.mode == "online" and not self._outbox.is_begun:
                self._tell(f"W&B: {trouble}; recorded offline; later: {sync_command(self._directory)}", is_warning=True)
                trouble = self._feed("offline", access.url)
            if trouble:
                self._outbox.close(discard=True)
                self._tell(
                    f"W&B: {trouble}; the run continues without it; what it had: {sync_command(self._directory)}",
                    is_warning=True,
                )
        except Exception as error:  # nothing of W&B's may reach the run
            self._outbox.close(discard=True)
            self._tell(f"W&B: {type(error).__name__}: {error}; the run continues without it", is_warning=True)

    def _feed(self, mode: Literal["online", "offline"], url: str) -> str | None:
        """Run one process to its end; returns what went wrong."""
        assert self._directory is not None
        process = start_process(self._directory)
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        replies = threading.Thread(target=self._hear, args=(process.stdout,), daemon=True, name="wandb-replies")
        try:
            send(process.stdin, {"do": "start", "settings": self._settings(mode, url), "config": self._config})
            first = read(process.stdout)
            if first.get("told") != "started":
                return str(first.get("reason", f"its process ended; see {self._directory / 'wandb' / 'process.log'}"))
            if first.get("url"):
                self._tell(f"W&B: {first['url']}")
            replies.start()
            while (message := self._outbox.take()) is not None:
                send(process.stdin, message)
            process.stdin.close()
            process.wait()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone without having finished: told below
        finally:
            end_process_group(process)
            if replies.ident is not None:
                replies.join()
                self._trouble = self._trouble or (None if self._has_finished else "its process has ended")
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()
        return self._trouble

    def _hear(self, replies: IO[str]) -> None:
        """Pass on what the process tells, until it ends."""
        while reply := read(replies):
            if reply["told"] == "warning":
                self._tell(f"W&B: {reply['text']}", is_warning=True)
            elif reply["told"] == "failed":
                self._trouble = reply["reason"]
            else:
                self._has_finished = True
                num_failures = reply.get("num_failures", {})
                if reply["told"] == "late":
                    self._tell(late_line(self._directory), is_warning=True)
                elif sum(num_failures.values()) > len(num_failures):  # the first of each kind has been told already
                    counts = ", ".join(f"{number:,} x {name}" for name, number in num_failures.items())
                    self._tell(f"W&B: in all, not recorded: {counts}", is_warning=True)

    def _settings(self, mode: str, url: str) -> dict[str, object]:
        """What `wandb.init` gets. Code, command line, machine and console stay out: they can carry secrets."""
        return {
            "project": self._project,
            "name": self._run_name,
            "id": self._run_id,
            "tags": self._tags or None,
            "dir": str(self._directory),
            "mode": mode,
            "resume": "allow" if mode == "online" else None,
            "base_url": url,
            "init_timeout": self._init_timeout_s,
            "finish_timeout": max(1.0, self._drain_timeout_s - FINISH_MARGIN_S),
            "finish_timeout_raises": True,
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "disable_job_creation": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "x_stats_pid": os.getpid(),
        }

    def _end_process(self) -> None:
        if self._process is not None:
            end_process_group(self._process)


def are_histograms_due(step: int, *, mode: WatchMode, every: int) -> bool:
    """Whether histograms are wanted after `step`, counted from 1 (`wandb_watch_mode`, `wandb_log_freq`)."""
    return mode is not None and step > 0 and step % every == 0


def watched_kinds(mode: WatchMode) -> tuple[str, ...]:
    """Which values of the adapter's tensors a watch mode asks for, as prefixes of their names."""
    if mode is None:
        return ()
    return ("gradients", "parameters") if mode == "all" else (mode,)


def artifact_message(event: Saved, config: Mapping[str, object], run_id: str) -> dict[str, object]:
    """A saved folder as a version of the run's artifact, with where it comes from."""
    metadata = {
        "step": event.step,
        "base_model": config.get("model_name"),
        "dataset": config.get("dataset_id"),
        **{key: value for key, value in plain(event.metrics).items() if value is not None},
    }
    aliases = ["final", f"step-{event.step}"] if event.kind == "adapter" else [f"step-{event.step}"]
    return {
        "do": "artifact",
        "name": f"{event.kind}-{run_id}",
        "directory": str(event.directory),
        "description": f"LoRA {event.kind} of {config.get('model_name')} after step {event.step}",
        "metadata": metadata,
        "aliases": aliases,
    }


def find_run_id(directory: Path, environ: Mapping[str, str]) -> str:
    """The W&B id of the run in `directory`: the one that it had before, so that a resume continues its curves."""
    try:
        return str(json.loads((directory / RUN_FILE).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        letters = string.ascii_lowercase + string.digits
        return environ.get("WANDB_RUN_ID") or "".join(secrets.choice(letters) for _ in range(8))


def keep_run_id(directory: Path, run_id: str) -> None:
    """Let a resume find this id."""
    directory.mkdir(parents=True, exist_ok=True)
    files.replace_file(directory / RUN_FILE, json.dumps({"id": run_id}).encode() + b"\n")


def sync_command(directory: Path | None) -> str:
    """What uploads an offline run later."""
    return f"`wandb sync {directory}/wandb/*run-*`"


def late_line(directory: Path | None) -> str:
    """For a server that was too slow at the end."""
    return f"W&B: the server did not receive everything; later: {sync_command(directory)}"


def start_process(directory: Path) -> subprocess.Popen[str]:
    """Start W&B's process: out of reach of the terminal and of its Ctrl-C, its own output in a file of the run."""
    environment = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", **os.environ}
    environment.pop("WANDB_RUN_ID", None)
    environment.pop("WANDB_MODE", None)
    folder = directory / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("process.py")
    with (folder / "process.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603  (our own script, no shell)
            # -P keeps this folder off the path, where our wandb.py would hide the real one.
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        )


def read(stream: IO[str]) -> dict[str, Any]:
    """The next reply; empty when the process is gone."""
    line = stream.readline()
    return dict(json.loads(line)) if line else {}


def send(stream: IO[str], message: Mapping[str, object]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def end_process_group(process: subprocess.Popen[str]) -> None:
    """End the process and what it started; W&B's own helper leaves when its parent is gone."""
    if process.poll() is not None:
        return
    for signal_number in (signal.SIGTERM, signal.SIGKILL if os.name == "posix" else signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal_number)
            else:
                process.terminate()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return
            time.sleep(0.02)

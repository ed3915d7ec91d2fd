"""Real W&B runs, read back from their files, and a real W&B client against servers that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from wandb_files import history_of, only_run_file, read_records
from wandb_server import Fault, WandbServer

from trietune.tracking.events import Event, Histograms, RunFinished, Saved, StepFinished
from trietune.tracking.wandb.listener import WandbListener, are_histograms_due, watched_kinds
from trietune.tracking.wandb.outbox import Outbox, histograms_message

Events = Callable[..., Iterator[Event]]
pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, login or cache of the machine reaches these tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def track(events: Iterator[Event], *, watch: Histograms | None = None, **options: object) -> tuple[list[str], float]:
    """Hand a run to W&B; returns what was said and the longest time that one event took."""
    said: list[str] = []
    listener = WandbListener(lambda text, is_warning: said.append(text), project="films", **options)  # type: ignore[arg-type]
    longest_s = 0.0
    for event in events:
        if isinstance(event, Saved):
            event.directory.mkdir(parents=True, exist_ok=True)
            (event.directory / "adapter_model.safetensors").write_bytes(b"weights of step %d" % event.step)
        began = time.perf_counter()
        listener.handle(event)
        longest_s = max(longest_s, time.perf_counter() - began)
        if watch and isinstance(event, StepFinished) and event.step == watch.step:
            listener.handle(watch)
    listener.close()
    return said, longest_s


def records_of(directory: Path, kind: str) -> list:
    found = [record for record in read_records(only_run_file(directory)) if record.WhichOneof("record_type") == kind]
    return [getattr(record, kind) for record in found]


def test_an_offline_run_reads_back(
    tmp_path: Path, events: Events, histograms: Histograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "sst2"
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        said, _ = track(events(run), watch=histograms, name="first try", tags=["demo", "cpu"], uploads_model=True)
        assert server.requests == []  # offline means not a single call
    assert said == [f"W&B: offline, as its settings say; later: `wandb sync {run}/wandb/*run-*`"]

    (opened,) = records_of(run, "run")
    assert (opened.project, opened.display_name, list(opened.tags)) == ("films", "first try", ["demo", "cpu"])
    assert opened.run_id == json.loads((run / "wandb.json").read_text())["id"]
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert config["learning_rate"] == 2e-4
    assert config["wandb_tags"] == ["a", "b"]

    history = history_of(read_records(only_run_file(run)))
    losses = [(row["trainer/step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(step, 2.0 / step) for step in (2, 4, 6, 8, 10, 12)]
    accuracies = [(row["trainer/step"], row["eval/accuracy"]) for row in history if "eval/accuracy" in row]
    assert accuracies[0] == (0, 0.505)
    assert accuracies[-1] == (12, 0.875)
    metrics = {metric.name or metric.glob_name: metric for metric in records_of(run, "metric")}
    assert metrics["*"].step_metric == "trainer/step"

    (watched,) = [row for row in history if "watch/not_finite" in row]
    assert watched["trainer/step"] == 4
    assert watched["watch/not_finite"] == 1
    assert sum(watched["parameters/lora_A/values"]) == 500
    assert sum(watched["gradients/lora_A/values"]) == 2

    artifacts = records_of(run, "artifact")
    assert [artifact.name.rsplit("-", 1)[0] for artifact in artifacts] == ["checkpoint", "checkpoint", "adapter"]
    assert [entry.path for entry in artifacts[0].manifest.contents] == ["adapter_model.safetensors"]
    assert {"step-12", "final"} <= set(artifacts[-1].aliases)
    lineage = json.loads(artifacts[0].metadata)
    assert lineage == {"step": 6, "base_model": "SmolLM2-135M-Instruct", "dataset": "sst2", "eval/loss": 2.0 / 6}
    assert all(artifact.type == "model" and artifact.run_id == opened.run_id for artifact in artifacts)

    summary = {
        (item.key or "/".join(item.nested_key)): item.value_json
        for update in records_of(run, "summary")
        for item in update.update
    }
    assert summary["status"] == '"finished"'
    assert [record.exit_code for record in records_of(run, "exit")] == [0]


def test_a_resume_goes_on_with_the_same_curve_and_a_failure_is_one(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same id, steps that repeat, and no model uploaded unless asked for."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "sst2"
    first = [*events(run)][:-1]
    track(iter([*first, RunFinished("failed", 12, 1.0, {})]))
    (opened,), (ended,) = records_of(run, "run"), records_of(run, "exit")
    assert ended.exit_code == 1
    assert records_of(run, "artifact") == []
    only_run_file(run).unlink()
    track(events(run, first_step=6))
    (resumed,) = records_of(run, "run")
    assert resumed.run_id == opened.run_id
    steps = [row["trainer/step"] for row in history_of(read_records(only_run_file(run))) if "train/loss" in row]
    assert steps == [8, 10, 12]


def test_no_login_says_one_line_and_starts_nothing(tmp_path: Path, events: Events) -> None:
    said, _ = track(events(tmp_path / "sst2"))
    assert said == ["W&B: no login for api.wandb.ai, the run continues without it; `wandb login`, or WANDB_API_KEY"]
    assert not (tmp_path / "sst2" / "wandb").exists()
    assert not (tmp_path / "sst2" / "wandb.json").exists()


def test_an_online_run_reaches_the_server_and_carries_no_secret(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose command line and environment hold secrets: none is in what is sent or written."""
    canary = "hf_" + "Q7canary" * 4
    key = "b" * 40
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from conftest import run_events
        from trietune.tracking.wandb.listener import WandbListener
        listener = WandbListener(lambda text, is_warning: print(text), project="films", uploads_model=False)
        for event in run_events(Path({str(tmp_path / "sst2")!r})):
            listener.handle(event)
        listener.close()
        """
    )
    with WandbServer() as server:
        environ = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": key, "HF_TOKEN": canary}
        done = subprocess.run(
            [sys.executable, "-c", script, "--set", f"token={canary}"],
            env=environ,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        sent = server.requests
    assert re.fullmatch(rf"(W&B: waiting [^\n]+\n)?W&B: {server.url}/team/films/runs/\w+\n", done.stdout), done.stdout
    assert done.stderr == ""
    streamed = "".join(body for path, body in sent if "file_stream" in path)
    assert "train/loss" in streamed
    assert '"exitcode":0' in streamed
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = written + repr(sent).encode()
    assert canary.encode() not in everything
    assert key.encode() not in everything
    assert os.uname().nodename.encode() not in repr(sent).encode()


@pytest.mark.parametrize(
    "fault",
    [
        "500",
        pytest.param("hang after health", marks=pytest.mark.slow),
        pytest.param("hang", marks=pytest.mark.slow),
        pytest.param("500 after health", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_fails_costs_no_step_and_no_measurement(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    run = tmp_path / "sst2"
    with WandbServer(fault) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
        began = time.monotonic()
        said, longest_s = track(events(run), init_timeout_s=4.0, drain_timeout_s=5.0)
        took_s = time.monotonic() - began
    assert longest_s < 1.0  # of one event; the server is asked for seconds
    assert took_s < 60.0
    assert "recorded offline" in said[0] or "recorded offline" in said[1]
    assert f"wandb sync {run}/wandb" in " ".join(said)
    steps = [row["trainer/step"] for row in history_of(read_records(offline_file(run))) if "train/loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12]


def offline_file(run: Path) -> Path:
    (found,) = run.glob("wandb/offline-run-*/*.wandb")
    return found


@pytest.mark.slow
def test_a_server_that_stops_listening_delays_the_end_by_no_more_than_allowed(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "sst2"
    with WandbServer("hang at upload") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
        began = time.monotonic()
        said, longest_s = track(events(run), drain_timeout_s=4.0)
        took_s = time.monotonic() - began
    assert longest_s < 0.05
    assert took_s < 4.0 + 6.0
    assert said[-1] == f"W&B: the server did not receive everything; later: `wandb sync {run}/wandb/*run-*`"
    steps = [row["trainer/step"] for row in history_of(read_records(only_run_file(run))) if "train/loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_the_death_of_wandb_is_one_line(tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    listener = WandbListener(lambda text, is_warning: said.append(text), project="films")
    run = [*events(tmp_path / "sst2", num_steps=200)]
    for event in run[:30]:
        listener.handle(event)
    deadline = time.monotonic() + 20
    while not listener._outbox.is_begun and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listener._process is not None
    os.killpg(listener._process.pid, signal.SIGKILL)
    listener._process.wait()
    for event in run[30:]:
        listener.handle(event)
    listener.close()
    warnings = [line for line in said if "offline, as its settings" not in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("W&B: its process has ended; the run continues without it")


def test_a_run_that_dies_is_a_failed_run(tmp_path: Path) -> None:
    """The process sees the end of its input without a `finish`."""
    script = textwrap.dedent(
        f"""
        import os, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from conftest import run_events
        from trietune.tracking.wandb.listener import WandbListener
        listener = WandbListener(lambda text, is_warning: print(text), project="films")
        for event in [*run_events(Path({str(tmp_path / "sst2")!r}))][:-1]:
            listener.handle(event)
        while len(listener._outbox):
            time.sleep(0.02)
        os.kill(os.getpid(), 9)
        """
    )
    environ = {**os.environ, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", script], env=environ, cwd=tmp_path, timeout=60, check=False)
    deadline = time.monotonic() + 20
    exits: list = []
    while not exits and time.monotonic() < deadline:
        time.sleep(0.1)
        exits = records_of(tmp_path / "sst2", "exit")
    assert [ended.exit_code for ended in exits] == [1]


def test_histograms_displace_no_measurement_and_what_is_dropped_is_counted(histograms: Histograms) -> None:
    outbox = Outbox(most_messages=4, most_histograms=2)
    for step in range(4):
        outbox.put({"do": "log", "values": {"step": step}})
    assert outbox.describe_dropped() == ""
    for _ in range(3):
        outbox.put(histograms)
    assert (outbox.num_dropped_histograms, outbox.num_dropped_messages) == (1, 0)
    outbox.put({"do": "log", "values": {"step": 4}})
    assert outbox.describe_dropped() == "1 sets of histograms and 1 measurements were not sent"
    outbox.close()
    taken = []
    while (message := outbox.take()) is not None:
        taken.append(message)
    assert [message["do"] for message in taken[:2]] == ["histograms", "histograms"]
    assert [message["values"]["step"] for message in taken[2:]] == [1, 2, 3, 4]


def test_a_message_that_nobody_will_take_is_not_kept(histograms: Histograms) -> None:
    outbox = Outbox()
    outbox.put({"do": "log", "values": {}})
    outbox.close(discard=True)
    outbox.put({"do": "log", "values": {}})
    outbox.put(histograms)
    assert (len(outbox), outbox.take(), outbox.describe_dropped()) == (0, None, "")


def test_histograms_keep_every_finite_value(histograms: Histograms) -> None:
    message = histograms_message(histograms)
    counts, edges = message["histograms"]["parameters/lora_A"]
    assert sum(counts) == 500
    assert len(edges) == len(counts) + 1
    assert (edges[0], edges[-1]) == (-1.0, 1.0)
    assert message["num_not_finite"] == 1
    empty = histograms_message(Histograms(1, {"parameters/a": np.array([np.inf], dtype=np.float32)}))
    assert empty["histograms"] == {}


def test_when_histograms_are_due() -> None:
    assert [step for step in range(31) if are_histograms_due(step, mode="all", every=10)] == [10, 20, 30]
    assert not any(are_histograms_due(step, mode=None, every=1) for step in range(5))
    assert watched_kinds("all") == ("gradients", "parameters")
    assert watched_kinds("gradients") == ("gradients",)
    assert watched_kinds(None) == ()

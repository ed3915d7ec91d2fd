"""Engines in processes of their own, taking turns: warm up each, then round after round, in another order each time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from job import Job
from measure import matmul_ceiling
from models import ModelChoice
from workloads import Workload


@dataclass(slots=True)
class EngineRounds:
    """What one engine did in each round; `failed` says why it did not."""

    engine: str
    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    peak_memory_bytes: int = 0
    failed: str = ""


@dataclass(slots=True)
class Measured:
    engines: list[EngineRounds]
    ceilings: dict[str, float]
    is_stopped: bool = False


def measure(
    model: ModelChoice,
    workload: Workload,
    engines: Sequence[str],
    device: torch.device,
    num_rounds: int,
    report: Callable[[str], None],
    *,
    max_logits: int,
) -> Measured:
    """Warm up every engine, then let them take rounds in turn."""
    done = {name: EngineRounds(name) for name in engines}
    ceilings: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    is_stopped = False
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        try:
            for name in engines:
                job_file = Path(folder) / f"{name}.job"
                Job(name, model, workload, device.type, max_logits).write(job_file)
                workers[name] = Worker(job_file)
                try:
                    workers[name].receive("ready")
                    workers[name].round(workload.steps_a_round)
                    report(f"{workload.name}: {name} is warm")
                except WorkerError as error:
                    done[name].failed = str(error)
                    report(f"{workload.name}: {name} failed: {error}")
                    workers.pop(name).close()
            take_rounds(workers, done, workload, ceilings, device, num_rounds, report)
        except KeyboardInterrupt:
            is_stopped = True
            report(f"{workload.name}: stopped; its whole rounds are reported")
        finally:
            for worker in workers.values():
                worker.end()
    num_whole = min((len(one.seconds) for one in done.values() if not one.failed), default=0)
    for one in done.values():
        if not one.failed and num_whole == 0:
            one.failed = "no whole round"
        del one.seconds[num_whole:], one.examples[num_whole:], one.losses[num_whole:]
    medians = {dtype: statistics.median(values or [math.nan]) for dtype, values in ceilings.items()}
    return Measured(list(done.values()), medians, is_stopped)


def take_rounds(
    workers: dict[str, Worker],
    done: dict[str, EngineRounds],
    workload: Workload,
    ceilings: dict[str, list[float]],
    device: torch.device,
    num_rounds: int,
    report: Callable[[str], None],
) -> None:
    """Fill in `done` and `ceilings`, round by round; an engine that dies leaves `workers`."""
    order = random.Random(0)
    for number in range(num_rounds):
        for dtype, values in ceilings.items():
            values.append(matmul_ceiling(getattr(torch, dtype), device))
        for name in order.sample(sorted(workers), len(workers)):
            try:
                reply = workers[name].round(workload.steps_a_round)
            except WorkerError as error:
                done[name].failed = str(error)
                report(f"{workload.name}: {name} failed: {error}")
                workers.pop(name).close()
                continue
            done[name].seconds.append(reply["seconds"])
            done[name].examples.append(reply["examples"])
            done[name].losses.append(reply["losses"])
            done[name].peak_memory_bytes = reply["peak_memory_bytes"]
        report(f"{workload.name}: round {number + 1} of {num_rounds}")


class WorkerError(Exception):
    """A worker ended instead of answering; holds the last line that it wrote."""


class Worker:
    """A running worker.py; its standard error goes to a file beside the job."""

    def __init__(self, job_file: Path) -> None:
        self._log = job_file.with_suffix(".log")
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "worker.py"), str(job_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
            )

    def receive(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise WorkerError(f"exit code {self._process.returncode}: {lines[-1] if lines else 'no message'}")
        reply: dict[str, Any] = json.loads(line)
        assert reply["event"] == event, reply
        return reply

    def round(self, steps: int) -> dict[str, Any]:
        self._send({"steps": steps})
        return self.receive("round")

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self._process.stdin.close()
        self._process.wait()

    def end(self) -> None:
        """Also in the middle of a round, which is then lost."""
        self._process.terminate()
        self.close()

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # One that was killed meanwhile, for memory, is noticed when its answer is awaited.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

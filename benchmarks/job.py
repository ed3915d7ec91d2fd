"""What a worker process is asked to do, and the gate at which it stops between rounds.

compare.py                         worker.py
job, written to a file   ------->  builds the engine
                         <-------  {"event": "ready"}
{"steps": 2}             ------->  takes two optimizer steps
                         <-------  {"event": "round", "seconds": ..., "losses": ..., "examples": ...}
{"finish": true}         ------->  {"event": "finished", "peak_memory_bytes": ...}
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from measure import peak_memory_bytes, reset_peak_memory
from models import ModelChoice
from workloads import Sequences, Workload

LEARNING_RATE = 6e-5
WEIGHT_DECAY = 0.01
_NUMBERS_OF_A_WORKLOAD = ("name", "max_length", "batch_size", "steps_a_round", "num_too_long")


@dataclass(frozen=True, slots=True)
class Job:
    """One engine on one workload, on `cpu` or `cuda`.

    Attributes:
        max_logits: logits of all positions that an engine may hold at once, in elements; rows beyond are accumulated.
    """

    engine: str
    model: ModelChoice
    workload: Workload
    device: str
    max_logits: int = 2**40

    def rows_at_once(self, vocabulary: int) -> int:
        """Rows of `max_length` whose logits fit: a part of the batch of equal size, or all of it."""
        fits = max(1, self.max_logits // (self.workload.max_length * vocabulary))
        return max(
            size
            for size in range(1, self.workload.batch_size + 1)
            if size <= fits and self.workload.batch_size % size == 0
        )

    def write(self, path: Path) -> None:
        """As an `.npz` file: arrays, and the rest as JSON in one of them."""
        workload = self.workload
        settings = {
            "engine": self.engine,
            "model": asdict(self.model),
            "device": self.device,
            "max_logits": self.max_logits,
            "workload": {name: getattr(workload, name) for name in _NUMBERS_OF_A_WORKLOAD},
        }
        with path.open("wb") as file:
            np.savez(
                file,
                settings=np.array(json.dumps(settings)),
                input_ids=workload.sequences.input_ids,
                labels=workload.sequences.labels,
                offsets=workload.sequences.offsets,
                batches=np.concatenate(workload.batches),
                batch_ends=np.cumsum([len(batch) for batch in workload.batches]),
                **({} if workload.row_start is None else {"row_start": workload.row_start}),
            )

    @staticmethod
    def read(path: Path) -> Job:
        with np.load(path, allow_pickle=False) as arrays:
            settings = json.loads(str(arrays["settings"]))
            workload = Workload(
                **settings["workload"],
                sequences=Sequences(arrays["input_ids"], arrays["labels"], arrays["offsets"]),
                batches=np.split(arrays["batches"], arrays["batch_ends"][:-1]),
                row_start=arrays.get("row_start"),
            )
        model = settings["model"]
        if isinstance(model["lora_targets"], list):
            model["lora_targets"] = tuple(model["lora_targets"])
        return Job(settings["engine"], ModelChoice(**model), workload, settings["device"], settings["max_logits"])


class FinishedError(Exception):
    """Raised inside an engine's loop when no further step is wanted."""


class Gate:
    """Stands at the end of every optimizer step; lets a round's steps pass, reports them, and waits.

    Args:
        commands, replies: JSON, one object a line.
        synchronize: waits until the device has done what it was asked.
    """

    def __init__(self, commands: IO[str], replies: IO[str], synchronize: Callable[[], None]) -> None:
        self._commands = commands
        self._replies = replies
        self._synchronize = synchronize
        self._losses: list[float] = []
        self._examples = 0
        self._left = 0
        self._began = 0.0

    def open(self) -> None:
        """Everything is built: wait for the first round. Call it right before the first step."""
        self._synchronize()
        self._memory_before = reset_peak_memory()
        self._reply({"event": "ready"})
        self._wait()

    def __call__(self, loss: float, num_examples: int) -> None:
        """A step is done. Raises `FinishedError` when it was the last."""
        self._losses.append(loss)
        self._examples += num_examples
        self._left -= 1
        if self._left == 0:
            self._synchronize()
            seconds = time.perf_counter() - self._began
            self._reply(
                {
                    "event": "round",
                    "seconds": seconds,
                    "losses": self._losses,
                    "examples": self._examples,
                    "peak_memory_bytes": peak_memory_bytes() - self._memory_before,
                }
            )
            self._wait()

    def _wait(self) -> None:
        command = json.loads(self._commands.readline() or '{"finish": true}')
        if command.get("finish"):
            raise FinishedError
        self._losses, self._examples, self._left = [], 0, command["steps"]
        self._began = time.perf_counter()

    def _reply(self, reply: dict[str, Any]) -> None:
        self._replies.write(json.dumps(reply) + "\n")
        self._replies.flush()


def synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None

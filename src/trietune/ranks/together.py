"""Several processes as one training, over torch.distributed: gloo on the host, NCCL between GPUs.

The step's one message, in the dtype of the gradients:

    [ gradients | loss | numbers | seconds waited | for each parameter: has it a gradient here? ]

Small values travel as bytes through gloo, on CUDA too. A collective is reached by all ranks or by none: none stands
under a condition that only one rank knows.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trietune.errors import UserError
from trietune.ranks.launched import Launched
from trietune.ranks.meeting import connect, meet
from trietune.ranks.messages import decode, encode, encode_error, error_elsewhere
from trietune.ranks.ranks import Ranks
from trietune.ranks.watch import Watch

T = TypeVar("T")
# Rank 0 may download a model while the others wait. Whoever is lost is named by the watch, long before this.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=2)


class Together(Ranks):
    """One of several ranks.

    Args:
        on_lost: told who was lost, from another thread, and ends the process; by default the sentence is printed.
        check: called while the others are waited for; raises to leave.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or the others cannot be reached.
    """

    def __init__(
        self,
        launched: Launched,
        *,
        may_use_cuda: bool = True,
        on_lost: Callable[[UserError], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        uses_cuda = may_use_cuda and torch.cuda.is_available()
        if uses_cuda:
            _take_card(launched)
        # Ray has connected its workers already.
        self._owns_group = not dist.is_initialized()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = meet(launched, host, port, check=check) if self._owns_group else None
        self.number, self.count = launched.number, launched.count
        self.launched = launched
        self._buffer: Tensor | None = None
        self._waited, self._step_seconds, self._last_end = 0.0, 0.0, time.monotonic()
        self._hosts: list[str] = []
        self.watch = Watch(launched.number, launched.count, host, port, on_lost=on_lost)
        if store is not None:
            backend = backend_for(uses_cuda=uses_cuda)
            try:
                with self.watch.phase("waiting"):
                    connect(launched, backend, store, COLLECTIVE_TIMEOUT, check=check)
            except BaseException:
                self.watch.close()
                raise
        self._hosts = self.gather(f"host {socket.gethostname()}, process {os.getpid()}")

    def name_of(self, number: int) -> str:
        """For messages: `rank 3 (host gpu-b, process 812)`."""
        return f"rank {number} ({self._hosts[number]})"

    def mine(self, parts: Sequence[T]) -> T:
        return parts[self.number]

    def seed_words(self, words: Sequence[int]) -> list[int]:
        # Rank 0 draws what one process would; a word of 0 would be the same as none, so the others' begin at 1.
        return [*words, self.number] if self.number else list(words)

    def add_up(
        self, parameters: Sequence[nn.Parameter], loss: Tensor, numbers: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        # Read first: what a card is asked for is done only when it is waited for, which is not waiting for others.
        small = torch.tensor([float(loss), *numbers, self._waited], dtype=torch.float64)
        began = time.monotonic()
        with self.watch.phase("waiting"):
            sums = self._sum(parameters, small)
        ended = time.monotonic()
        if self._step_seconds:
            self.waiting_share = min(float(sums[-1]) / self.count / self._step_seconds, 1.0)
        self._waited, self._step_seconds, self._last_end = ended - began, ended - self._last_end, ended
        assert self._buffer is not None
        # Not the loss's own dtype: that of an empty part may be another one.
        return sums[0].to(self._buffer.dtype).to(loss.device), sums[1:-1].tolist()

    def add_arrays(self, values: np.ndarray) -> np.ndarray:
        summed = torch.from_numpy(np.array(values, np.float64))
        with self.watch.phase("waiting"):
            self._exchange(lambda: dist.all_reduce(summed))
        found: np.ndarray = summed.numpy()
        return found

    def level(self, items: Sequence[T], filler: T | None) -> Sequence[T]:
        if not self.has_equal_passes:
            return items
        most = max(self.gather(len(items)))
        if len(items) == most:
            return items
        assert filler is not None
        return [*items, *[filler] * (most - len(items))]

    def once(self, function: Callable[[], T]) -> T:
        value: Any = None
        error: BaseException | None = None
        if self.number == 0:
            try:
                value = function()
            except Exception as raised:
                error = raised
        message = None
        if self.number == 0:
            message = encode({"error": encode_error(error)} if error is not None else {"value": value})
        found = decode(self._broadcast(message))
        if error is not None:
            raise error
        if "error" in found:
            raise error_elsewhere(found["error"], self.name_of(0))
        return value if self.number == 0 else found["value"]  # type: ignore[no-any-return]

    def on_first(self, function: Callable[[], object]) -> None:
        if self.number == 0:
            function()

    def first_of(self, first: Callable[[], T], others: Callable[[], T]) -> T:
        return first() if self.number == 0 else others()

    def together(self, function: Callable[[], T]) -> T:
        value, error = _attempt(function)
        self._end_if_any_failed(error)
        return value  # type: ignore[return-value]  # a failure has been raised above

    def in_turn(self, function: Callable[[], T]) -> T:
        is_first_here = self.launched.local_number == 0
        value, error = _attempt(function) if is_first_here else (None, None)
        self._end_if_any_failed(error)
        if not is_first_here:
            value, error = _attempt(function)
        self._end_if_any_failed(error)
        return value  # type: ignore[return-value]

    def stop_together(self, check: Callable[[], None], num_stopping: float) -> None:
        if num_stopping > 0:
            self.together(check)

    def gather(self, value: T) -> list[T]:
        return [decode(message) for message in self._all_gather(encode(value))]

    def agree(self, values: Mapping[str, object]) -> None:
        found = self.gather(dict(values))
        for name in values:
            odd = [number for number, other in enumerate(found) if other.get(name) != found[0].get(name)]
            if odd:
                shown = "; ".join(f"{self.name_of(number)}: {found[number].get(name)}" for number in [0, *odd[:3]])
                error = UserError(
                    f"the processes would not train the same thing: {name} differs",
                    where=shown,
                    next_step="give every machine the same files, versions and settings",
                )
                raise error if self.number == 0 else error_elsewhere(encode_error(error), self.name_of(0))

    def at(self, phase: str, step: int) -> None:
        self.watch.at(phase, step)

    def saved(self, where: str) -> None:
        self.watch.newest_checkpoint = where

    def close(self) -> None:
        self.watch.close()
        if not self._owns_group:
            return
        with contextlib.suppress(RuntimeError):  # of a connection that is broken already
            dist.destroy_process_group()

    def _end_if_any_failed(self, error: Exception | None) -> None:
        found = self.gather(None if error is None else encode_error(error))
        failed = [number for number, other in enumerate(found) if other is not None]
        if not failed:
            return
        # A stop is not a failure; of several failures, the first rank's is said.
        first = min(failed, key=lambda number: (found[number]["kind"] == "stop", number))  # type: ignore[index]
        if error is not None and (first == self.number or found[first]["kind"] == "stop"):  # type: ignore[index]
            raise error
        raise error_elsewhere(found[first], self.name_of(first))  # type: ignore[arg-type]

    def _sum(self, parameters: Sequence[nn.Parameter], small: Tensor) -> Tensor:
        """Sum gradients in place; returns the sums of `small`, float64 on the host."""
        sizes = [parameter.numel() for parameter in parameters]
        num_gradients = sum(sizes)
        buffer = self._take_buffer(parameters, num_gradients + len(small) + len(sizes))
        pieces = buffer[:num_gradients].split_with_sizes(sizes)
        is_there = torch.zeros(len(sizes), dtype=torch.float64)
        for number, (parameter, piece) in enumerate(zip(parameters, pieces, strict=True)):
            if parameter.grad is None:
                piece.zero_()
            else:
                piece.copy_(parameter.grad.reshape(-1))
                is_there[number] = 1
        buffer[num_gradients:] = torch.cat((small, is_there)).to(buffer)
        self._exchange(lambda: dist.all_reduce(buffer))
        rest = buffer[num_gradients:].double().cpu()
        sums, num_there = rest[: len(small)], rest[len(small) :]
        for parameter, piece, count in zip(parameters, pieces, num_there.tolist(), strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view_as(parameter))
        return sums

    def _take_buffer(self, parameters: Sequence[nn.Parameter], length: int) -> Tensor:
        if self._buffer is None or len(self._buffer) != length:
            dtype = torch.float32
            for parameter in parameters:
                dtype = torch.promote_types(dtype, parameter.dtype)
            self._buffer = torch.zeros(length, dtype=dtype, device=parameters[0].device)
        return self._buffer

    def _broadcast(self, message: bytes | None) -> bytes:
        """What rank 0 says, on every rank."""
        with self.watch.phase("waiting"):
            length = torch.tensor([0 if message is None else len(message)])
            self._exchange(lambda: dist.broadcast(length, src=0))
            content = torch.empty(int(length), dtype=torch.uint8)
            if message is not None:
                content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
            self._exchange(lambda: dist.broadcast(content, src=0))
            return content.numpy().tobytes()

    def _all_gather(self, message: bytes) -> list[bytes]:
        with self.watch.phase("waiting"):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            self._exchange(lambda: dist.all_gather(lengths, torch.tensor([len(message)])))
            longest = max(int(length) for length in lengths)
            padded = torch.frombuffer(bytearray(message.ljust(longest, b"\0")), dtype=torch.uint8)
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            self._exchange(lambda: dist.all_gather(found, padded))
            return [one[: int(length)].numpy().tobytes() for one, length in zip(found, lengths, strict=True)]

    def _exchange(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # what gloo and NCCL raise when a connection ends
            raise self.watch.name_lost(str(error)) from error


def backend_for(*, uses_cuda: bool) -> str:
    """What torch.distributed connects the processes with."""
    return "cpu:gloo,cuda:nccl" if uses_cuda else "gloo"


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _take_card(launched: Launched) -> None:
    """Let this process use its own GPU, before anything is placed on one."""
    count = torch.cuda.device_count()
    if count < launched.local_count:
        raise UserError(
            f"{launched.local_count} processes were started on a machine with {count} CUDA devices",
            next_step=f"`--nproc {count}`, or `--set device=cpu` to train on the processor",
        )
    torch.cuda.set_device(launched.local_number)

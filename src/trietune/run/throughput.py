"""How fast a run trains: what each step's metrics say of its size and speed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trietune.training.loop import Step


class Throughput:
    """Rates since the last step, without the time that evaluation and saving took."""

    def __init__(self) -> None:
        self._last = 0.0
        self._left_out = 0.0
        self.slowest_step = 0.0

    def start(self) -> None:
        """Count from now on."""
        self._last, self._left_out = time.monotonic(), 0.0

    def leave_out(self, seconds: float) -> None:
        """Time that is not training's."""
        self._left_out += seconds

    def metrics(
        self, step: Step, memory_bytes: int, num_compilations: int | None = None, *, waiting_share: float = 0.0
    ) -> dict[str, float | int | None]:
        """The metrics of one step; `num_compilations` where something has been compiled.

        Over several processes also how evenly the step was dealt, what was computed more than once because it was
        split, and the part of the step before that a process waited for others (`waiting_share`).
        """
        now = time.monotonic()
        seconds = max(now - self._last - self._left_out, 1e-9)
        self._last, self._left_out = now, 0.0
        self.slowest_step = max(self.slowest_step, seconds)
        metrics: dict[str, float | int | None] = {
            "train/loss": step.loss,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "examples_per_second": len(step.sequence_indices) / seconds,
            "tokens_per_second": step.num_positions / seconds,
            "sharing_factor": step.num_tokens / max(step.num_positions, 1),
            "num_labels": step.num_labels,
            "num_micro_batches": step.num_micro_batches,
            "memory_bytes": memory_bytes,
            **{f"train/{name}": value for name, value in step.metrics.items()},
        }
        if step.deal is not None:
            metrics |= {
                "world_size": len(step.deal.parts),
                "ranks/imbalance": step.deal.imbalance,
                "ranks/repeated": step.deal.repeated,
                "ranks/waiting_share": waiting_share,
            }
        return metrics if num_compilations is None else {**metrics, "num_compilations": num_compilations}

"""Stop when validation no longer improves: `early_stopping_patience` evaluations without a better `checkpoint_metric`.

patience 2, min, threshold 0      0.90  0.80  0.81  0.80      the fourth is the second without a better one: stop
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trietune.errors import UserError

if TYPE_CHECKING:
    from trietune.config.settings import Settings


@dataclass(slots=True)
class EarlyStopping:
    """How long it has been since an evaluation was better than all before it.

    Attributes:
        best: value of the best evaluation; None before the first one that is a number.
        best_step: at which it was measured.
        waited: evaluations since.
    """

    metric: str
    is_least_best: bool
    patience: int | None
    threshold: float
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    @classmethod
    def of(cls, settings: Settings) -> EarlyStopping:
        is_least_best = settings.checkpoint_metric_mode == "min"
        threshold = settings.early_stopping_threshold
        return cls(settings.checkpoint_metric, is_least_best, settings.early_stopping_patience, threshold)

    @property
    def is_over(self) -> bool:
        """Whether training should end now."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def sentence(self) -> str:
        """Why training ends, for people."""
        best = (
            "no evaluation had a number" if self.best is None else f"best at step {self.best_step:,}: {self.best:.4g}"
        )
        times = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        return f"`{self.metric}` was not better in {times} ({best})"

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuse to wait for a metric that is never measured.

        Raises:
            UserError: naming those that are.
        """
        if self.patience is not None and self.metric not in metrics:
            raise UserError(
                f"`early_stopping_patience` waits for `{self.metric}`, which is not measured on this data",
                where=f"measured are {', '.join(f'`{name}`' for name in metrics)}",
                next_step="write one of them as `checkpoint_metric`",
            )

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take an evaluation. A value that is not finite is not better.

        Raises:
            UserError: as `check`.
        """
        self.check(metrics)
        value = metrics.get(self.metric)
        if value is None:
            return
        if math.isfinite(value) and (self.best is None or self._gain(value) > self.threshold):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    def _gain(self, value: float) -> float:
        assert self.best is not None
        return self.best - value if self.is_least_best else value - self.best

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: Mapping[str, Any] | None) -> bool:
        """Go on counting from a checkpoint's `state`; False if it counted another metric, or nothing."""
        if not isinstance(state, Mapping) or state.get("metric") != self.metric:
            return False
        best = state.get("best")
        self.best = float(best) if best is not None else None
        self.best_step, self.waited = int(state["best_step"]), int(state["waited"])
        return True

    def begin_anew(self, say: Callable[[str], None]) -> None:
        """Say that a resume cannot continue counting, if there is anything to count."""
        if self.patience is not None:
            say(
                "`early_stopping_patience` counts from here on: the checkpoint has no count of this metric on this data"
            )

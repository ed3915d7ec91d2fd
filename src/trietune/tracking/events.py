"""What happens in a run, as small frozen records; console, files and trackers consume them.

A listener never asks the run for anything and imports no stage: whatever it shows is in the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Emitted once, before any slow work that belongs to training itself.

    `config` holds resolved settings without secrets; `environment` versions, device and fingerprints; `plan` the
    lines that describe what will run, as (name, value) pairs in the order to print.
    """

    name: str
    directory: Path
    num_steps: int
    first_step: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One line for the user: a count, a fall-back, a decision."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True)
class PhaseProgress:
    """A phase with a bar of its own (tokenizing, evaluating, loading): `done` of `total`; `total` None if unknown."""

    phase: str
    done: int
    total: int | None
    unit: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """One optimizer step.

    `metrics` carries `train/loss`, `learning_rate`, `grad_norm`, `examples_per_second`, `tokens_per_second` (distinct
    tokens), `sharing_factor` (label-relevant tokens over distinct tokens), `memory_bytes`. `is_logged` is true every
    `steps_freq` steps: only then do files and trackers record it, while the progress bar moves at each step.
    """

    step: int
    epoch: float
    metrics: Metrics
    example_ids: Sequence[str]
    is_logged: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation, named `eval/...`; `when` is `before`, `during` or `after` training.

    Shares (`eval/accuracy`, `eval/exact_match`, `eval/f1`, ...) are fractions from 0 to 1. `intervals` are 95%
    intervals in the unit of their metric, under the same names. `weights_step` is the step whose weights were
    measured, where an earlier checkpoint won: then the values are not points of a curve at `step`.
    """

    step: int
    epoch: float
    metrics: Metrics
    num_examples: int
    when: Literal["before", "during", "after"]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    weights_step: int | None = None

    @property
    def measured_step(self) -> int:
        """The step whose weights were measured."""
        return self.step if self.weights_step is None else self.weights_step

    @property
    def is_point(self) -> bool:
        """Whether the values belong into a curve, at `step`."""
        return self.measured_step == self.step


@dataclass(frozen=True, slots=True)
class MarkedExample:
    """A training example as its tokens: (text, whether the token is a label), in order."""

    id: str
    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class ExamplesShown:
    """Training examples as the model reads them, for `print_examples`."""

    examples: Sequence[MarkedExample]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one evaluation example.

    Attributes:
        is_right: None where there is no right answer.
        probabilities: probability of each label, by its short name.
        f1: of an answer; None for labels.
        kind: kind of a question: `answerable` or `unanswerable`.
    """

    id: str
    prompt: str
    expected: str
    predicted: str
    is_right: bool | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    f1: float | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class PredictionsShown:
    """What the model says about every evaluated example, `before` or `after` training.

    `num_shown` is how many of them belong on a terminal: the first ones, none without `print_examples`.
    """

    step: int
    when: Literal["before", "after"]
    predictions: Sequence[Prediction]
    num_shown: int = 10


@dataclass(frozen=True, slots=True)
class Histograms:
    """Values of the adapter's tensors or gradients, flattened NumPy float32 arrays by name, for `wandb_watch_mode`.

    Names begin with `gradients/` or `parameters/`. A listener may read the arrays later, in another thread: hand over
    copies.
    """

    step: int
    arrays: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or the final adapter is whole on disk. `kind` is `checkpoint` or `adapter`."""

    kind: Literal["checkpoint", "adapter"]
    step: int
    directory: Path
    metrics: Metrics
    seconds: float


@dataclass(frozen=True, slots=True)
class Removed:
    """Retention took a checkpoint away."""

    step: int
    directory: Path


@dataclass(frozen=True, slots=True)
class RunFinished:
    """`status` is `finished`, `stopped` (a signal or `max_time`) or `failed`; `summary` is for trackers and the end."""

    status: Literal["finished", "stopped", "failed"]
    step: int
    seconds: float
    summary: Mapping[str, Any]
    next_commands: Sequence[str] = ()


Event = (
    RunStarted
    | Message
    | PhaseProgress
    | ExamplesShown
    | StepFinished
    | Evaluated
    | PredictionsShown
    | Histograms
    | Saved
    | Removed
    | RunFinished
)


class Listener(Protocol):
    """Something that shows or keeps events. It may raise: `trietune.tracking.tracker` says what happens then."""

    name: str

    def handle(self, event: Event) -> None: ...

    def close(self) -> None: ...

"""A grid of trainings: one run for each combination of values, one after the other or as tasks of a cluster.

    --over learning_rate=1e-4,3e-4 --over lora_r=4,8

    runs/sst2-sweep/learning_rate=1e-4,lora_r=4/      a run like any other
    runs/sst2-sweep/learning_rate=1e-4,lora_r=8/      ...
    runs/sst2-sweep/comparison.html

Each trial is a process of its own, started with `--resume`: the same command continues where it was interrupted, and
what has finished is not trained again. What a trial left behind is read from its folder, never remembered elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config import load_config
from trietune.errors import EXIT_DONE, EXIT_UPLOAD_INCOMPLETE, UserError
from trietune.io.places import expand
from trietune.ranks.launch import Processes, signal_name

if TYPE_CHECKING:
    from trietune.tracking.events import Evaluated
    from trietune.tracking.report.record import RunRecord

# Keys that a sweep sets for each trial, or that would make trials of one run.
OWN_KEYS = ("project_dir", "wandb_run_name", "resume_from_checkpoint")
COMPARISON = "comparison.html"
# A folder's name that needs no quotes in any shell.
_PLAIN = re.compile(r"[\w.+\-=,]{1,120}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination.

    Attributes:
        values: values of the keys that are swept over, as they were written.
        name: name of the run, and of its folder.
        command: command that trains it.
    """

    values: Mapping[str, str]
    name: str
    directory: Path
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its values, for messages."""
        return ",".join(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True, slots=True)
class Sweep:
    """A grid, checked, with nothing started.

    Attributes:
        directory: folder of all trials.
        metric, mode: what tells a better trial: `eval/loss`, `min`.
    """

    directory: Path
    trials: tuple[Trial, ...]
    metric: str
    mode: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended: its exit code, and a sentence where it is not 0."""

    trial: Trial
    exit_code: int
    sentence: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether there is something to compare."""
        return self.exit_code in (EXIT_DONE, EXIT_UPLOAD_INCOMPLETE)


def plan_sweep(config: Path | None, over: Sequence[str], overrides: Sequence[str]) -> Sweep:
    """Read the grid and check the settings of every trial, before any of them starts.

    Args:
        over: `key=a,b` texts; the last key varies fastest.
        overrides: `key=value` texts for all trials.

    Raises:
        UserError: a grid that cannot be read, or settings that are wrong in a trial, which it names.
    """
    grid = _read_grid(over, [override.partition("=")[0].strip() for override in overrides])
    settings = load_config(config, overrides)
    directory = expand(settings.project_dir) / f"{settings.wandb_run_name}-sweep"
    trials = []
    seen: dict[str, str] = {}
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        own = [*overrides, *(f"{key}={value}" for key, value in values.items())]
        name, title = _name_of(values), ",".join(f"{key}={value}" for key, value in values.items())
        try:
            resolved = load_config(config, own).model_dump_json()
        except UserError as error:
            raise UserError(f"trial `{title}`: {error.what}", where=error.where, next_step=error.next_step) from error
        if (twin := seen.setdefault(resolved, title)) != title:
            raise UserError(
                f"trials `{twin}` and `{title}` have the same settings", next_step="name each value once, in one way"
            )
        own += [f"project_dir={directory}", f"wandb_run_name={name}"]
        command = (sys.executable, "-m", "trietune", "train", *([] if config is None else [str(config)]),
                   *(f"--set={override}" for override in own), "--resume")  # fmt: skip
        trials.append(Trial(values, name, directory / name, command))
    return Sweep(directory, tuple(trials), settings.checkpoint_metric, settings.checkpoint_metric_mode)


def run_trials(sweep: Sweep, say: Callable[[str], None]) -> list[Outcome]:
    """Train one trial after the other; a failed one is named, and the next one begins. A signal ends all."""
    outcomes: list[Outcome] = []
    for number, trial in enumerate(sweep.trials, start=1):
        say(f"trial {number} of {len(sweep.trials)}: {trial.title}")
        processes = Processes(trial.command, 1)
        with processes.forwarding_signals():
            end = processes.wait()
        code = EXIT_DONE if end is None else end.code
        # A trial may be through before it hears of the signal.
        num_done = len(outcomes) + (code == EXIT_DONE)
        if processes.stopped_by is not None and num_done < len(sweep.trials):
            raise SweepStopped(128 + processes.stopped_by, num_done, len(sweep.trials))
        outcomes.append(outcome_of(trial, code))
        if outcomes[-1].sentence:
            say(f"error: {outcomes[-1].sentence}")
    return outcomes


class SweepStopped(Exception):  # noqa: N818  (a request, not a failure)
    """A signal ended the sweep; what was trained is kept."""

    def __init__(self, exit_code: int, num_done: int, num_trials: int) -> None:
        super().__init__(exit_code)
        self.exit_code, self.num_done, self.num_trials = exit_code, num_done, num_trials


def outcome_of(trial: Trial, code: int) -> Outcome:
    """What an exit code, negative after a signal, says of a trial."""
    if code == EXIT_DONE:
        return Outcome(trial, code)
    if code == EXIT_UPLOAD_INCOMPLETE:
        return Outcome(trial, code, f"trial `{trial.title}` is trained, but not all of it could be uploaded")
    if code < 0:
        return Outcome(trial, 128 - code, f"trial `{trial.title}` was killed by {signal_name(-code)}")
    return Outcome(trial, code, f"trial `{trial.title}` ended with exit code {code}")


def comparison_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The trials side by side: their values, what was measured after training, and which is best."""
    from trietune.tracking import wording
    from trietune.tracking.report.record import read_run

    records: dict[str, RunRecord] = {
        outcome.trial.name: read_run(outcome.trial.directory) for outcome in outcomes if outcome.is_trained
    }
    found = {name: record.newest_evaluation() for name, record in records.items()}
    metrics = list(dict.fromkeys(key for evaluation in found.values() if evaluation for key in evaluation.metrics))
    keys = list(sweep.trials[0].values)
    table: list[tuple[str, ...]] = [(*keys, *(wording.metric_name(key) for key in metrics), "time", "")]
    best = _best(sweep, found)
    for outcome in outcomes:
        name, values = outcome.trial.name, outcome.trial.values
        evaluation, record = found.get(name), records.get(name)
        cells = [wording.metric_value(key, evaluation.metrics.get(key)) if evaluation else "-" for key in metrics]
        seconds = None if record is None else record.seconds
        note = "" if outcome.exit_code == EXIT_DONE else f"exit code {outcome.exit_code}"
        if name == best:
            note = f"best {wording.metric_name(sweep.metric)}" + (f", {note}" if note else "")
        table.append(
            (*(values[key] for key in keys), *cells, "-" if seconds is None else wording.duration(seconds), note)
        )
    return table


def _best(sweep: Sweep, found: Mapping[str, Evaluated | None]) -> str | None:
    """The trial whose metric is best; None with less than two to choose from."""
    measured = {}
    for name, evaluation in found.items():
        value = evaluation.metrics.get(sweep.metric) if evaluation else None
        if value is not None and math.isfinite(value):
            measured[name] = float(value)
    if len(measured) < 2:
        return None
    choose = max if sweep.mode == "max" else min
    return choose(measured, key=measured.__getitem__)


def write_comparison(sweep: Sweep, outcomes: Sequence[Outcome]) -> Path | None:
    """The page that compares the trained trials; None where there are none."""
    from trietune.tracking.report.report import write_report

    trained = [outcome.trial.directory for outcome in outcomes if outcome.is_trained]
    if not trained:
        return None
    page = sweep.directory / COMPARISON
    write_report(trained, page)
    return page


def split_values(text: str) -> list[str]:
    """`a,b` as two values; commas within brackets, braces or quotes separate nothing."""
    values, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not text[start:at].strip(" [{"):
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            values.append(text[start:at].strip())
            start = at + 1
    return [*values, text[start:].strip()]


def _read_grid(over: Sequence[str], taken: Sequence[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    for text in over:
        key, separator, values = text.partition("=")
        key = key.strip()
        if not separator:
            raise UserError(f"`--over {text}` has no `=`", next_step="--over learning_rate=1e-4,3e-4")
        if not key:
            raise UserError(f"`--over {text}` has no key", next_step="--over learning_rate=1e-4,3e-4")
        if key in grid:
            raise UserError(f"`--over {key}` is given twice", next_step=f"one `--over {key}=` with all its values")
        if key in OWN_KEYS:
            raise UserError(
                f"`{key}` says where a run lies, which a sweep decides for each trial",
                next_step="`--set project_dir=...` and `--set wandb_run_name=...` move the whole sweep",
            )
        if key in taken:
            raise UserError(
                f"`{key}` is both set for all trials and swept over", next_step=f"leave out `--set {key}=...`"
            )
        grid[key] = split_values(values)
        if "" in grid[key]:
            raise UserError(f"`--over {text}` holds an empty value", next_step=f"--over {key}=FIRST,SECOND")
        if len(set(grid[key])) < len(grid[key]):
            raise UserError(f"`--over {text}` holds a value twice", next_step="name each value once")
    if not grid:
        raise UserError("a sweep needs values to sweep over", next_step="--over learning_rate=1e-4,3e-4")
    return grid


def _name_of(values: Mapping[str, str]) -> str:
    """`learning_rate=1e-4,lora_r=8`; a digest where that is not a plain name for a folder."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    if _PLAIN.fullmatch(name):
        return name
    return f"trial-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

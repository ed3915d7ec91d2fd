"""What `import trietune` offers: the commands as functions, with advice in Python's words.

In a notebook, or at Python's prompt, an interrupted training saves and ends as a whole, and then `KeyboardInterrupt`
is raised, so that the cells or lines that follow are not run on half a model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from trietune import config
from trietune.errors import EXIT_SIGINT, StopRequested, UserError
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.python_words import as_python
from trietune.run.signals import is_interactive

if TYPE_CHECKING:
    from trietune.config import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.result import Run
    from trietune.tracking.tracker import Tracker

P = ParamSpec("P")
R = TypeVar("R")
Overrides = Sequence[str] | JsonMapping


def _advising(function: Callable[P, R]) -> Callable[P, R]:
    """Errors of the user say what to do next in Python."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except UserError as error:
            if error.next_step is not None:
                error.next_step = as_python(error.next_step)
            raise

    return call


def _check_settings(given: object) -> None:
    if not isinstance(given, config.Settings):
        how = repr(str(given)) if isinstance(given, str | Path) else "overrides={...}"
        raise UserError(
            f"`trietune.train` takes settings, and was given a value of the type `{type(given).__name__}`",
            next_step=f"trietune.train(trietune.load_config({how}))",
        )


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"`{name}={value!r}` is not a whole number of 1 or more")


@_advising
def load_config(
    path: Path | str | None = None, overrides: Overrides = (), environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settings of a run from a YAML file, the environment and overrides.

    Args:
        path: the file; None takes only defaults, environment and overrides.
        overrides: `key=value` texts as after `--set`, or a mapping of keys to Python values.
        environ: where `TRIETUNE_<KEY>` variables are looked up.

    Raises:
        UserError: naming everything that is wrong, each with its place and a remedy.
    """
    return config.load_config(path, overrides, environ)


@_advising
def train(settings: Settings, *, tracker: Tracker | None = None, allowed_changes: frozenset[str] = frozenset()) -> Run:
    """Train the adapter that `settings` describe; of several processes that a launcher started, each its part.

    Args:
        tracker: who hears of the run's events; by default its files, the console or the notebook, and the tracker that
            the settings name.
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.

    Raises:
        UserError: a mistake in settings or data, a loss that is not finite, a resume that was refused, or a process
            that was lost.
        KeyboardInterrupt: in a notebook or at Python's prompt, after an interrupted run has been saved and has ended.
        StopRequested: another signal came before there was anything to save.
    """
    from trietune.run.train import train as run_training

    _check_settings(settings)
    try:
        run = run_training(settings, tracker=tracker, allowed_changes=allowed_changes, in_python=True)
    except StopRequested as stop:
        if stop.exit_code == EXIT_SIGINT and is_interactive():
            raise KeyboardInterrupt("stopped before there was anything to save") from None
        raise
    if run.exit_code == EXIT_SIGINT and is_interactive():
        raise KeyboardInterrupt(
            f"the run was saved at step {run.step:,} in {run.directory}; "
            '`"resume_from_checkpoint=auto"` among the overrides continues it'
        )
    return run


@_advising
def evaluate(
    target: str | Path,
    *,
    overrides: Overrides = (),
    split: str | None = None,
    max_examples: int | None = None,
    tracker: Tracker | None = None,
    keep: Path | None = None,
) -> Evaluation:
    """Measure a run, an adapter or a base model.

    Args:
        target: a run's folder, an adapter's folder, or a base model as in `model_name`.
        overrides: changes to the run's settings, such as `dataset_id=...` or `validation_file=...`.
        split: `train`, `validation` or `test`, as a run splits the data. None takes the validation examples of a run's
            own data, and of other data its validation split, or every row where it has none.
        max_examples: a random subset of this size; None takes all.
        keep: file for what was said to each example: SQuAD's JSON for questions, JSONL otherwise.

    Raises:
        UserError: there is no such model or data.
    """
    from trietune.run.opened import evaluate as measure

    if max_examples is not None:
        _check_count("max_examples", max_examples)
    return measure(target, overrides=overrides, split=split, max_examples=max_examples, tracker=tracker, keep=keep)


@_advising
def predict(
    target: str | Path,
    inputs: str | JsonMapping | Sequence[str | JsonMapping],
    *,
    overrides: Overrides = (),
    max_new_tokens: int = 256,
) -> list[JsonObject]:
    """Ask a run, an adapter or a base model.

    Args:
        target: a run's folder, an adapter's folder, or a base model as in `model_name`.
        inputs: texts, or rows with the prompt's columns, or with `messages`; one of them, or a list.
        overrides: changes to the run's settings, such as `device=cpu`.
        max_new_tokens: longest answer.

    Returns:
        What the command writes: for each input `{"input", "label", "probabilities"}` in a
        task with labels, else `{"input", "text"}`.

    Raises:
        UserError: there is no such model, or it cannot be asked this.
    """
    from trietune.run.opened import open_model
    from trietune.run.opened import predict as ask
    from trietune.run.signals import StopSignals
    from trietune.tracking.tracker import Tracker as Quiet

    _check_count("max_new_tokens", max_new_tokens)
    asked = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
    opened = open_model(target, overrides, Quiet())
    try:
        with StopSignals() as signals:
            answers = ask(opened, asked, max_new_tokens=max_new_tokens, check_stop=signals.check)
    except StopRequested as stop:
        if stop.exit_code == EXIT_SIGINT:
            raise KeyboardInterrupt from None
        raise
    return [{"input": given, **answer} for given, answer in zip(asked, answers, strict=True)]


@_advising
def export(
    target: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    to: Literal["transformers", "vllm", "mlx", "gguf", "ollama"] | None = None,
) -> Path:
    """Write an adapter, or with `merge` a whole model, into a new folder.

    Args:
        target: a run's folder or an adapter's.
        out: new or empty folder.
        merge: a whole model: the adapter added to its base, read back and compared.
        to: the program that shall read it. None is plain PEFT, or with `merge` transformers.

    Returns:
        The folder.

    Raises:
        UserError: there is no such adapter, the folder is in use, or what was written does not agree.
    """
    from trietune.model.adapter.export import export_adapter
    from trietune.model.handover.rules import TARGETS
    from trietune.run.handover import export_to
    from trietune.tracking.tracker import Tracker as Quiet

    if to is not None and to not in TARGETS:
        raise UserError(f"`to={to!r}` is not known", next_step=f"one of {', '.join(TARGETS)}")
    if merge or to is not None:
        return export_to(
            Path(target), Path(out), Quiet(), target=to or "transformers", merge=merge, quantization=None
        ).folder
    return export_adapter(Path(target), Path(out)).folder

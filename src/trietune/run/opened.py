"""Use what was trained, or a base model as it comes: open it, evaluate it, ask it.

runs/NAME            a run: its final adapter, its data, its prompt format
runs/NAME/adapter    an adapter: its base model and prompt format; data must be named
sst2-merged          a merged model: its prompt format; data must be named
google/gemma-...     a base model: data, or plain text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config import load_config
from trietune.data.load import load_parts
from trietune.demo import DEMO_MODEL
from trietune.errors import UserError
from trietune.io.adapter_place import adapter_in
from trietune.io.cache_folder import cache_folder
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.outputs import check_output
from trietune.io.places import expand
from trietune.io.run_folders import is_mistyped_run, next_of_stopped, which_run
from trietune.ranks.launched import refuse_several_processes
from trietune.run.fitting import with_max_length
from trietune.run.opening import open_machine, progress_of
from trietune.run.signals import StopSignals
from trietune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trietune.evaluation.evaluate import Evaluation
    from trietune.evaluation.sampling import Sampling
    from trietune.run.loaded import LoadedModel


def evaluate(
    target: str | Path,
    *,
    overrides: Sequence[str] | JsonMapping = (),
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
    tracker = tracker or Tracker()
    if split not in (None, "train", "validation", "test"):
        raise UserError(f"there is no split `{split}`", next_step="--split validation   (or train, or test)")
    if keep is not None:
        check_output(keep, "--predictions")
    with StopSignals() as signals:
        opened = open_model(target, overrides, tracker)
        from trietune.run.asking import measure

        if not _names_data(opened, target, overrides):
            raise UserError(
                f"`{target}` belongs to no run, so name the data to evaluate it on",
                next_step=f"trietune evaluate {target} --dataset FILE   (a file, a folder or a hub id)",
            )
        if split is None and not _overridden_data(overrides):
            split = "validation"
        settings = opened.settings
        if _overridden_data(overrides) == {"validation_file"} and not _is_run(target):
            # Nothing else is to be looked up, least of all the default data set.
            settings = settings.model_copy(update={"train_file": settings.validation_file, "dataset_id": None})
        settings = with_max_length(settings, opened.model.config)
        parts = load_parts(
            settings,
            opened.tokenizer,
            split,  # type: ignore[arg-type]  # checked above
            prompt_format=opened.prompt_format,
            cache_folder=cache_folder() / "data",
            report=tracker.info,
            progress=progress_of(tracker, "examples"),
            check_stop=signals.check,
        )
        return measure(
            opened,
            parts,
            max_examples=max_examples,
            tracker=tracker,
            check_stop=signals.check,
            keep=keep,
        )


def predict(
    opened: LoadedModel,
    inputs: Sequence[str | JsonMapping],
    *,
    max_new_tokens: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
    sampling: Sampling | None = None,
    places: Sequence[str] | None = None,
) -> list[JsonObject]:
    """What the model says to each input: `{"label", "probabilities"}` for a task with labels, else `{"text"}`.

    Args:
        places: what each input is called where it cannot be asked; None counts them.
    """
    from trietune.run.asking import ask

    return ask(opened, inputs, max_new_tokens=max_new_tokens, check_stop=check_stop, sampling=sampling, places=places)


def open_model(target: str | Path, overrides: Sequence[str] | JsonMapping, tracker: Tracker) -> LoadedModel:
    """Load the base model and the adapter that `target` names.

    Raises:
        UserError: `target` is none of a run, an adapter or a base model, its adapter is not as the manifest says, or a
            launcher started several processes.
    """
    refuse_several_processes()
    path = expand(target)
    adapter = adapter_in(path)
    run = path if (path / "config.yaml").is_file() else None
    if path.is_dir() and adapter is None and run is not None:
        raise UserError(
            f"`{target}` has no final adapter: the run did not finish",
            next_step=next_of_stopped(path),
        )
    if str(target).lower() != DEMO_MODEL and is_mistyped_run(path):
        raise UserError(f"there is no run `{target}`, and no folder", next_step=which_run(path))
    settings = load_config(run / "config.yaml" if run else None, overrides)
    machine = open_machine(settings, tracker)
    # Now that the device has been chosen: transformers starts XLA devices when it is imported.
    from trietune.run.loaded import load_model

    return load_model(str(target), adapter, settings, machine, tracker)


def _names_data(opened: LoadedModel, target: str | Path, overrides: Sequence[str] | JsonMapping) -> bool:
    return _is_run(target) or bool(_overridden_data(overrides))


def _is_run(target: str | Path) -> bool:
    return (expand(target) / "config.yaml").is_file()


def _overridden_data(overrides: Sequence[str] | JsonMapping) -> set[str]:
    """The keys of `overrides` that name data."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else (item.split("=", 1) for item in overrides)
    named = {key.strip() for key, *value in pairs if value not in ([None], ["null"], [""])}
    return named & {"dataset_id", "train_file", "validation_file"}

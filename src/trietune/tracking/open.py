"""Choose what sees a run: its files always, a tracker if one is asked for, the report, and the console last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from trietune.errors import UserError
from trietune.tracking.console.console import ConsoleListener
from trietune.tracking.events import Listener
from trietune.tracking.jsonl import FilesListener
from trietune.tracking.report.report import ReportListener
from trietune.tracking.tracker import Tracker
from trietune.tracking.wandb.access import is_installed

TrackerName = Literal["auto", "wandb", "tensorboard", "trackio", "none"]


def open_tracker(
    *,
    tracker: TrackerName = "auto",
    use_wandb: bool = False,
    project: str | None = None,
    run_name: str | None = None,
    tags: Sequence[str] = (),
    model_to_wandb: bool = False,
    writes_files: bool = True,
    console: Listener | None = None,
    in_python: bool = False,
) -> Tracker:
    """The listeners of one run, in the order in which they hear of an event.

    Args:
        tracker: `auto` is W&B if `use_wandb`, else none.
        project, run_name, tags, model_to_wandb: for the tracker; without a `run_name` it takes the run's.
        writes_files: False shows events without keeping them.
        in_python: whether the console says what to do next in Python's words.
        console: instead of the one that writes to stdout and stderr.

    Raises:
        UserError: `tracker` names one that is not installed.
    """
    opened = Tracker()
    if writes_files:
        opened.add(FilesListener())
    chosen = ("wandb" if use_wandb else "none") if tracker == "auto" else tracker
    if tracker not in ("auto", "none"):
        _check_installed(tracker)
    if chosen != "none":
        opened.add(
            _open_named(
                chosen,
                say=lambda text, is_warning: (opened.warn if is_warning else opened.info)(text),
                project=project,
                run_name=run_name,
                tags=tags,
                model_to_wandb=model_to_wandb,
            )
        )
    if writes_files:
        opened.add(ReportListener())
    opened.add(console or ConsoleListener(in_python=in_python))
    return opened


def _open_named(
    name: str,
    *,
    say: Callable[[str, bool], None],
    project: str | None,
    run_name: str | None,
    tags: Sequence[str],
    model_to_wandb: bool,
) -> Listener:
    if name == "wandb":
        from trietune.tracking.wandb.listener import WandbListener

        return WandbListener(say, project=project, name=run_name, tags=tags, uploads_model=model_to_wandb)
    if name == "tensorboard":
        from trietune.tracking.tensorboard import TensorboardListener

        return TensorboardListener()
    from trietune.tracking.trackio import TrackioListener

    return TrackioListener(project=project, name=run_name)


def _check_installed(name: str) -> None:
    if not is_installed(name):
        raise UserError(
            f"`tracker: {name}` needs the package `{name}`, which is not installed",
            next_step=f"pip install 'trietune[{name}]'     (or `--set tracker=none`: the run's files have everything)",
        )

"""Folders of runs near a path that is none: what somebody who mistyped one may have meant."""

from __future__ import annotations

import difflib
from pathlib import Path

# Where runs are unless somebody says otherwise, and what each has.
RUNS = Path("runs")
CONFIG = "config.yaml"
_METRICS = "metrics.jsonl"
_SHOWN = 3
_CHECKPOINTS_SHOWN = 5
# From here on a path is taken for a mistyped run, though it could be the name of a model.
ALIKE = 0.8


def nearest_runs(path: Path) -> list[Path]:
    """Runs beside `path`, or in `runs/`, whose names are near to its name, the nearest first."""
    places = dict.fromkeys([path.parent, RUNS, *([] if path.parent == Path() else [path])])
    found = [run for place in places for run in _runs_in(place)]
    if path.name in {run.name for run in found}:
        return [run for run in found if run.name == path.name]
    near = difflib.get_close_matches(path.name, [run.name for run in found], n=_SHOWN, cutoff=0.6)
    return [next(run for run in found if run.name == name) for name in dict.fromkeys(near)]


def which_run(path: Path) -> str:
    """What to do next where `path` should be a run's folder and is not."""
    if near := nearest_runs(path):
        return f"did you mean {' or '.join(f'`{run}`' for run in near)}?"
    beside = [run for place in dict.fromkeys((path, path.parent, RUNS)) for run in _runs_in(place)]
    if beside:
        more = f", ... ({len(beside)} in all)" if len(beside) > _SHOWN else ""
        return f"name a run's folder: {', '.join(map(str, beside[:_SHOWN]))}{more}"
    return "name a run's folder: runs/NAME"


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps; empty for what is no run."""
    return sorted((run / "checkpoints").glob("step-*[0-9]")) if run.is_dir() else []


def next_of_stopped(run: Path) -> str:
    """What to do where a run without a final adapter was named."""
    finish = "`trietune train ... --resume` finishes it"
    checkpoints = checkpoints_in(run)
    if not checkpoints:
        return f"{finish}; it has no checkpoints"
    names = ", ".join(one.name for one in checkpoints[-_CHECKPOINTS_SHOWN:])
    return f"{finish}, or name one of its checkpoints ({names}): {checkpoints[-1]}"


def is_mistyped_run(path: Path) -> bool:
    """Whether a path that does not exist was meant as a run, and not as a model of the hub.

    `runs/flim-reviews` beside `runs/film-reviews`, `film-reviews` where `runs/film-reviews` is; not `gpt2`.
    """
    if path.exists():
        return False
    near = nearest_runs(path)
    if len(path.parts) > 1 and path.parent.is_dir():
        # No folder here is called like the owner of a model and holds runs.
        return bool(near) or bool(_runs_in(path.parent))
    return any(
        difflib.SequenceMatcher(None, str(path), str(run)).ratio() >= 0.8 or run.name == path.name for run in near
    )


def _runs_in(folder: Path) -> list[Path]:
    try:
        return sorted(
            entry for entry in folder.iterdir() if any((entry / name).is_file() for name in (CONFIG, _METRICS))
        )
    except OSError:
        return []

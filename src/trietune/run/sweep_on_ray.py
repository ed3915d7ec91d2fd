"""`trietune sweep --ray`: each trial is a task of the cluster, as many at once as it has room for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trietune.errors import EXIT_SIGINT
from trietune.io.files import make_folders
from trietune.ranks.launch import end_with_parent
from trietune.ranks.ray_cluster import open_cluster
from trietune.run.signals import StopSignals
from trietune.run.sweep import Outcome, Sweep, SweepStopped, outcome_of

POLL_S = 1.0
LAST_LINES = 3


def run_trials_on_ray(
    sweep: Sweep, *, address: str | None, cpus_per_trial: int, say: Callable[[str], None]
) -> list[Outcome]:
    """Train all trials as tasks; a failed one is named with its last lines, the others go on. A signal ends all.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    make_folders(sweep.directory)
    with StopSignals() as signals, open_cluster(address) as ray:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        # Ray's own repeats would hide that a trial was killed; the same command tries it again.
        task = ray.remote(num_cpus=cpus_per_trial, num_gpus=gpus, max_retries=0)(train_trial)
        waiting = {task.remote(trial.command, str(Path.cwd())): trial for trial in sweep.trials}
        found: dict[str, Outcome] = {}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_S)
            for reference in done:
                trial = waiting.pop(reference)
                code, last = _result(ray, reference)
                outcome = outcome_of(trial, code)
                found[trial.name] = outcome
                if outcome.sentence:
                    say("\n".join([f"error: {outcome.sentence}", *(f"       {line}" for line in last)]))
                else:
                    say(f"trial {len(found)} of {len(sweep.trials)}: {trial.title} has finished")
            if signals.received is not None and waiting:
                for reference in waiting:
                    # As Ctrl-C: a task under way ends its training, which saves.
                    ray.cancel(reference)
                ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
                raise SweepStopped(128 + signals.received, len(found), len(sweep.trials))
    return [found[trial.name] for trial in sweep.trials]


def _result(ray: Any, reference: object) -> tuple[int, list[str]]:
    try:
        code, last = ray.get(reference)
    except Exception as error:  # the node or the worker was lost
        return -9, [" ".join(str(error).split())[:300]]
    return code, last


def train_trial(command: tuple[str, ...], folder: str) -> tuple[int, list[str]]:
    """Train one trial in a process of its own; its exit code, negative after a signal, and its last lines."""
    # Ray hides the GPUs of others from this task, and gives it the threads of its cores.
    child = subprocess.Popen(  # noqa: S603  (our own command)
        command,
        cwd=folder if Path(folder).is_dir() else None,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        start_new_session=True,
        # Ray kills a worker whose command or node has gone.
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    try:
        _, told = child.communicate()
    except BaseException:
        child.send_signal(2)
        child.wait()
        return EXIT_SIGINT, []
    return child.returncode, told.splitlines()[-LAST_LINES:]

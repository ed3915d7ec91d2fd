"""How many copies of this process a launcher started, read from the variables that launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trietune.errors import UserError

# The number of processes and the launchers that set it. SLURM_NTASKS is not among them: `sbatch` sets it for a script
# that runs once. SLURM_STEP_NUM_TASKS is set by `srun` for what it starts.
_COUNTS = {
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
}
# What torchrun sets for each process, and `trietune train --nproc` too.
_NEEDED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# When the user's command began, on this machine's monotonic clock: `--nproc` tells its processes. Not a key, hence no
# TRIETUNE_ in front.
BEGAN = "_TRIETUNE_BEGAN"


@dataclass(frozen=True, slots=True)
class Launched:
    """Which of the launched processes this one is.

    Attributes:
        number, count: among all processes.
        local_number, local_count: among those on this machine.
    """

    number: int = 0
    count: int = 1
    local_number: int = 0
    local_count: int = 1


def read_launched(environ: Mapping[str, str] = os.environ) -> Launched:
    """The place of this process among those that torchrun or `--nproc` started; one of one if none did.

    Raises:
        UserError: another launcher started several, or a variable that torchrun sets is missing.
    """
    count = _started(environ, "WORLD_SIZE")
    if count is None:
        others = [variable for variable in _COUNTS if _started(environ, variable) is not None]
        if others:
            raise _refusal(
                others[0],
                environ,
                "they do not know of each other",
                "start one `torchrun` on each machine (`srun torchrun ...`), or use `trietune train --nproc N`",
            )
        return Launched()
    missing = [name for name in _NEEDED if not environ.get(name, "").strip()]
    if missing:
        raise UserError(
            f"WORLD_SIZE={count} announces several processes, but {', '.join(missing)} {_is(missing)} not set",
            where="these variables come from a launcher",
            next_step="`torchrun --nproc-per-node N -m trietune train ...`, or `trietune train --nproc N ...`",
        )
    return Launched(int(environ["RANK"]), count, int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"]))


def command_began() -> float | None:
    """When the command began that launched this process, as `time.monotonic` tells it; None if it was not told."""
    if _started(os.environ, "WORLD_SIZE") is None:
        return None
    try:
        return float(os.environ[BEGAN])
    except (KeyError, ValueError):
        return None


def processes_here(environ: Mapping[str, str] = os.environ) -> int:
    """Processes of this training that share this machine's memory."""
    value = environ.get("LOCAL_WORLD_SIZE", "").strip()
    return max(int(value), 1) if _started(environ, "WORLD_SIZE") is not None and value.isdecimal() else 1


def refuse_several_processes(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several copies, where all would do the same work.

    Raises:
        UserError: a launcher started more than one process.
    """
    for variable in _COUNTS:
        if _started(environ, variable) is not None:
            launcher = _COUNTS[variable]
            raise _refusal(
                variable,
                environ,
                "each would do the whole work: only `trietune train` shares its work",
                f"start this command without {launcher}, or set {variable}=1",
            )


def _started(environ: Mapping[str, str], variable: str) -> int | None:
    """The number of processes in `variable`, if it is more than one."""
    value = environ.get(variable, "").strip()
    return int(value) if value.isdecimal() and int(value) > 1 else None


def _refusal(variable: str, environ: Mapping[str, str], why: str, remedy: str) -> UserError:
    value = environ[variable].strip()
    return UserError(
        f"{value} processes were started, and {why}",
        where=f"the variable {variable}={value}, as {_COUNTS[variable]} sets it",
        next_step=remedy,
    )


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"

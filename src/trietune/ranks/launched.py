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
# torch, which reads it when it is imported, else writes a page of C++ frames to each lost connection.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
_FROM_LAUNCHER = "these variables come from a launcher"
_LAUNCH = "`torchrun --nproc-per-node N -m trietune train ...`, or `trietune train --nproc N ...`"
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
        UserError: another launcher started several, or a variable that torchrun sets is missing or makes no sense.
    """
    is_told = bool(environ.get("WORLD_SIZE", "").strip())
    count = _number(environ, "WORLD_SIZE", least=1) if is_told else 1
    if not is_told:
        _refuse_one_of_several(environ)
    if count == 1:
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
            where=_FROM_LAUNCHER,
            next_step=_LAUNCH,
        )
    _number(environ, "MASTER_PORT", least=1, most=65535)
    local_count = _number(environ, "LOCAL_WORLD_SIZE", least=1, most=count)
    return Launched(
        _number(environ, "RANK", most=count - 1),
        count,
        _number(environ, "LOCAL_RANK", most=local_count - 1),
        local_count,
    )


def be_quiet_if_launched() -> None:
    """Leave it to one sentence of ours to say who was lost; call it before torch is imported."""
    if _started(os.environ, "WORLD_SIZE") is not None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


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


def _number(environ: Mapping[str, str], variable: str, *, least: int = 0, most: int | None = None) -> int:
    """The number in a variable.

    Raises:
        UserError: it is none, or out of range.
    """
    text = environ[variable].strip()
    number = int(text) if text.isdecimal() else -1
    if number >= least and (most is None or number <= most):
        return number
    wanted = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    raise UserError(f"{variable}={text} is not {wanted}", where=_FROM_LAUNCHER, next_step=_LAUNCH)


def _refuse_one_of_several(environ: Mapping[str, str]) -> None:
    """Refuse to train by itself as a process with a number: another one would train the same, into another folder."""
    rank = environ.get("RANK", "").strip()
    if rank not in ("", "0"):
        raise UserError(
            f"RANK={rank} announces one of several processes, but WORLD_SIZE is not set",
            where=_FROM_LAUNCHER,
            next_step=_LAUNCH,
        )


def _refusal(variable: str, environ: Mapping[str, str], why: str, remedy: str) -> UserError:
    value = environ[variable].strip()
    return UserError(
        f"{value} processes were started, and {why}",
        where=f"the variable {variable}={value}, as {_COUNTS[variable]} sets it",
        next_step=remedy,
    )


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"

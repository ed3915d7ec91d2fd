"""How many copies of this process a launcher started, read from the variables that launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping

from trietune.errors import UserError

# The number of processes and the launchers that set it. SLURM_NTASKS is not among them: `sbatch` sets it for a script
# that runs once. SLURM_STEP_NUM_TASKS is set by `srun` for what it starts.
_COUNTS = {
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def refuse_several_processes(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several copies, which would all do the same work, each into a folder of its own.

    Raises:
        UserError: a launcher started more than one process.
    """
    for variable, launcher in _COUNTS.items():
        value = environ.get(variable, "").strip()
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"{value} processes were started, and each would do the whole work: TrieTune trains in one process",
                where=f"the variable {variable}={value}, as {launcher} sets it",
                next_step=f"start `trietune` without {launcher}, or set {variable}=1",
            )

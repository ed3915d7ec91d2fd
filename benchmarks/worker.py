"""One engine in a process of its own: reads a job, builds, and trains in rounds when told to. Started by compare.py.

    python benchmarks/worker.py JOB_FILE

Commands come on standard input, one JSON object a line; `job.py` draws the conversation.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src"), str(ROOT / "examples")]

ENGINES = {
    "original": "peers.original_loop",
    "minimal": "peers.minimal",
    "trainer": "peers.transformers_trainer",
    "trl": "peers.trl_sft",
    "trl-packed": "peers.trl_sft",
    "trl-fastest": "peers.trl_sft",
    "strongest": "peers.strongest",
    "trietune-padded": "peers.trietune_loop",
    "trietune-packed": "peers.trietune_loop",
    "trietune": "peers.trietune_loop",
}
# Of rows of preferences; for `preferences.py`.
DPO = dict.fromkeys(("dpo-trl", "dpo-strongest", "dpo-trietune"), "peers.dpo")
# TrieTune made to attend in one way; for `gpu.py`, where it matters.
WAYS = {f"trietune-{way}": "peers.trietune_loop" for way in ("varlen", "flex", "mask", "rows")}


def main(job_file: Path) -> None:
    # The protocol keeps the real standard output; whatever libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    from trietune.run.malloc import keep_freed_memory

    # `trietune train` does it for itself; here every engine gets it.
    keep_freed_memory()
    import torch
    from job import FinishedError, Gate, Job, synchronizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job = Job.read(job_file)
    engine = importlib.import_module({**ENGINES, **DPO, **WAYS}[job.engine])
    device = torch.device(job.device)
    try:
        engine.train(job, device, Gate(sys.stdin, replies, synchronizer(device)))
    except FinishedError:
        return
    raise RuntimeError(f"{job.engine} ran out of batches")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

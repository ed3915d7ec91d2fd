"""A process that goes on from step 1, saves steps 2 and 3 and copies each to S3, so that it can be killed meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path

from light_writer import contents_of, say, weights_at

from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.open import open_storage
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.uploads import synchronize
from trietune.checkpoints.store import CheckpointStore


def main() -> None:
    store = CheckpointStore(Path(sys.argv[1]), "run1", 1, 0, "eval/loss", "min")
    remote = RemoteRun(open_storage("s3", "bucket/runs"), "run", RetryPolicy(sleep=lambda s: False, num_attempts=1))
    for step in (2, 3):
        store.save(step, contents_of(weights_at(step), step, 20_000), metrics={"eval/loss": 0.5})
        synchronize(store, remote, final=False)
        say("copied", step)


if __name__ == "__main__":
    main()

"""Two sets of defaults: TrieTune's own, and those of the original experiment.

    framework: pytorch, use_tt: True, ...    a file of the original: what it leaves out is as the original had it
    train_file: data.jsonl                   any other: no data set, tracker or device that was not asked for

`Settings` holds TrieTune's own as its fields' defaults; the original's differ in the keys below and in no others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

ORIGINAL_DEFAULTS: Mapping[str, Any] = {
    "dataset_id": "stanfordnlp/sst2",
    "max_length": 32,
    "model_name": "google/gemma-1.1-2b-it",
    "dtype": "bfloat16",
    "lora_r": 4,
    "lora_alpha": 8,
    "learning_rate": 6e-5,
    "batch_size": 4,
    "use_wandb": True,
    "wandb_project": "gemma11-finetuning",
    "wandb_run_name": "tt-gemma11-sst2",
    "wandb_tags": ("test",),
    "project_dir": "blacksmith/experiments/torch/gemma11",
    "use_tt": True,
}
# A file that writes both is one of the original's: no other has a reason to.
MARKS_OF_THE_ORIGINAL = frozenset({"framework", "use_tt"})
# Of a run that neither a file nor data gives a name.
RUN_NAME = "run"


def is_of_the_original(keys: Collection[str]) -> bool:
    """Whether a file that writes `keys` is in the original's form."""
    return set(keys) >= MARKS_OF_THE_ORIGINAL


def run_name_from(path: str) -> str:
    """A run's name from a YAML file, a data file, a glob, a folder or a hub id.

    my/reviews.yaml -> reviews    data/train-*.jsonl.gz -> train    owner/name:config@main -> name-config
    """
    parts = [re.sub(r"@.*$", "", part) for part in PurePath(path).parts if part not in ("..", ".", "/")]
    for part in reversed(parts):
        stem = re.sub(r"(?<=.)\.(ya?ml|jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz)\b.*$", "", part, flags=re.IGNORECASE)
        name = re.sub(r"[^\w.+@ -]+", "-", stem).strip(" .-")[:100].strip(" .-")
        if name:
            return name
    return RUN_NAME

